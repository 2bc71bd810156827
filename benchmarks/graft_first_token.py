"""How soon does the first token come, from a stored cache of a teacher against reading the text?

    kvgraft graft recipes/graft.yaml --output runs/graft
    python benchmarks/graft_first_token.py runs/graft

Text of growing length from the run's own recipe; `kvgraft graft` itself times one length (`graft.first_token`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from kvgraft.graft.first_token import first_token
from kvgraft.identify import identify
from kvgraft.prepare import load_examples_of
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import TeacherRecipe, load_recipe


def main(
    run: Annotated[Path, typer.Argument(help="A folder that `kvgraft graft` or `kvgraft fit` wrote.")],
    projector: Annotated[str, typer.Option(help="Which of its projectors.")] = "projector",
    lengths: Annotated[str, typer.Option(help="Student tokens.")] = "256,512,1024,2048",
    bf16: Annotated[bool, typer.Option(help="Project in bfloat16.")] = False,
    bf16_student: Annotated[bool, typer.Option(help="Let the student compute in bfloat16.")] = False,
    repeats: Annotated[int, typer.Option(help="Timings of each; the median counts.")] = 3,
) -> None:
    """Print the table in Markdown."""
    recipe = load_recipe(run / "recipe.yaml")
    dtype = "bfloat16" if bf16_student else recipe.student.dtype
    student = identify(TeacherRecipe(name="student", model=str(recipe.student.model), dtype=dtype))
    teacher = identify(recipe.teachers[0])
    adapters = KVDimensionProjector.from_pretrained(run / projector)
    if bf16:
        adapters.compute_in(torch.bfloat16)
    examples, _ = load_examples_of(recipe, student.tokenizer)
    whole = " ".join(example.text for example in examples)
    typer.echo(f"{adapters.count_parameters():,} parameters; {torch.get_num_threads()} threads\n")
    typer.echo("| tokens | from the store | student reads | ratio | teacher reads | ratio | bytes read a token |")
    typer.echo("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for length in map(int, lengths.split(",")):
        found = first_token(
            student,
            teacher,
            {projector: adapters},
            whole,
            length,
            recipe.store,
            own_first_tokens=recipe.graft.own_first_tokens,
            repeats=repeats,
        )
        ours = found.from_store[projector]
        typer.echo(
            f"| {found.tokens:,} | {ours:.3f} s | {found.student:.3f} s | {ours / found.student:.2f} | "
            f"{found.teacher:.3f} s | {ours / found.teacher:.2f} | {found.bytes_per_token:,.0f} |"
        )


if __name__ == "__main__":
    typer.run(main)
