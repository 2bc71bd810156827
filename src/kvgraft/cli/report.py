"""``kvgraft report``: a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvgraft.cli.shared import app, console


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders that `kvgraft train` wrote; several are seeds of one recipe."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The file; default RUN/report.html, or report.html beside several RUNs."),
    ] = None,
) -> None:
    """Write one HTML file with curves, tables, alignment and the log of RUN. It needs no network to be read."""
    from kvgraft.report.page import default_place, page_of_runs, write_page

    path = output or default_place(runs)
    write_page(page_of_runs(runs), path)
    console.print(f"the report is in {path}; open it in a browser", soft_wrap=True, markup=False)
