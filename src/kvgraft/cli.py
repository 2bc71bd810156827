"""The command line: each command reads its arguments and calls one function."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.logging import RichHandler

app = typer.Typer(
    help="Move knowledge between language models through their key/value caches.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_console = Console()

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file, such as recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="A.B=VALUE", help="Change one field, e.g. --set training.steps=100; may be repeated."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def plan(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="What `kvgraft train` would run.")] = None,
    overrides: Overrides = None,
    guide: Annotated[
        bool, typer.Option("--guide", help="Instead of RECIPE: the guide's schemes, and the real models it names.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what RECIPE takes (layers, adapters, memory, disk) and whether it can work. Loads no weights.

    Exit code 1 where it cannot work. With --guide: what the guide's three schemes and the models it names take, under
    both readings of d_model, beside the guide's own numbers.
    """
    from kvgraft.guide_plan import make_guide_plan
    from kvgraft.plan import make_plan
    from kvgraft.recipe import load_recipe
    from kvgraft.report.guide_tables import guide_plan_tables
    from kvgraft.report.tables import plan_tables

    if (recipe is None) != guide:
        raise typer.BadParameter("give either RECIPE or --guide")
    _require_recipe_for(overrides, recipe)
    if recipe is None:
        sizes = make_guide_plan()
        _show(sizes, guide_plan_tables(sizes), as_json)
        return
    made = make_plan(load_recipe(recipe, overrides))
    _show(made, plan_tables(made), as_json)
    if made.problems:
        for problem in () if as_json else made.problems:
            _console.print(f"cannot work: {problem}", style="red", markup=False)
        raise typer.Exit(1)


@app.command()
def cache(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Run RECIPE's teachers once and keep their KV on disk. What is there already is not done again."""
    from kvgraft.plan import require_workable
    from kvgraft.prepare import prepare
    from kvgraft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    require_workable(loaded)
    for teacher in prepare(loaded).teachers:
        speed = teacher.report.tokens_per_second
        done = f"captured at {speed:,.0f} tokens per second" if speed else "was there already"
        _console.print(
            f"{teacher.recipe.name}: KV of {teacher.store.num_tokens:,} tokens, "
            f"{teacher.store.total_bytes / 1e6:,.1f} MB, {done}: {teacher.store.folder}",
            soft_wrap=True,
        )


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the run in the folder first.")] = False,
) -> None:
    """Do everything RECIPE says: store the teachers' KV, train every arm, compare them, write a run folder.

    Several processes: accelerate launch -m kvgraft train RECIPE
    """
    from kvgraft.errors import TrainingInterruptedError
    from kvgraft.processes import process_state
    from kvgraft.recipe import load_recipe
    from kvgraft.report.tables import cost_table, result_table
    from kvgraft.run import run

    loaded = load_recipe(recipe, overrides)
    folder = output or Path("runs") / loaded.name
    try:
        result = run(loaded, folder, resume=resume, overwrite=overwrite)
    except (KeyboardInterrupt, TrainingInterruptedError) as stopped:
        raise _stopped("train", stopped, recipe, overrides, folder) from stopped
    if process_state().is_main_process:
        _console.print(result_table(result), cost_table(result), sep="\n")
        _console.print(f"everything is in {folder}: results.md, curves.png, experiment.yaml, students", soft_wrap=True)


@app.command()
def fit(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the fit in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove what is in the folder first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fit RECIPE's projector alone, between its teacher and an existing student, both frozen.

    Says for every layer how much of one model's keys and values can be predicted from the other's on held-out text,
    beside least squares, and how close the student's attention stays with the projected KV in place of its own.
    """
    from kvgraft.errors import TrainingInterruptedError
    from kvgraft.fit.run import fit as fit_projector
    from kvgraft.recipe import load_recipe
    from kvgraft.report.fit import fit_table, suggested_layers_yaml

    loaded = load_recipe(recipe, overrides)
    folder = output or Path("runs") / loaded.name
    try:
        report = fit_projector(loaded, folder, resume=resume, overwrite=overwrite)
    except (KeyboardInterrupt, TrainingInterruptedError) as stopped:
        raise _stopped("fit", stopped, recipe, overrides, folder) from stopped
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    _console.print(fit_table(report))
    _console.print("layer map that the scan suggests, for a recipe:", suggested_layers_yaml(report), sep="\n")
    _console.print(f"everything is in {folder}: projector, fit.md, layers.png, fit.png", soft_wrap=True)


@app.command()
def evaluate(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `kvgraft train` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Measure the saved students of RUN again on its held-out text."""
    from kvgraft.report.tables import evaluation_table
    from kvgraft.run import evaluate as evaluate_run

    result = evaluate_run(run_folder)
    if as_json:
        typer.echo(json.dumps({arm.arm: arm.last for arm in result.arms}, indent=2))
    else:
        _console.print(evaluation_table(result))


@app.command()
def ablate(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="Take real KV from its store; default: synthetic numbers.")
    ] = None,
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GROUP", help="width, layer_norm, activation, init, learning_rate, dropout; may be repeated."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Whole numbers between commas or blanks.")] = "0,1,2",
    steps: Annotated[int, typer.Option(help="Steps of AdamW; the guide takes 40.")] = 40,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a step; all where there are fewer.")] = 1024,
    width_divisor: Annotated[
        int | None, typer.Option(help="Synthetic scenario: divide 5120 and 1536 by this. Default 8; the guide 1.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for ablation.json, .md and .png.")] = Path("runs/ablation"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the ablation in the folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train adapters that differ in one setting, over several seeds, and put the guide's claims beside ours.

    LayerNorm, activation, initialisation, learning rate, dropout, width, and least squares. Without RECIPE the guide's
    scenario of random targets runs, which is not evidence about real models.

    Quick look: kvgraft ablate --only width --seeds 0 --width-divisor 32
    """
    from kvgraft.ablate import run_ablations
    from kvgraft.recipe import load_recipe
    from kvgraft.report.ablation import ablation_tables

    _require_recipe_for(overrides, recipe)
    report = run_ablations(
        None if recipe is None else load_recipe(recipe, overrides),
        output,
        only=only or (),
        seeds=_whole_numbers(seeds),
        steps=steps,
        batch_tokens=batch_tokens,
        width_divisor=width_divisor,
        overwrite=overwrite,
    )
    _show(report, ablation_tables(report), as_json)
    if not as_json:
        _console.print(report.warning, style="yellow", end="\n" if report.warning else "")
        _console.print(f"everything is in {output}: ablation.json, ablation.md, ablation.png", soft_wrap=True)


@app.command()
def migrate(
    old: Annotated[
        Path, typer.Argument(metavar="OLD", help="A .safetensors file, or a torch.saved state dict (.pt, .pth, .bin).")
    ],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Folder to create for the new projector.")],
    teacher: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=LAYERS", help="Name of a teacher and layers of its KV; may be repeated."),
    ] = None,
    num_layers: Annotated[int | None, typer.Option(help="Layers of every teacher that --teacher leaves out.")] = None,
    mlp_ratio: Annotated[
        str, typer.Option(help="Hidden width over the teacher's: a number, or auto by its width.")
    ] = "1.0",
    dropout: Annotated[float, typer.Option(help="Share of hidden units dropped in training.")] = 0.1,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="One adapter per layer, each from the old map.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a checkpoint of the old linear projector into an Elastic Bottleneck that starts where it stood.

    OLD holds one linear map for keys and one for values per teacher: key_adapters.NAME.weight and
    .bias, value_adapters.NAME.weight and .bias. The map becomes a skip beside a bottleneck whose last layer is zero, so
    that NEW gives the same output until it is trained. Widths are read from OLD, layers of the models that `kvgraft
    plan --guide` lists from their names. Train on with a learning rate of 1e-3 where the linear projector had 1e-4.

    Example: kvgraft migrate old.pt projector --teacher Qwen2-7B=28 --mlp-ratio 0.5

    Then: KVDimensionProjector.from_pretrained("projector")
    """
    from kvgraft.migration import migrate_checkpoint
    from kvgraft.report.tables import migration_table

    ratio = _number_or_auto(mlp_ratio)
    migrated = migrate_checkpoint(
        old, new, teachers=teacher or (), num_layers=num_layers, mlp_ratio=ratio, dropout=dropout, per_layer=per_layer
    )
    _show(migrated, [migration_table(migrated, new)], as_json)


def _require_recipe_for(overrides: list[str] | None, recipe: Path | None) -> None:
    if overrides and recipe is None:
        raise typer.BadParameter(f"--set {overrides[0]} changes a field of RECIPE, and there is none")


def _show(result: BaseModel, tables: Sequence[RenderableType], as_json: bool) -> None:
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        _console.print(*tables, sep="\n")


def _number_or_auto(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} must be a number or auto") from error


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.replace(",", " ").split()]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} must be whole numbers between commas or blanks, such as 0,1,2") from error


@app.command()
def graft(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove what is in the folder first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fit RECIPE's projector (see `fit`), then let the student go on from the teacher's projected cache of a question.

    Says how likely the answers of held-out problems are from that cache, from the student's own, from none, and from
    controls: another question's cache, the mean, zeros, tokens in another order.
    """
    from kvgraft.errors import TrainingInterruptedError
    from kvgraft.graft.run import graft as measure_graft
    from kvgraft.recipe import load_recipe
    from kvgraft.report.graft import graft_table

    loaded = load_recipe(recipe, overrides)
    folder = output or Path("runs") / loaded.name
    try:
        report = measure_graft(loaded, folder, resume=resume, overwrite=overwrite)
    except (KeyboardInterrupt, TrainingInterruptedError) as stopped:
        raise _stopped("graft", stopped, recipe, overrides, folder) from stopped
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    _console.print(graft_table(report))
    _console.print(f"everything is in {folder}: projector, graft.md, graft.json, fit.md", soft_wrap=True)


def _stopped(
    command: str, stopped: BaseException, recipe: Path, overrides: list[str] | None, folder: Path
) -> typer.Exit:
    """Say that work was stopped and how to go on with it."""
    changes = "".join(f" --set {change}" for change in overrides or [])
    _console.print(f"{stopped or 'stopped'}", markup=False, soft_wrap=True)
    _console.print(
        f"go on with: kvgraft {command} {recipe}{changes} --output {folder} --resume", markup=False, soft_wrap=True
    )
    return typer.Exit(130)


def main() -> None:
    """Entry point of ``kvgraft``: errors meant for users are printed without a traceback."""
    from transformers.utils import logging as transformers_logging

    from kvgraft.errors import KVGraftError

    handler = RichHandler(console=Console(stderr=True), show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("kvgraft").setLevel(logging.INFO)
    # Its bars and warnings would cut through ours; what matters of them comes back as an error.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        app()
    except KVGraftError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
