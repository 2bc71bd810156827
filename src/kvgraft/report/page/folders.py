"""The page of folders as a reader names them: runs, or a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvgraft.compare.comparison import Comparison
from kvgraft.errors import ReportError
from kvgraft.report.comparison import COMPARISON_FILE
from kvgraft.report.page.comparison import page_of_comparison
from kvgraft.report.page.data import PageData
from kvgraft.report.page.runs import page_of_runs
from kvgraft.report.results import RECIPE_FILE, RESULT_FILE

PAGE_FILE = "report.html"


def page_of_folders(folders: Sequence[Path], with_strips: bool = True) -> PageData:
    """The page of one comparison, or of runs that are seeds of one recipe.

    Args:
        with_strips: whether to load the tokenizers and show a text in both.

    Raises:
        ReportError: a folder that is neither, or is not finished, or a comparison beside other folders.
        ResultError: a newer version of kvgraft wrote it, or it is damaged.
    """
    comparisons = [folder for folder in folders if (folder / COMPARISON_FILE).is_file()]
    if comparisons and len(folders) > 1:
        raise ReportError(f"{comparisons[0]} is a comparison, which has a page of its own: name it alone")
    if comparisons:
        return page_of_comparison(Comparison.read(comparisons[0] / COMPARISON_FILE), comparisons[0], with_strips)
    for folder in folders:
        _require_a_run(folder)
    return page_of_runs(folders, with_strips)


def default_place(folders: Sequence[Path]) -> Path:
    """Where the page of ``folders`` goes: into a single run, or beside several.

    Raises:
        ReportError: several that do not lie in one folder.
    """
    if len(folders) == 1:
        return folders[0] / PAGE_FILE
    parents = {folder.resolve().parent for folder in folders}
    if len(parents) > 1:
        raise ReportError(
            f"the runs lie in different folders ({', '.join(map(str, sorted(parents)))}): give --output FILE"
        )
    return folders[0].parent / PAGE_FILE


def _require_a_run(folder: Path) -> None:
    if (folder / RECIPE_FILE).is_file():
        return
    cells = sorted(path.parent for path in folder.glob(f"*/seed-*/{RECIPE_FILE}"))
    if not cells:
        raise ReportError(
            f"{folder} is neither a run (it has no {RECIPE_FILE}) nor a comparison (it has no {COMPARISON_FILE}); name "
            "a folder that `kvgraft train` or `kvgraft compare` wrote"
        )
    unfinished = [str(cell.relative_to(folder)) for cell in cells if not (cell / RESULT_FILE).is_file()]
    raise ReportError(
        f"the comparison in {folder} did not finish: it has no {COMPARISON_FILE} (unfinished runs of those begun: "
        f"{', '.join(unfinished) or 'none'}). Give the same `kvgraft compare` command again to go on with it"
    )
