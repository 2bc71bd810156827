"""``kvgraft fit``: the projector alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvgraft.cli.shared import (
    AsJson,
    Output,
    Overrides,
    Overwrite,
    RecipePath,
    Resume,
    app,
    console,
    recipe_at,
    resumable,
)


@app.command()
def fit(
    recipe: RecipePath,
    overrides: Overrides = None,
    objective: Annotated[
        Literal["regression", "attention", "continuation"] | None,
        typer.Option(help="What is trained for; short for --set fit.objective=..."),
    ] = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fit RECIPE's projector alone, between its teacher and an existing student, both frozen.

    Says for every layer how much of one model's keys and values can be predicted from the other's on held-out text,
    beside least squares, and how close the student's attention stays with the projected KV in place of its own.

    Objectives: regression (predict the KV), attention (the same, tokens counted by how much attention reads them),
    continuation (then train through the frozen student on what follows a prompt, for `kvgraft graft`).
    """
    if objective is not None:
        overrides = [*(overrides or []), f"fit.objective={objective}"]
    loaded = recipe_at(recipe, overrides)
    from kvgraft.errors import ResultError
    from kvgraft.fit.run import fit as fit_projector
    from kvgraft.report.fit import fit_table, suggested_layers_yaml

    folder = output or Path("runs") / loaded.name
    with resumable("fit", recipe, overrides, folder):
        report = fit_projector(loaded, folder, resume=resume, overwrite=overwrite)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        console.print(fit_table(report))
        console.print("layer map that the scan suggests, for a recipe:", suggested_layers_yaml(report), sep="\n")
        console.print(f"everything is in {folder}: projector, fit.md, layers.png, fit.png", soft_wrap=True)
    if report.has_diverged:
        raise ResultError(
            "the fit diverged: R2 on held-out text is no finite number in some layer. Try a lower fit.learning_rate, "
            "with another --output"
        )
