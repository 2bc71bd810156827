"""``kvgraft report``: a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvgraft.cli.shared import app, console


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...|COMPARISON",
            help="Folders that `kvgraft train` wrote (several are seeds of one recipe), or one of `kvgraft compare`.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The file; default report.html in the folder, or beside several RUNs."),
    ] = None,
) -> None:
    """Write one HTML file with the curves, tables and log of RUN, or COMPARISON's verdicts; it needs no network."""
    from kvgraft.report.page import default_place, page_of_folders, write_page

    path = output or default_place(folders)
    write_page(page_of_folders(folders), path)
    console.print(f"the report is in {path}; open it in a browser", soft_wrap=True)
