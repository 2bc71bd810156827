"""``kvgraft plan``: what a recipe takes, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvgraft.cli.shared import AsJson, Overrides, app, console, require_recipe_for, show


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
    require_recipe_for(overrides, recipe)
    if recipe is None:
        sizes = make_guide_plan()
        show(sizes, guide_plan_tables(sizes), as_json)
        return
    made = make_plan(load_recipe(recipe, overrides))
    show(made, plan_tables(made), as_json)
    if made.problems:
        for problem in () if as_json else made.problems:
            console.print(f"cannot work: {problem}", style="red", markup=False)
        raise typer.Exit(1)
