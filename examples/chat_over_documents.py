"""Read a folder of documents once with the teacher, then ask the small model about them.

    kvgraft graft recipes/graft.yaml --output runs/graft
    python examples/chat_over_documents.py runs/graft notes/ "What did we decide about the garden?"

`kvgraft chat runs/graft --document notes/` is the same as a conversation in the terminal.
"""

import sys
from pathlib import Path

from kvgraft.graft.chat import open_conversation, text_files


def main(run: str, documents: str, *questions: str) -> None:
    """Answer each question, word by word, and remember those before it."""
    conversation = open_conversation(Path(run), text_files([Path(documents)]))
    for question in questions:
        sys.stdout.write(f"> {question}\n")
        for piece in conversation.ask(question):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
