"""Run a comparison's cells one after another and set them beside each other."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from kvgraft.compare.comparison import Comparison, build_comparison
from kvgraft.compare.matrix import Cell, Matrix
from kvgraft.errors import ResultError
from kvgraft.plan import require_workable
from kvgraft.processes import process_state
from kvgraft.recipe import load_recipe
from kvgraft.report.comparison import write_comparison
from kvgraft.report.results import RECIPE_FILE, RESULT_FILE, RunResult
from kvgraft.run import INPUTS_FILE, run

logger = logging.getLogger(__name__)


def compare(matrix: Matrix, *, train: bool = True, overwrite: bool = False) -> Comparison:
    """Run what ``matrix`` lacks, and leave ``comparison.json``, ``.md`` and ``curves.png`` in its folder.

    A cell that was finished is not run again, one that was interrupted goes on, and all share the recipe's store.

    Args:
        train: False compares what is there and runs nothing.
        overwrite: run every cell anew.

    Raises:
        RecipeError: a recipe that cannot work, before anything runs.
        ResultError: a cell that is missing or of another recipe, or cells that do not compare.
        TrainingInterruptedError: Ctrl-C; the same call goes on.
    """
    missing = [cell for cell in matrix.cells if overwrite or not is_finished(cell)]
    if missing and not train:
        raise ResultError(
            f"{len(missing)} of {len(matrix.cells)} runs have not finished; without them there is nothing to compare. "
            "Make them:\n" + "\n".join(f"  {cell.command}" for cell in missing)
        )
    # An arm that cannot work is to be known now, not when its turn comes.
    for arm_cell in {cell.arm.name: cell for cell in reversed(missing)}.values():
        require_workable(arm_cell.recipe)
    ready = [cell for cell in matrix.cells if cell not in missing]
    _require_same_inputs(ready)
    for number, cell in enumerate(missing, 1):
        logger.info("run %d of %d: %s with seed %d", number, len(missing), cell.arm.name, cell.seed)
        run(cell.recipe, cell.folder, resume=not overwrite, overwrite=overwrite)
        # Only the first process writes the result that the others look for.
        process_state().wait_for_everyone()
        ready.append(cell)
        _require_same_inputs(ready)
    results = {(cell.arm.name, cell.seed): RunResult.read(cell.folder / RESULT_FILE) for cell in matrix.cells}
    comparison = build_comparison(matrix, results)
    if process_state().is_main_process:
        write_comparison(comparison, matrix.folder)
    return comparison


def is_finished(cell: Cell) -> bool:
    """Whether ``cell`` has its result.

    Raises:
        ResultError: it has one of another recipe, of a newer version, or one that cannot be read.
    """
    path = cell.folder / RESULT_FILE
    if not path.is_file():
        return False
    RunResult.read(path)
    if load_recipe(cell.folder / RECIPE_FILE).fingerprint() != cell.recipe.fingerprint():
        raise ResultError(
            f"{cell.folder} holds a run of another recipe than {cell.arm.name} with seed {cell.seed} has now; give "
            "another --output, or --overwrite to run everything anew"
        )
    return True


def _require_same_inputs(cells: Sequence[Cell]) -> None:
    """Raise ResultError where text, or the weights of the same teachers, changed between two of ``cells``."""
    # Runs of before hold no record.
    recorded = [cell for cell in cells if (cell.folder / INPUTS_FILE).is_file()]
    inputs = [json.loads((cell.folder / INPUTS_FILE).read_bytes()) for cell in recorded]
    for cell, own in zip(recorded, inputs, strict=True):
        first = recorded[0]
        same_teachers = cell.recipe.teachers == first.recipe.teachers
        changed = [
            name
            for name, digest in own.items()
            if inputs[0].get(name) != digest and (same_teachers or not name.startswith("teacher "))
        ]
        if changed:
            raise ResultError(
                f"{cell.arm.name} with seed {cell.seed} in {cell.folder} and {first.arm.name} with seed {first.seed} "
                f"in {first.folder} do not compare: {', '.join(changed)} changed between them. Bring back what it was, "
                "or remove the older folders and run the comparison again"
            )
