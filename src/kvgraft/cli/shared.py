"""What all commands share: the app, how arguments look, how results and stops are shown."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console, RenderableType
from typer.core import TyperCommand

if TYPE_CHECKING:
    from kvgraft.recipe import Recipe

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Commands(typer.Typer):
    """Help as wide as the terminal: typer breaks it where the lines of a docstring end."""

    def command(self, *args: Any, **options: Any) -> Callable[[_Function], _Function]:
        register = super().command

        def register_joined(function: _Function) -> _Function:
            paragraphs = (function.__doc__ or "").split("\n\n")
            joined = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
            return register(*args, help=joined, **options)(function)

        return register_joined


app = _Commands(
    help="Move knowledge between language models through their key/value caches.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Names and answers may have [brackets] and :colons:, which are neither markup nor emoji here.
console = Console(markup=False, emoji=False)
error_console = Console(stderr=True, markup=False, emoji=False)

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


class SeveralValues(TyperCommand):
    """``--arms kv linear --seeds 0 1 2`` means what ``--arms kv --arms linear --seeds 0 --seeds 1 ...`` means."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, repeat_options(args, ("--arms", "--seeds")))


def repeat_options(arguments: list[str], options: tuple[str, ...]) -> list[str]:
    """``arguments`` with each of ``options`` repeated before every value that follows it."""
    repeated: list[str] = []
    option = ""
    for argument, following in zip(arguments, [*arguments, "-"][1:], strict=True):
        if argument in options:
            if following.startswith("-"):
                raise typer.BadParameter(f"{argument} is followed by no value")
            option = argument
        elif argument.startswith("-"):
            option = ""
            repeated.append(argument)
        else:
            repeated += [option, argument] if option else [argument]
    return repeated


def recipe_at(path: Path, overrides: list[str] | None) -> Recipe:
    """The recipe of a command, read before what takes seconds to import, so that a mistake in it is told at once."""
    from kvgraft.recipe import load_recipe

    recipe = load_recipe(path, overrides)
    hide_bars_of_transformers()
    return recipe


def hide_bars_of_transformers() -> None:
    """Leave out the bars of loading and saving weights, which cut through ours. What the hub sends keeps its own."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    hub_has_bars = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if hub_has_bars:
        enable_progress_bars()


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
def resumable(
    command: str, recipe: Path, overrides: list[str] | None, folder: Path, options: str = ""
) -> Iterator[None]:
    """Where the work inside is stopped, say how to go on with it and leave with exit code 130.

    Args:
        options: further ones of the command, with a blank before each.
    """
    from kvgraft.errors import TrainingInterruptedError

    try:
        yield
    except (KeyboardInterrupt, TrainingInterruptedError) as stopped:
        changes = [word for change in overrides or [] for word in ("--set", change)]
        start, end = shlex.join(["kvgraft", command, str(recipe), *changes]), shlex.join(["--output", str(folder)])
        console.print(f"{stopped or 'stopped'}", soft_wrap=True)
        console.print(f"go on with: {start}{options} {end} --resume", soft_wrap=True)
        raise typer.Exit(130) from stopped
