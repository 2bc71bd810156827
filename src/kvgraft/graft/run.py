"""``kvgraft graft``: fit the projector, then measure what the projected cache is worth to the student."""

from __future__ import annotations

import logging
from pathlib import Path

from kvgraft.errors import RecipeError
from kvgraft.fit.data import prepare_fit
from kvgraft.fit.run import LEAST_SQUARES_FOLDER, PROJECTOR_FOLDER, fit
from kvgraft.graft.worth import cache_worth, continuations
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import Recipe
from kvgraft.report.graft import GraftReport, write_graft

logger = logging.getLogger(__name__)

REPORT_FILE = "graft.json"
_PROJECTORS = {"least squares": LEAST_SQUARES_FOLDER, "projector": PROJECTOR_FOLDER}


def graft(recipe: Recipe, folder: Path, *, resume: bool = False, overwrite: bool = False) -> GraftReport:
    """Fit ``recipe``'s projector into ``folder`` and measure the answers of held-out questions from each cache.

    ``folder`` gets what :func:`kvgraft.fit.run.fit` leaves, ``graft.json`` and ``graft.md``.

    Raises:
        RecipeError: a direction or a layer map that leaves some student layer without a cache, or as ``fit``.
        GraftError: held-out text without prompts.
    """
    _require_graftable(recipe)
    fit(recipe, folder, resume=resume, overwrite=overwrite)
    if (folder / REPORT_FILE).is_file():
        logger.info("%s is finished and is not measured again", folder)
        return GraftReport.read(folder / REPORT_FILE)
    data = prepare_fit(recipe)
    layers = data.student.geometry.num_layers
    if list(data.train.student_layers) != list(range(layers)):
        raise RecipeError(
            f"alignment.layers gives a teacher layer to student layers {list(data.train.student_layers)}; a graft "
            f"needs one for each of 0..{layers - 1}, in order: use `ratio` or name them all"
        )
    projectors = {name: KVDimensionProjector.from_pretrained(folder / part) for name, part in _PROJECTORS.items()}
    statistics = data.train.student_store.statistics()
    questions = continuations(data, recipe.graft.texts)
    losses = cache_worth(
        data.student.load(),
        questions,
        projectors,
        data.teacher.recipe.name,
        (statistics.mean[:, 0], statistics.mean[:, 1]),
        recipe.graft.own_first_tokens,
    )
    report = GraftReport(
        name=recipe.name,
        seed=recipe.seed,
        teacher=data.teacher.recipe.name,
        student=str(recipe.student.model),
        steps=recipe.fit.steps,
        questions=len(questions),
        nats={name: loss.mean for name, loss in losses.items()},
        sums={name: loss.sums for name, loss in losses.items()},
        tokens=losses["own"].tokens,
    )
    write_graft(report, folder)
    return report


def _require_graftable(recipe: Recipe) -> None:
    if recipe.fit.direction != "teacher_to_student":
        raise RecipeError(
            "a graft needs the student's KV as the target; set fit.direction: teacher_to_student, or let the two "
            "models change places"
        )
