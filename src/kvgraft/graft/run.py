"""``kvgraft graft``: fit the projector, then measure what the projected cache is worth to the student."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path

import torch

from kvgraft.distill.checkpoints import CHECKPOINTS_FOLDER
from kvgraft.errors import GraftError, RecipeError
from kvgraft.fit.data import FitData, prepare_fit, require_all_layers
from kvgraft.fit.run import (
    LEAST_SQUARES_FOLDER,
    PROJECTOR_FOLDER,
    fewer_layers_folder,
    fewer_layers_name,
    fit,
    inputs_of,
)
from kvgraft.graft.first_token import first_token
from kvgraft.graft.grafter import SETTINGS_FILE, Fusion, Grafter
from kvgraft.graft.joint import joint_grafter
from kvgraft.graft.objectives import train_on_continuations
from kvgraft.graft.own import own_grafter, student_as_its_own_teacher
from kvgraft.graft.questions import Questions
from kvgraft.graft.worth import Measured, cache_worth, teacher_alone
from kvgraft.models.cache import require_cache_support
from kvgraft.models.loading import load_config, model_without_weights
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.projector.saving import read_config
from kvgraft.recipe import Recipe, load_recipe
from kvgraft.report.graft import CONTROL, FirstToken, GraftReport, write_graft
from kvgraft.report.results import RECIPE_FILE
from kvgraft.run import require_same_inputs

logger = logging.getLogger(__name__)

REPORT_FILE = "graft.json"
_TRAINED = {
    "continuation": "trained on answers",
    "own": CONTROL,
    "gated": "mixed into the student's own by gates",
    "both": "in front of the student's own",
    "joint": "the student's own, changed by adapters that read both",
}
_FUSIONS: dict[str, Fusion] = {"continuation": "none", "gated": "gated", "both": "both"}


def graft(recipe: Recipe, folder: Path, *, resume: bool = False, overwrite: bool = False) -> GraftReport:
    """Fit ``recipe``'s projector into ``folder`` and measure the answers of held-out questions from each cache.

    ``folder`` gets what :func:`kvgraft.fit.run.fit` leaves, a folder for each graft of ``graft.trained``,
    ``graft.json``, ``graft.md`` and ``graft.png``. Resumed with other settings in ``recipe.graft``, what is fitted and
    trained there already is kept and measured again.

    Raises:
        RecipeError: a direction or a layer map that leaves some student layer without a cache, or as ``fit``.
        GraftError: a student that cannot take a cache, text without prompts, held-out questions that are all the same,
            or caches beyond the student's context.
        TrainingInterruptedError: Ctrl-C; a checkpoint was left.
    """
    _require_graftable(recipe)
    if resume:
        _forget_other_measurement(recipe, folder)
    fit(recipe, folder, resume=resume, overwrite=overwrite, check=partial(_require_questions, recipe))
    if (folder / REPORT_FILE).is_file():
        logger.info("%s is finished and is not measured again", folder)
        return GraftReport.read(folder / REPORT_FILE)
    data = prepare_fit(recipe)
    require_same_inputs(folder, inputs_of(data))
    # Again: a fit that was there already may have been asked for without them.
    _require_questions(recipe, data)
    name = data.teacher.recipe.name
    questions = _held_out(recipe, data)
    fitted = [
        Measured(label, _fitted_grafter(recipe, data, folder / part), questions)
        for label, part in _fitted(recipe, folder).items()
    ]
    measured = list(fitted)
    for kind in recipe.graft.trained:
        seen = student_as_its_own_teacher(data) if kind == "own" else data
        grafter = trained_grafter(recipe, data, kind, folder)
        measured.append(Measured(_trained_name(recipe, kind), grafter, _held_out(recipe, seen)))
    if recipe.graft.bf16:
        for item in measured:
            item.grafter.projector.compute_in(torch.bfloat16)
    statistics = data.train.student_store.statistics()
    losses = cache_worth(
        data.student.load(),
        questions,
        measured,
        (statistics.mean[:, 0], statistics.mean[:, 1]),
        recipe.graft.own_first_tokens,
        recipe.graft.layer_groups,
    )
    alone = teacher_alone(data.teacher.load(), data.teacher.tokenizer, questions)
    if alone is not None:
        losses[f"{name} alone"] = alone
    report = GraftReport(
        name=recipe.name,
        seed=recipe.seed,
        teacher=name,
        student=str(recipe.student.model),
        steps=recipe.fit.steps,
        continuation_steps=recipe.fit.continuation.steps,
        questions=len(questions),
        question_tokens=questions.lengths(),
        nats={cache: loss.mean for cache, loss in losses.items()},
        sums={cache: loss.sums for cache, loss in losses.items()},
        tokens=losses["own"].tokens,
        parameters={item.name: item.grafter.projector.count_parameters() for item in measured},
        bytes_per_token={
            f"KV of {name}, all layers, as stored": data.train.teacher.store.bytes_per_token,
            "the student's own KV, as stored": data.train.student_store.bytes_per_token,
        },
        bf16=recipe.graft.bf16,
        first_token=_first_token(recipe, data, fitted) if recipe.graft.first_token else None,
        seconds=dict(data.phases.seconds),
    )
    write_graft(report, folder)
    return report


def _forget_other_measurement(recipe: Recipe, folder: Path) -> None:
    """Remove the report of the same run that was measured with other settings of ``recipe.graft``."""
    report, written = folder / REPORT_FILE, folder / RECIPE_FILE
    if report.is_file() and written.is_file():
        earlier = load_recipe(written)
        if earlier.fingerprint() == recipe.fingerprint() and earlier.graft != recipe.graft:
            logger.info("%s was measured with other settings of graft and is measured again", folder)
            report.unlink()


def trained_grafter(recipe: Recipe, data: FitData, kind: str, folder: Path) -> Grafter:
    """The graft ``kind`` of ``graft.trained``, trained from the projector in ``folder``, or read if it is there."""
    place = folder / kind
    if (place / SETTINGS_FILE).is_file():
        return Grafter.from_pretrained(place)
    seen = student_as_its_own_teacher(data) if kind == "own" else data
    if kind == "own":
        grafter = own_grafter(recipe, seen, data.teacher.geometry.kv_dim)
    elif kind == "joint":
        sources = read_config(folder / PROJECTOR_FOLDER)["source_layers"][data.teacher.recipe.name]
        grafter = joint_grafter(recipe, data, sources)
    else:
        grafter = _fitted_grafter(recipe, data, folder / PROJECTOR_FOLDER, _FUSIONS[kind])
    with data.phases.timed(f"train {kind}"):
        train_on_continuations(
            grafter,
            data.student.load(),
            Questions(seen.train, seen.examples),
            _held_out(recipe, seen),
            recipe.fit.continuation,
            place,
            recipe.seed,
            f"training {kind}",
        )
    grafter.save_pretrained(place)
    shutil.rmtree(place / CHECKPOINTS_FOLDER, ignore_errors=True)
    return grafter


def _first_token(recipe: Recipe, data: FitData, fitted: list[Measured]) -> FirstToken:
    with data.phases.timed("time the first token"):
        return first_token(
            data.student,
            data.teacher,
            {item.name: item.grafter.projector for item in fitted},
            " ".join(example.text for example in [*data.held_out_examples, *data.examples]),
            recipe.graft.first_token,
            recipe.store,
            policy=data.train.teacher.policy,
            own_first_tokens=recipe.graft.own_first_tokens,
        )


def _fitted_grafter(recipe: Recipe, data: FitData, folder: Path, fusion: Fusion = "none") -> Grafter:
    projector = KVDimensionProjector.from_pretrained(folder)
    heads = data.student.geometry.num_kv_heads
    return Grafter(projector, data.teacher.recipe.name, heads, recipe.graft.own_first_tokens, fusion)


def _fitted(recipe: Recipe, folder: Path) -> dict[str, str]:
    """The folders of what was fitted, by the names they have in the report."""
    found = {"least squares": LEAST_SQUARES_FOLDER}
    if recipe.fit.steps > 0 or recipe.fit.objective == "continuation":
        found["projector"] = PROJECTOR_FOLDER
    counts = [count for count in range(1, recipe.fit.sources) if (folder / fewer_layers_folder(count)).is_dir()]
    return found | {fewer_layers_name(count): fewer_layers_folder(count) for count in counts}


def _trained_name(recipe: Recipe, kind: str) -> str:
    """The name in the report of the graft ``kind`` of ``graft.trained``."""
    if kind == "continuation" and recipe.fit.continuation.target == "own_reading":
        return "trained towards the student's own reading"
    return _TRAINED[kind]


def _held_out(recipe: Recipe, data: FitData) -> Questions:
    return Questions(data.held_out, data.held_out_examples, recipe.graft.texts)


def _require_questions(recipe: Recipe, data: FitData) -> None:
    """Raise where nothing could be measured or trained on in the end, whatever is fitted."""
    require_all_layers(data)
    twice = "both" in recipe.graft.trained
    reaches = _held_out(recipe, data).reaches(twice=twice, with_another=True)
    if recipe.graft.trained:
        reaches += Questions(data.train, data.examples).reaches(twice=twice, with_another=False)
    context = data.student.context
    if context is not None and max(reaches) > context:
        taken, way_out = "the cache of a question and an answer", "lower data.max_length"
        if twice:
            taken = "the cache of a question, the question itself after it and an answer"
            way_out = f"{way_out}, or leave both out of graft.trained"
        raise GraftError(f"{taken} take {max(reaches)} tokens, and the student's context is {context}; {way_out}")


def _require_graftable(recipe: Recipe) -> None:
    if recipe.data.chat_template != "student":
        raise RecipeError("a graft goes on in the middle of one text; set data.chat_template: student")
    if recipe.fit.direction != "teacher_to_student":
        raise RecipeError(
            "a graft needs the student's KV as the target; set fit.direction: teacher_to_student, or let the two "
            "models change places"
        )
    if recipe.student.model is not None:
        # Now, and not behind hours of fitting.
        config = load_config(recipe.student.model, recipe.student.revision)
        require_cache_support(model_without_weights(config))
