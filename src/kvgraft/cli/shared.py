"""What all commands share: the app, how arguments look, how results and stops are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Console, RenderableType

app = typer.Typer(
    help="Move knowledge between language models through their key/value caches.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file, such as recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="A.B=VALUE", help="Change one field, e.g. --set training.steps=100; may be repeated."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Output = Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what is in the folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove what is in the folder first.")]


def require_recipe_for(overrides: list[str] | None, recipe: Path | None) -> None:
    if overrides and recipe is None:
        raise typer.BadParameter(f"--set {overrides[0]} changes a field of RECIPE, and there is none")


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.replace(",", " ").split()]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} must be whole numbers between commas or blanks, such as 0,1,2") from error


def show(result: BaseModel, tables: Sequence[RenderableType], as_json: bool) -> None:
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        console.print(*tables, sep="\n")


@contextmanager
def resumable(command: str, recipe: Path, overrides: list[str] | None, folder: Path) -> Iterator[None]:
    """Where the work inside is stopped, say how to go on with it and leave with exit code 130."""
    from kvgraft.errors import TrainingInterruptedError

    try:
        yield
    except (KeyboardInterrupt, TrainingInterruptedError) as stopped:
        _say_how_to_go_on(command, stopped, recipe, overrides, folder)
        raise typer.Exit(130) from stopped


def _say_how_to_go_on(
    command: str, stopped: BaseException, recipe: Path, overrides: list[str] | None, folder: Path
) -> None:
    changes = "".join(f" --set {change}" for change in overrides or [])
    console.print(f"{stopped or 'stopped'}", markup=False, soft_wrap=True)
    console.print(
        f"go on with: kvgraft {command} {recipe}{changes} --output {folder} --resume", markup=False, soft_wrap=True
    )
