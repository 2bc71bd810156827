"""``kvgraft cut``: a student made of some of a model's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvgraft.cli.shared import Overwrite, app, console


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
    revision: Annotated[str | None, typer.Option(help="Of a hub id.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    overwrite: Overwrite = False,
) -> None:
    """Write a student cut from MODEL by layers, with its tokenizer, in the Hugging Face layout.

    Embeddings, norms and head are MODEL's own. OUTPUT's config notes where its layers came from, and `kvgraft train`
    matches each with that layer of the teacher.

    Example: kvgraft cut HuggingFaceTB/SmolLM2-135M-Instruct student --every 3
    """
    from kvgraft.models.cut import write_cut

    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype!r} must be float32, bfloat16 or float16")
    student = write_cut(
        model,
        output,
        layers=None if layers is None else _list_or_count(layers),
        every=every,
        revision=revision,
        dtype=dtype,
        overwrite=overwrite,
    )
    text = student.config.get_text_config()
    console.print(
        f"{text.num_hidden_layers} of {text.origin_num_layers} layers of {model} ({text.origin_layers}), "
        f"{student.num_parameters():,} parameters: {output}",
        markup=False,
        soft_wrap=True,
    )


def _list_or_count(text: str) -> list[int] | int:
    try:
        numbers = [int(number) for number in text.split(",") if number.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} must be whole numbers between commas, as 0,3,6, or one number") from error
    return numbers[0] if len(numbers) == 1 and "," not in text else numbers
