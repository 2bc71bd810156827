"""Comparison folders written by hand, of runs whose curves a test can compute."""

import shutil
from pathlib import Path

from kvgraft.compare.comparison import Comparison, build_comparison
from kvgraft.compare.matrix import plan_matrix
from kvgraft.recipe import Recipe
from kvgraft.report.comparison import write_comparison
from kvgraft.report.results import RunResult
from tests.report.page.made_runs import RECIPE, make_run

OWN = "own:kv projector.dropout=0.3"


def make_comparison(folder: Path, seeds: tuple[int, ...] = (0, 1), arms: tuple[str, ...] = ("kv", OWN)) -> Comparison:
    """What ``kvgraft compare`` leaves: arms 0.5 apart in the order baseline, mismatched, then ``arms``."""
    folder.mkdir(parents=True)
    recipe = folder / "made.yaml"
    recipe.write_text(Recipe.model_validate(RECIPE).to_yaml(), encoding="utf-8")
    controls = [name for name in ("baseline", "mismatched") if name not in arms]
    matrix = plan_matrix(recipe, arms=[*controls, *arms], seeds=seeds, folder=folder, controls=False)
    results = {}
    names = [arm.name for arm in matrix.arms]
    for cell in matrix.cells:
        make_run(
            cell.folder,
            cell.seed,
            arms=(cell.arm.trains_as,),
            recipe=cell.recipe.model_dump(mode="json"),
            first_arm=names.index(cell.arm.name),
        )
        results[cell.arm.name, cell.seed] = RunResult.read(cell.folder / "result.json")
    comparison = build_comparison(matrix, results)
    write_comparison(comparison, folder)
    return comparison


def remove_runs(folder: Path) -> None:
    """Leave the comparison's own files alone, as where they were mailed."""
    for run in folder.glob("*/seed-*"):
        shutil.rmtree(run)
