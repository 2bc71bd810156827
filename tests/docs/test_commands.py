"""Every command of the README and of docs/ would run: options and recipes are checked by what runs them."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from click import Command, Context
from typer.main import get_command

from kvgraft.cli import app
from kvgraft.compare import matrix
from kvgraft.evaluate.run import PARTS
from kvgraft.projector.ablation import GROUPS
from kvgraft.recipe import Recipe, load_recipe
from tests.benchmark_scripts import load_benchmark
from tests.docs.pages import PAGES, PROGRAMS, blocks, fenced_commands, inline_commands, named_commands, words_of


def recipe_at(path: Path, page: Path, tmp_path: Path) -> Path:
    """The file that a command's recipe stands for: one that is there, one that the page shows, or any."""
    if path.name == "RECIPE" or path.name == "experiment.yaml":
        return Path("recipes/quickstart.yaml")
    for body in blocks(page, "yaml"):
        if body.startswith(f"# {path}\n"):
            (tmp_path / path).write_text(body, encoding="utf-8")
            return tmp_path / path
    return path


def parsed(command: Command, words: list[str]) -> dict[str, Any]:
    """The command's arguments as it would get them; a wrong option or value is an error."""
    return command.make_context(command.name or "command", list(words)).params


def check_recipe(arguments: dict[str, Any], page: Path, tmp_path: Path) -> Path | None:
    """Load the recipe with its overrides."""
    if arguments.get("recipe") is None:
        return None
    recipe = recipe_at(Path(arguments["recipe"]), page, tmp_path)
    load_recipe(recipe, list(arguments.get("overrides") or ()))
    return recipe


def check_kvgraft(words: list[str], page: Path, tmp_path: Path) -> None:
    group = get_command(app)
    with Context(group) as context:
        name, command, rest = group.resolve_command(context, words)
    arguments = parsed(command, rest)
    recipe = check_recipe(arguments, page, tmp_path)
    if name == "compare":
        matrix.plan_matrix(
            recipe,
            arguments["overrides"] or (),
            arms=arguments["arms"] or (),
            seeds=[int(seed) for seed in arguments["seeds"] or [0]][:1],  # each seed is planned alike
            against=arguments["against"],
            controls=arguments["controls"],
        )
    known = {"evaluate": PARTS, "ablate": GROUPS}.get(name, ())
    assert set(arguments.get("only") or ()) <= set(known)


def check_make(words: list[str], page: Path, tmp_path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    # A variable of the Makefile may be set beside its targets.
    assert {word for word in words if "=" not in word} <= targets


def check_python(words: list[str], page: Path, tmp_path: Path) -> None:
    script = Path(words[0])
    assert script.is_file()
    if script.parts[0] == "benchmarks":
        check_recipe(parsed(benchmark_command(script), words[1:]), page, tmp_path)
    else:
        assert len(words) == 1, "only benchmarks are known to take options"


def benchmark_command(script: Path) -> Command:
    benchmark = typer.Typer()
    benchmark.command()(load_benchmark(script).main)
    return get_command(benchmark)


def check_launcher(parser: argparse.ArgumentParser, words: list[str], page: Path, tmp_path: Path) -> None:
    """``-m kvgraft`` ends the launcher's own options."""
    module = words.index("-m")
    assert words[module + 1] == "kvgraft"
    parser.parse_args(words[: module + 2])
    check_kvgraft(words[module + 2 :], page, tmp_path)


def check_accelerate(words: list[str], page: Path, tmp_path: Path) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    check_launcher(launch_command_parser(), words[1:], page, tmp_path)


def check_torchrun(words: list[str], page: Path, tmp_path: Path) -> None:
    from torch.distributed.run import get_args_parser

    check_launcher(get_args_parser(), words, page, tmp_path)


def check_pip(words: list[str], page: Path, tmp_path: Path) -> None:
    if "-e" not in words:
        # The models of the recipes, as the Makefile gets them.
        assert words[0] == "install"
        assert f"pip install --quiet {' '.join(words[1:])}\n" in Path("Makefile").read_text(encoding="utf-8")
        return
    project = Path("pyproject.toml").read_text(encoding="utf-8")
    extras = project.partition("[project.optional-dependencies]")[2].partition("\n\n")[0]
    assert words[:2] == ["install", "-e"]
    named = re.fullmatch(r"\.\[([a-z,]+)\]", words[2])[1].split(",")
    assert set(named) <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))


def check_tensorboard(words: list[str], page: Path, tmp_path: Path) -> None:
    assert words[0] == "--logdir"
    assert len(words) == 2


CHECKS: dict[str, Callable[[list[str], Path, Path], None]] = {
    "kvgraft": check_kvgraft,
    "make": check_make,
    "python": check_python,
    "accelerate": check_accelerate,
    "torchrun": check_torchrun,
    "pip": check_pip,
    "tensorboard": check_tensorboard,
}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_would_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The models of a page may be the hub's.
    monkeypatch.setattr(matrix, "_logits_can_be_compared", lambda recipe: True)
    for command in [*fenced_commands(page), *inline_commands(page)]:
        program, *words = words_of(command)
        assert program in PROGRAMS, f"{command!r} is no command; a block of something else needs a language"
        try:
            CHECKS[program](words, page, tmp_path)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{page}: {command}\n{error!r} {getattr(error, 'message', '')}")
    assert set(named_commands(page)) <= set(get_command(app).commands)


@pytest.mark.parametrize(
    "command",
    [
        "kvgraft trian recipes/quickstart.yaml",
        "kvgraft train recipes/quickstart.yaml --ouput x",
        "kvgraft train recipes/absent.yaml",
        "kvgraft train recipes/quickstart.yaml --set training.step=3",
        "kvgraft compare recipes/quickstart.yaml --arms nonsense",
        "kvgraft evaluate RUN --only gsm9k",
        "kvgraft fit recipes/fit.yaml --objective nonsense",
        "make nonsense",
        "python benchmarks/absent.py",
        "python benchmarks/store_size.py recipes/fit.yaml --text 40",
        "python benchmarks/store_size.py recipes/fit.yaml --set data.trian=GSM8K",
        "torchrun --processes 2 -m kvgraft train RECIPE",
        "accelerate launch -m kvgraft train RECIPE --resum",
        "pip install -e '.[nonsense]'",
    ],
)
def test_a_wrong_command_is_caught(command: str, tmp_path: Path) -> None:
    program, *words = words_of(command)
    with pytest.raises((Exception, SystemExit)):
        CHECKS[program](words, Path("README.md"), tmp_path)


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = ([words_of(command) for command in fenced_commands(page)] for page in PAGES[:2])
    assert english == chinese


def test_recipes_are_all_readable() -> None:
    recipes = [load_recipe(path) for path in sorted(Path("recipes").glob("*.yaml"))]
    assert all(isinstance(recipe, Recipe) for recipe in recipes)
