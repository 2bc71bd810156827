"""``kvgraft cut``: a student made of some of a model's layers, or of some channels of its MLPs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvgraft.cli.shared import Overwrite, app, console, hide_bars_of_transformers


@app.command()
def cut(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub id, a local folder, a .gguf file, or package:MODULE/FILE.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to create for the student.")],
    layers: Annotated[
        str | None, typer.Option(help="Layers to keep, from 0, as 0,3,6; or one number: how many, spread evenly.")
    ] = None,
    every: Annotated[int | None, typer.Option(help="Keep every so many layers, from the first.")] = None,
    intermediate: Annotated[
        int | None, typer.Option(help="Channels of each MLP to keep: those that do most on --text.")
    ] = None,
    text: Annotated[str, typer.Option(help="For --intermediate, as data.train in a recipe.")] = "word_problems",
    samples: Annotated[int, typer.Option(help="Training texts of --text that are read.")] = 64,
    revision: Annotated[str | None, typer.Option(help="Of a hub id.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    overwrite: Overwrite = False,
) -> None:
    """Write a student cut from MODEL by layers, by the width of its MLPs or by both, with its tokenizer.

    Embeddings, norms and head are MODEL's own. OUTPUT's config notes where its layers came from, and `kvgraft train`
    matches each with that layer of the teacher. --intermediate leaves the KV as wide as MODEL's.

    Example: kvgraft cut HuggingFaceTB/SmolLM2-135M-Instruct student --every 3 --intermediate 1152
    """
    from kvgraft.models.cut_files import write_cut

    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype!r} must be float32, bfloat16 or float16")
    hide_bars_of_transformers()
    student = write_cut(
        model,
        output,
        layers=None if layers is None else _list_or_count(layers),
        every=every,
        intermediate=intermediate,
        text=text,
        samples=samples,
        revision=revision,
        dtype=dtype,
        overwrite=overwrite,
    )
    config = student.config.get_text_config()
    channels = "" if intermediate is None else f"{intermediate} of {config.origin_intermediate_size} MLP channels, "
    console.print(
        f"{config.num_hidden_layers} of {config.origin_num_layers} layers of {model} ({config.origin_layers}), "
        f"{channels}{student.num_parameters():,} parameters: {output}",
        soft_wrap=True,
    )


def _list_or_count(text: str) -> list[int] | int:
    try:
        numbers = [int(number) for number in text.split(",") if number.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} must be whole numbers between commas, as 0,3,6, or one number") from error
    return numbers[0] if len(numbers) == 1 and "," not in text else numbers
