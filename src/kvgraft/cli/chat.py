"""``kvgraft chat``: talk with a student about what its teacher has read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from kvgraft.cli.shared import app, console, hide_bars_of_transformers


@app.command()
def chat(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A folder that `kvgraft graft` or `kvgraft fit` wrote.")
    ],
    document: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="A text file, or a folder of .txt and .md files; may be repeated."),
    ],
    graft: Annotated[
        str | None,
        typer.Option(help="Which projector of RUN, by its folder: projector, least_squares, continuation and others."),
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="Ask this and stop instead of waiting for questions; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
) -> None:
    """Talk with RUN's student about documents that it has not read: it goes on from its teacher's projected cache.

    The teacher reads every document once; its KV is kept in the store that RUN's recipe names, and the next chat starts
    without the teacher. An empty line or Ctrl-D ends the chat.

    Example: kvgraft chat runs/graft --document notes/
    """
    from kvgraft.graft.chat import open_conversation, text_files

    hide_bars_of_transformers()
    conversation = open_conversation(run_folder, text_files(document), graft)
    questions = iter(question) if question else _typed()
    for asked in questions:
        for piece in conversation.ask(asked, max_new_tokens):
            console.print(piece, end="", highlight=False, soft_wrap=True)
        console.print()


def _typed() -> Iterator[str]:
    while True:
        try:
            asked = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not asked:
            return
        yield asked
