"""``kvgraft graft``: what a projected cache is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvgraft.cli.shared import (
    AsJson,
    Output,
    Overrides,
    Overwrite,
    RecipePath,
    Resume,
    SeveralValues,
    app,
    console,
    recipe_at,
    resumable,
    whole_numbers,
)


@app.command(cls=SeveralValues)
def graft(
    recipe: RecipePath,
    overrides: Overrides = None,
    seeds: Annotated[
        list[str] | None,
        typer.Option(metavar="SEED ...", help="Several, such as 0 1 2: a run of each, and what they say together."),
    ] = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fit RECIPE's projector (see `fit`), then let the student go on from the teacher's projected cache of a question.

    Says how likely the answers of held-out problems are from that cache, from the student's own, from none, and from
    controls: another question's cache, the mean, zeros, tokens in another order.

    What is trained on answers needs several seeds: kvgraft graft recipes/graft.yaml --seeds 0 1 2
    """
    loaded = recipe_at(recipe, overrides)
    from kvgraft.graft.run import graft as measure_graft
    from kvgraft.graft.seeds import graft_over_seeds
    from kvgraft.report.graft import GraftReport, graft_table
    from kvgraft.report.graft_seeds import GraftSeeds, graft_seeds_table

    folder = output or Path("runs") / loaded.name
    result: GraftReport | GraftSeeds
    options = "" if seeds is None else f" --seeds {' '.join(seeds)}"
    with resumable("graft", recipe, overrides, folder, options):
        if seeds is None:
            result = measure_graft(loaded, folder, resume=resume, overwrite=overwrite)
            table, left = graft_table(result), "projector, graft.md, graft.png, graft.json, fit.md"
        else:
            numbers = whole_numbers(" ".join(seeds))
            result = graft_over_seeds(loaded, numbers, folder, resume=resume, overwrite=overwrite)
            table, left = graft_seeds_table(result), "graft.md, graft.png, and a run for each seed"
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
        return
    console.print(table)
    console.print(f"everything is in {folder}: {left}", soft_wrap=True)
