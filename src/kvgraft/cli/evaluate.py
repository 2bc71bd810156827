"""``kvgraft evaluate``: measure a run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvgraft.cli.shared import AsJson, app, console


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
        console.print(evaluation_table(result))
