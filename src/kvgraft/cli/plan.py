"""``kvgraft plan``: what a recipe takes, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvgraft.cli.shared import AsJson, Overrides, app, console, recipe_at, require_recipe_for, show


@app.command()
def plan(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="What `kvgraft train` would run.")] = None,
    overrides: Overrides = None,
    guide: Annotated[
        bool, typer.Option("--guide", help="Instead of RECIPE: the guide's schemes, and the real models it names.")
    ] = False,
    calibration: Annotated[
        bool,
        typer.Option(
            help="Capture a few texts and train a few steps here, to tell time and peak memory; else arithmetic alone."
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Say what RECIPE takes (layers, adapters, disk, memory, time) and whether it can work.

    With --no-calibration no weights are loaded. Exit code 1 where it cannot work. With --guide: what the guide's three
    schemes and the models it names take, under both readings of d_model, beside the guide's own numbers.
    """
    if (recipe is None) != guide:
        raise typer.BadParameter("give either RECIPE or --guide")
    require_recipe_for(overrides, recipe)
    loaded = None if recipe is None else recipe_at(recipe, overrides)
    from kvgraft.forecast import make_forecast
    from kvgraft.guide_plan import make_guide_plan
    from kvgraft.memory import free_memory
    from kvgraft.plan import make_plan
    from kvgraft.report.guide_tables import guide_plan_tables
    from kvgraft.report.tables import plan_tables

    if loaded is None:
        sizes = make_guide_plan()
        show(sizes, guide_plan_tables(sizes), as_json)
        return
    made = make_plan(loaded)
    fits = made.training_memory_bytes < free_memory()
    if calibration and fits and not made.problems:
        made.forecast = make_forecast(loaded)
    show(made, plan_tables(made), as_json)
    if calibration and not fits and not as_json:
        console.print("not calibrated: there is less memory free here than the weights alone take", style="yellow")
    if made.problems:
        for problem in () if as_json else made.problems:
            console.print(f"cannot work: {problem}", style="red")
        raise typer.Exit(1)
