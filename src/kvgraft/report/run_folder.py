"""A finished run as it lies on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvgraft.errors import ReportError
from kvgraft.recipe import Recipe, load_recipe
from kvgraft.report.log import read_metrics
from kvgraft.report.results import LOG_FILE, METRICS_FILE, RECIPE_FILE, RESULT_FILE, RunResult


@dataclass(frozen=True)
class RunFolder:
    """What ``kvgraft train`` left in ``path``. ``metrics`` and ``log`` are empty where their files are missing."""

    path: Path
    recipe: Recipe
    result: RunResult
    metrics: list[dict[str, Any]]
    log: str

    @property
    def seed(self) -> int:
        """What the run was drawn from."""
        return self.result.seed


def holds_a_fit(path: Path) -> bool:
    """Whether ``path`` is what ``kvgraft fit`` or ``kvgraft graft`` wrote, and no training."""
    return (path / "fit.json").is_file() and not (path / RESULT_FILE).is_file()


def read_run_folder(path: Path) -> RunFolder:
    """The finished run in ``path``.

    Raises:
        ReportError: ``path`` is no run, or its run did not finish.
        ResultError: a newer version of kvgraft wrote it, or it is damaged.
    """
    if not (path / RECIPE_FILE).is_file():
        raise ReportError(f"{path} is no run folder: it has no {RECIPE_FILE}; name one that `kvgraft train` wrote")
    if holds_a_fit(path):
        raise ReportError(
            f"{path} is what `kvgraft fit` or `kvgraft graft` wrote: read its fit.md or graft.md; name a folder that "
            "`kvgraft train` wrote"
        )
    if not (path / RESULT_FILE).is_file():
        finished = sorted(file.parent.name for file in path.glob("*/arm.json"))
        raise ReportError(
            f"the run in {path} did not finish: it has no {RESULT_FILE} (finished arms: {', '.join(finished) or 'none'}"
            f"). Go on with it: kvgraft train {path / RECIPE_FILE} --output {path} --resume"
        )
    result = _read_result(path / RESULT_FILE)
    log = path / LOG_FILE
    return RunFolder(
        path=path,
        recipe=load_recipe(path / RECIPE_FILE),
        result=result,
        metrics=_read_metrics(path / METRICS_FILE),
        log=log.read_text(encoding="utf-8") if log.is_file() else "",
    )


def read_seeds(paths: Sequence[Path]) -> list[RunFolder]:
    """The finished runs in ``paths``: one recipe with a seed each, ordered by seed.

    Raises:
        ReportError: as :func:`read_run_folder`; two runs of one seed, or of different recipes.
    """
    runs = sorted((read_run_folder(path) for path in paths), key=lambda run: run.seed)
    for earlier, later in pairwise(runs):
        if earlier.seed == later.seed:
            raise ReportError(
                f"{earlier.path} and {later.path} are both of seed {later.seed}: they are the same run twice; "
                "name runs of different seeds"
            )
        differing = _differing_fields(earlier.recipe, later.recipe)
        if differing:
            raise ReportError(
                f"{earlier.path} and {later.path} were made by different recipes (they differ in "
                f"{', '.join(differing)}) and cannot be shown as seeds of one; give each a report of its own"
            )
    return runs


def _differing_fields(first: Recipe, second: Recipe) -> list[str]:
    if first.model_copy(update={"seed": 0}).fingerprint() == second.model_copy(update={"seed": 0}).fingerprint():
        return []
    one, other = (recipe.model_dump(exclude={"seed", "name", "store", "arms"}) for recipe in (first, second))
    return [name for name in one if one[name] != other[name]]


def _read_result(path: Path) -> RunResult:
    result = RunResult.read(path)
    if not result.arms or any(not arm.evaluations for arm in result.arms):
        raise ReportError(f"{path} holds an arm without an evaluation or no arm at all; do the run again")
    return result


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(path)
    except ValueError as error:
        raise ReportError(f"{path} holds a line that is no JSON ({error}); remove that line") from error
