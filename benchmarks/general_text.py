"""Passages of general text, each a beginning and what follows it, to train a graft on something else than its task.

    python benchmarks/general_text.py FOLDER
    kvgraft graft recipes/graft.yaml --set data.train=FOLDER/train.jsonl --set data.held_out=GSM8K

The text is the language reference that every Python carries (the `help` topics), so that nothing is fetched.
"""

from __future__ import annotations

import json
import random
import textwrap
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
        for passage in passages(topics[topic], prompt_characters, prompt_characters + completion_characters)
    ]
    if len(found) < count:
        raise typer.BadParameter(f"there are {len(found)} passages of that length", param_hint="--count")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(passage) for passage in random.Random(seed).sample(found, count)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def passages(text: str, prompt_characters: int, characters: int) -> list[dict[str, str]]:
    """``text`` in passages of about ``characters``, one behind the other; what is left at the end is too short."""
    *whole, _ = textwrap.wrap(" ".join(text.split()), characters)
    cuts = [passage.index(" ", prompt_characters) for passage in whole]
    return [{"prompt": passage[:cut], "completion": passage[cut:]} for passage, cut in zip(whole, cuts, strict=True)]


if __name__ == "__main__":
    typer.run(main)
