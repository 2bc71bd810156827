"""``kvgraft fit``: from a recipe to a projector between two frozen models, and what it is worth."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from kvgraft.distill.checkpoints import CHECKPOINTS_FOLDER
from kvgraft.errors import RecipeError
from kvgraft.fit.closed_form import ClosedForm, fit_closed_form
from kvgraft.fit.data import FitData, PairDataset, prepare_fit, require_all_layers
from kvgraft.fit.measure import Fit, measure_fits
from kvgraft.fit.scan import Scan, scan_layers
from kvgraft.fit.train import RegressionModel, key_metric_from, train_projector
from kvgraft.graft.grafter import Grafter
from kvgraft.graft.objectives import train_on_continuations
from kvgraft.graft.questions import Questions
from kvgraft.models.attention import read_attention
from kvgraft.progress import progress_bar
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.projector.settings import teacher_config_from
from kvgraft.projector.sharing import parameters_by_sharing
from kvgraft.recipe import Recipe
from kvgraft.report.fit import FewerLayers, FitReport, LayerFit, write_fit
from kvgraft.run import open_run_folder, require_same_inputs
from kvgraft.store.format import text_fingerprint

logger = logging.getLogger(__name__)

PROJECTOR_FOLDER, LEAST_SQUARES_FOLDER, REPORT_FILE = "projector", "least_squares", "fit.json"
CONTINUATION_FOLDER = "continuation"
# Texts on which queries are looked at, and held-out texts on which attention is compared.
_QUERY_TEXTS, _ATTENTION_TEXTS = 32, 30
# Held-out tokens that are looked at while training.
_EVALUATION_TOKENS = 2048


def fit(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    check: Callable[[FitData], None] | None = None,
) -> FitReport:
    """Fit ``recipe``'s projector and leave it in ``folder`` with a report.

    ``folder`` gets ``recipe.yaml``, ``projector`` and ``least_squares`` (the closed form alone), ``fit.json``,
    ``fit.md``, ``layers.png`` (what each layer predicts of each) and ``fit.png`` (each layer's R2).

    Args:
        folder: the run's own.
        resume: go on with what is there.
        overwrite: start over, removing what is there.
        check: shown what is fitted on, to refuse it before any of the work.

    Raises:
        RecipeError: the folder exists and neither was asked for, or the recipe cannot be fitted.
        TrainingInterruptedError: Ctrl-C; a checkpoint was left.
    """
    _require_fittable(recipe)
    open_run_folder(recipe, folder, resume, overwrite)
    if (folder / REPORT_FILE).is_file():
        logger.info("%s is finished and is not fitted again", folder)
        return FitReport.read(folder / REPORT_FILE)
    data = prepare_fit(recipe)
    if check is not None:
        check(data)
    require_same_inputs(folder, inputs_of(data))
    phases, teacher = data.phases, data.teacher.recipe.name
    with phases.timed("scan layers"):
        scan = scan_layers(
            replace(data.train, context_tokens=0), recipe.fit.sources, recipe.fit.scan_tokens, recipe.seed
        )
    if recipe.fit.objective == "attention":
        with phases.timed("read attention"):
            data = replace(data, train=_weighted_by_attention(data))
    sources = chosen_sources(recipe, data, scan)
    linear, projector = (build_projector(recipe, data, sources, ratio) for ratio in ("linear", None))
    fewer = _from_fewer_layers(recipe, data, sources)
    with phases.timed("least squares"):
        closed_form = _closed_form(recipe, linear, data, list(fewer.values()))
    start_from_closed_form(projector, linear, teacher)
    linear.save_pretrained(folder / LEAST_SQUARES_FOLDER)
    for count, smaller in fewer.items():
        smaller.save_pretrained(folder / fewer_layers_folder(count))
    if recipe.fit.steps:
        held_out = data.held_out.rows(_EVALUATION_TOKENS)
        with phases.timed("train"):
            model = RegressionModel(projector, teacher, _key_metric(recipe, data), held_out)
            train_projector(model, recipe.fit, data.train, folder, recipe.seed)
    if recipe.fit.objective == "continuation":
        with phases.timed("train on continuations"):
            _train_on_continuations(recipe, data, projector, folder / CONTINUATION_FOLDER)
    projector.save_pretrained(folder / PROJECTOR_FOLDER)
    with phases.timed("measure"):
        student = data.student.load() if recipe.fit.direction == "teacher_to_student" else None
        measured = {"least squares": linear, "projector": projector}
        measured |= {fewer_layers_name(count): smaller for count, smaller in fewer.items()}
        fits = measure_fits(measured, teacher, data.held_out, student, _ATTENTION_TEXTS)
    report = _report(recipe, data, scan, sources, closed_form, projector, fits)
    write_fit(report, scan, folder)
    for trained in (folder, folder / CONTINUATION_FOLDER):
        shutil.rmtree(trained / CHECKPOINTS_FOLDER, ignore_errors=True)
    return report


def inputs_of(data: FitData) -> dict[str, str]:
    """What the recipe names and does not hold: digests of the text and of both models."""
    texts = {"training text": data.train.texts, "held-out text": data.held_out.texts}
    return {
        **{name: text_fingerprint(text.sample_key for text in read) for name, read in texts.items()},
        f"teacher {data.teacher.recipe.name}": data.teacher.fingerprint,
        "student": data.student.fingerprint,
    }


def fewer_layers_folder(count: int) -> str:
    """Where least squares from the first ``count`` source layers is kept."""
    return f"{LEAST_SQUARES_FOLDER}_{count}"


def fewer_layers_name(count: int) -> str:
    """What least squares from the first ``count`` source layers is called in reports."""
    return f"least squares, {count} layer{'' if count == 1 else 's'}"


def chosen_sources(recipe: Recipe, data: FitData, scan: Scan) -> list[list[int]]:
    """Source layers that each target layer reads: the mapped one, or the best of the scan."""
    if recipe.fit.sources > 1:
        return scan.chosen
    forwards = recipe.fit.direction == "teacher_to_student"
    return [[teacher if forwards else student] for student, teacher in data.layer_map]


def build_projector(
    recipe: Recipe, data: FitData, sources: list[list[int]], mlp_ratio: Any = None
) -> KVDimensionProjector:
    """The recipe's projector between the two models, standardised by what their stores keep; the same at every call.

    Args:
        sources: for each target layer, the source layers that it reads.
        mlp_ratio: default the recipe's.
    """
    settings, name = recipe.projector, data.teacher.recipe.name
    config = {**teacher_config_from(data.teacher.config), "num_layers": data.train.num_source_layers}
    linear = mlp_ratio == "linear"
    # Layers that share a trunk have a linear part each.
    sharing = "per_layer" if linear and settings.sharing == "trunk" else settings.sharing
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        projector = KVDimensionProjector(
            {name: config},
            data.student.geometry.kv_dim,
            settings.mlp_ratio if mlp_ratio is None else mlp_ratio,
            settings.dropout,
            "least_squares" if linear else settings.init_method,
            sharing=sharing,
            num_groups=settings.num_groups,
            direction=recipe.fit.direction,
            layer_norm=settings.layer_norm,
            activation=settings.activation,
            skip=settings.skip,
            source_layers={name: sources},
            source_kinds=recipe.fit.source_kinds,
            context_tokens=recipe.fit.context_tokens,
        )
    source, target = data.train.statistics()
    projector.standardise_inputs(name, *source.standard())
    projector.standardise_outputs(name, target.standard()[0], target.layer_deviations())
    return projector


def start_from_closed_form(projector: KVDimensionProjector, linear: KVDimensionProjector, teacher: str) -> None:
    """Give ``projector`` the linear maps of ``linear`` where its ``init_method`` asks for them."""
    if projector.config["init_method"] != "least_squares":
        return
    for adapter, fitted in zip(projector.adapters(teacher), linear.adapters(teacher), strict=True):
        assert fitted.skip is not None
        adapter.load_linear(fitted.skip.weight.detach(), fitted.skip.bias.detach())


def _from_fewer_layers(recipe: Recipe, data: FitData, sources: list[list[int]]) -> dict[int, KVDimensionProjector]:
    """Linear projectors that read the first one, two and so on of ``sources``, where the recipe asks for them."""
    counts = range(1, recipe.fit.sources) if recipe.fit.fewer_sources else ()
    return {count: build_projector(recipe, data, [read[:count] for read in sources], "linear") for count in counts}


def _closed_form(
    recipe: Recipe, linear: KVDimensionProjector, data: FitData, fewer: list[KVDimensionProjector]
) -> ClosedForm:
    ridge = None if recipe.fit.ridge == "auto" else recipe.fit.ridge
    return fit_closed_form(linear, data.teacher.recipe.name, data.train, ridge=ridge, fewer=fewer)


def _weighted_by_attention(data: FitData) -> PairDataset:
    """The training texts, each token counted by how much the student's own attention reads it."""
    student, layers = data.student.load(), list(data.train.student_layers)
    weights = []
    with progress_bar("what the student's attention reads", len(data.train), "texts") as advance:
        for text in data.train.texts:
            received = read_attention(student, torch.tensor([text.input_ids])).received[layers]
            weights.append(received / received.mean(1, keepdim=True))
            advance(1)
    return replace(data.train, token_weights=weights)


def _train_on_continuations(recipe: Recipe, data: FitData, projector: KVDimensionProjector, folder: Path) -> None:
    require_all_layers(data)
    train_on_continuations(
        Grafter(projector, data.teacher.recipe.name, data.student.geometry.num_kv_heads, recipe.graft.own_first_tokens),
        data.student.load(),
        Questions(data.train, data.examples),
        Questions(data.held_out, data.held_out_examples),
        recipe.fit.continuation,
        folder,
        recipe.seed,
        "training on what follows",
    )


def _key_metric(recipe: Recipe, data: FitData) -> Tensor | None:
    if recipe.fit.metric == "plain":
        return None
    student, pairs = data.student.load(), data.train
    texts = pairs.texts[:_QUERY_TEXTS]
    moments = [read_attention(student, torch.tensor([text.input_ids])).query_moments for text in texts]
    return key_metric_from(torch.stack(moments).mean(0), pairs.student_layers)


def _require_fittable(recipe: Recipe) -> None:
    if recipe.fit.direction == "student_to_teacher" and (
        recipe.fit.objective != "regression" or recipe.fit.metric != "plain"
    ):
        raise RecipeError(
            "fit.objective: attention or continuation, and fit.metric: queries, go by how the student reads its KV; "
            "with fit.direction: student_to_teacher the teacher's KV is predicted. Leave them out, or let the two "
            "models change places"
        )


def _report(
    recipe: Recipe,
    data: FitData,
    scan: Scan,
    sources: list[list[int]],
    closed_form: ClosedForm,
    projector: KVDimensionProjector,
    fits: dict[str, Fit],
) -> FitReport:
    forwards = recipe.fit.direction == "teacher_to_student"
    targets = [student if forwards else teacher for student, teacher in data.layer_map]
    linear, fitted = fits["least squares"], fits["projector"]
    layers = [
        LayerFit(
            layer=layer,
            sources=sources[index],
            keys_r2=fitted.keys_r2[index],
            values_r2=fitted.values_r2[index],
            least_squares_keys_r2=linear.keys_r2[index],
            least_squares_values_r2=linear.values_r2[index],
            attention_cosine=fitted.attention_cosine[index] if fitted.attention_cosine else None,
            least_squares_attention_cosine=linear.attention_cosine[index] if linear.attention_cosine else None,
        )
        for index, layer in enumerate(targets)
    ]
    return FitReport(
        name=recipe.name,
        seed=recipe.seed,
        teacher=data.teacher.recipe.name,
        student=str(recipe.student.model),
        direction=recipe.fit.direction,
        steps=recipe.fit.steps,
        tokens=closed_form.tokens,
        held_out_texts=len(data.held_out),
        alignment_coverage=data.alignment.coverage,
        alignment_mean_span=data.alignment.mean_span,
        alignment_dropped=dict(data.alignment.dropped),
        parameters=projector.count_parameters(),
        sharing=projector.sharing,
        parameters_by_sharing=parameters_by_sharing(projector),
        layers=layers,
        fewer_layers={
            name: FewerLayers(keys_r2=mean(found.keys_r2), values_r2=mean(found.values_r2))
            for name, found in fits.items()
            if name not in ("least squares", "projector")
        },
        suggested_layers=scan.suggested_layers(data.layer_map, recipe.fit.direction),
        seconds=dict(data.phases.seconds),
    )
