"""Passages of general text, each a beginning and what follows it, to train a graft on something else than its task.

    python benchmarks/general_text.py FOLDER
    kvgraft graft recipes/graft.yaml --set data.train=FOLDER/train.jsonl --set data.held_out=GSM8K

The text is the language reference that every Python carries (the `help` topics), so that nothing is fetched.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import typer


def main(
    folder: Annotated[Path, typer.Argument(help="Where train.jsonl goes.")],
    count: Annotated[int, typer.Option(help="Passages.")] = 500,
    prompt_characters: Annotated[int, typer.Option(help="Of each beginning, about.")] = 300,
    completion_characters: Annotated[int, typer.Option(help="Of what follows, about.")] = 450,
    seed: Annotated[int, typer.Option(help="Draws which passages.")] = 0,
) -> None:
    """Write the passages, no two of which share text."""
    found = [
        passage
        for topic in sorted(topics)
        for passage in passages(topics[topic].split(), prompt_characters, completion_characters)
    ]
    if len(found) < count:
        raise typer.BadParameter(f"there are {len(found)} passages of that length", param_hint="--count")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(passage) for passage in random.Random(seed).sample(found, count)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def passages(words: list[str], prompt_characters: int, completion_characters: int) -> list[dict[str, str]]:
    """``words`` in passages one behind the other; what is left at the end is too short."""
    found, parts, lengths = [], [""], (prompt_characters, completion_characters)
    for word in words:
        parts[-1] += " " + word if parts[-1] or len(parts) > 1 else word
        if len(parts[-1]) < lengths[len(parts) - 1]:
            continue
        if len(parts) == 2:
            found.append({"prompt": parts[0], "completion": parts[1]})
            parts = []
        parts.append("")
    return found


if __name__ == "__main__":
    typer.run(main)
