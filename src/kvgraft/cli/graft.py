"""``kvgraft graft``: what a projected cache is worth."""

from __future__ import annotations

from pathlib import Path

import typer

from kvgraft.cli.shared import AsJson, Output, Overrides, Overwrite, RecipePath, Resume, app, console, resumable


@app.command()
def graft(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fit RECIPE's projector (see `fit`), then let the student go on from the teacher's projected cache of a question.

    Says how likely the answers of held-out problems are from that cache, from the student's own, from none, and from
    controls: another question's cache, the mean, zeros, tokens in another order.
    """
    from kvgraft.graft.run import graft as measure_graft
    from kvgraft.recipe import load_recipe
    from kvgraft.report.graft import graft_table

    loaded = load_recipe(recipe, overrides)
    folder = output or Path("runs") / loaded.name
    with resumable("graft", recipe, overrides, folder):
        report = measure_graft(loaded, folder, resume=resume, overwrite=overwrite)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    console.print(graft_table(report))
    console.print(f"everything is in {folder}: projector, graft.md, graft.json, fit.md", soft_wrap=True)
