"""``kvgraft note``: a sentence of one's own in a run's log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvgraft.cli.shared import app, console


@app.command()
def note(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `kvgraft train` wrote.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What should be remembered.")],
) -> None:
    """Add a note to RUN's experiment log; it stays when the run is resumed.

    Example: kvgraft note runs/quickstart "learning rate 3e-3 diverged"
    """
    from kvgraft.report.notes import add_note

    path = add_note(run_folder, text)
    console.print(f"noted in {path}", soft_wrap=True)
