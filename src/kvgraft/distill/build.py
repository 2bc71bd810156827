"""A student and its projector, ready to train: adapters by the recipe, targets scaled, first weights fitted."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from kvgraft.distill.dataset import DistillationCollator, DistillationDataset, TeacherSource
from kvgraft.distill.logit_part import LogitPart
from kvgraft.distill.losses import KVScale
from kvgraft.distill.model import DistillationModel
from kvgraft.distill.objectives import projector_direction
from kvgraft.distill.relations import require_relation_heads
from kvgraft.kv import KV
from kvgraft.models.capture import capture
from kvgraft.models.evaluation_mode import evaluation_mode
from kvgraft.models.geometry import kv_geometry
from kvgraft.projector.closed_form import LeastSquares, solve_with_chosen_ridge
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import KVLossRecipe, Recipe

# See the controls in docs/results.md (SPEC R6).
_HARMFUL_OBJECTIVES = ("shared", "alternating")
_CALIBRATION_TEXTS = 128
_CALIBRATION_BATCH = 8
# One batch in so many chooses the ridge strength; afterwards it is fitted on like the others.
_HELD_OUT_EVERY = 4

logger = logging.getLogger(__name__)

LayerMaps = Mapping[str, list[tuple[int, int]]]


def build_projector(
    recipe: Recipe, objective: str, student_kv_dim: int, teacher_configs: Mapping[str, dict[str, int]]
) -> KVDimensionProjector:
    """The recipe's adapters for ``objective``, the same at every call.

    ``teacher_configs`` are as :class:`KVDimensionProjector` takes them, with the number of compared layers.
    """
    settings = recipe.projector
    fitted = objective == "teacher_to_student"
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return KVDimensionProjector(
            teacher_configs,
            student_kv_dim,
            settings.mlp_ratio,
            settings.dropout,
            settings.init_method,
            trainable=not fitted,
            sharing=settings.sharing,
            num_groups=settings.num_groups,
            direction=projector_direction(objective),
            layer_norm=settings.layer_norm,
            activation=settings.activation,
            # The closed-form map enters through the linear part.
            skip=settings.skip or fitted,
        )


def build_distillation(
    recipe: Recipe,
    student: PreTrainedModel,
    loss: KVLossRecipe,
    layer_maps: LayerMaps,
    teacher_configs: Mapping[str, dict[str, int]],
    train: DistillationDataset,
    collator: DistillationCollator,
    logits: LogitPart | None = None,
) -> DistillationModel:
    """Student and projector; without ``layer_maps`` the student alone. ``logits`` adds the logit part of the loss.

    The target of ``student_to_teacher`` is the teacher's KV, whose centre and spread its source knows. The other
    objectives move the student's KV: they are scaled by what it is before training, once, so that the scale neither
    follows a student that shrinks nor depends on how a batch is split. ``relational`` takes both scales and no
    projector.
    """
    teacher_weights = {teacher.name: 1.0 if teacher.weight is None else teacher.weight for teacher in recipe.teachers}
    if not layer_maps:
        return DistillationModel(student, loss=loss, teacher_weights=teacher_weights, logits=logits)
    if loss.objective in _HARMFUL_OBJECTIVES:
        logger.warning(
            "objective %s trains the projector and the student on each other; measured, such training left the student "
            "1.1 to 1.4 nats worse than no KV at all (docs/results.md). student_to_teacher is what helps.",
            loss.objective,
        )
    student_width = kv_geometry(student.config).kv_dim
    if loss.objective == "relational":
        for source in train.sources:
            require_relation_heads(loss.relation_heads, student_width, source.store.identity.geometry.kv_dim)
        pairs = _initial_kv(student, layer_maps, train, collator)
        return DistillationModel(
            student,
            layer_maps=dict(layer_maps),
            scales={source.name: _stored_scale(source) for source in train.sources},
            student_scales={name: KVScale.from_tokens(*_joined(pairs, name)) for name in layer_maps},
            loss=loss,
            teacher_weights=teacher_weights,
            logits=logits,
        )
    projector = build_projector(recipe, loss.objective, student_width, teacher_configs)
    _freeze_what_no_loss_reaches(projector, loss)
    if loss.objective == "student_to_teacher":
        scales = {source.name: _stored_scale(source) for source in train.sources}
        for name, scale in scales.items():
            projector.standardise_outputs(name, scale.mean, scale.deviation)
            if recipe.projector.init_method == "identity":
                _start_as_identity(projector, name, scale)
        if recipe.projector.init_method == "least_squares":
            _fit_closed_form(projector, _initial_kv(student, layer_maps, train, collator))
    else:
        pairs = _initial_kv(student, layer_maps, train, collator)
        scales = {name: KVScale.from_tokens(*_joined(pairs, name)) for name in layer_maps}
        if loss.objective == "teacher_to_student" or recipe.projector.init_method == "least_squares":
            _fit_closed_form(projector, pairs)
    return DistillationModel(
        student,
        projector,
        layer_maps=dict(layer_maps),
        scales=scales,
        loss=loss,
        teacher_weights=teacher_weights,
        logits=logits,
    )


def _start_as_identity(projector: KVDimensionProjector, name: str, scale: KVScale) -> None:
    """Let the adapters give back what comes in although their outputs are in units of the target."""
    for kind, adapter in enumerate(projector.adapters(name)):
        deviation = scale.deviation[kind][:, None]
        adapter.load_linear(torch.eye(adapter.in_dim) / deviation[..., None], -scale.mean[kind] / deviation)


def _freeze_what_no_loss_reaches(projector: KVDimensionProjector, loss: KVLossRecipe) -> None:
    """Adapters of a kind that weighs nothing: data parallelism waits for the gradient of all that ask for one."""
    weights = (loss.keys_weight, loss.values_weight)
    for name in projector.teachers:
        for adapter, weight in zip(projector.adapters(name), weights, strict=True):
            if weight == 0:
                adapter.requires_grad_(False)


def _stored_scale(source: TeacherSource) -> KVScale:
    statistics = source.store.statistics(layers=source.teacher_layers)
    return KVScale.from_moments(statistics.mean, statistics.variance)


InitialKV = list[dict[str, tuple[KV, KV]]]


def _initial_kv(
    student: PreTrainedModel, layer_maps: LayerMaps, train: DistillationDataset, collator: DistillationCollator
) -> InitialKV:
    """For batches of calibration texts and each teacher: the untrained student's KV and the teacher's."""
    indices = range(min(_CALIBRATION_TEXTS, len(train)))
    loader: Iterable[dict[str, Any]] = DataLoader(
        torch.utils.data.Subset(train, indices), batch_size=_CALIBRATION_BATCH, collate_fn=collator
    )
    pairs: InitialKV = []
    # A new student comes with its dropout on, whose draws no seed has settled yet: a resumed run's would be others.
    with evaluation_mode(student):
        for batch in loader:
            kv = capture(student, batch["input_ids"], batch["attention_mask"]).to("cpu")
            pairs.append(
                {
                    name: (kv.select_layers([layer for layer, _ in layer_maps[name]]), target)
                    for name, target in batch["teacher_kv"].items()
                }
            )
    return pairs


def _joined(pairs: InitialKV, name: str) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """All calibration tokens of the student side of ``name`` as one text, and which of them count."""
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    masks = []
    for batch in pairs:
        own, target = batch[name]
        for part, found in zip(own.flatten(), (keys, values), strict=True):
            found.append(part.transpose(1, 2)[target.mask])
        masks.append(target.mask[target.mask])
    rows = [torch.cat(found).transpose(0, 1)[None] for found in (keys, values)]
    return (rows[0], rows[1]), torch.cat(masks)[None]


def _fit_closed_form(projector: KVDimensionProjector, pairs: InitialKV) -> None:
    forwards = projector.direction == "teacher_to_student"
    for name in projector.teachers:
        for kind, adapter in enumerate(projector.adapters(name)):
            fit, held_out = (LeastSquares(adapter.num_layers, adapter.in_dim, adapter.out_dim) for _ in range(2))
            for index, batch in enumerate(pairs):
                own, teachers = batch[name]
                source, target = (teachers, own) if forwards else (own, teachers)
                wanted = projector.targets_of(name, *target.flatten())
                chooses_ridge = index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
                (held_out if chooses_ridge else fit).add(source.flatten()[kind], wanted[kind], teachers.mask)
            adapter.load_linear(*(tensor.float() for tensor in solve_with_chosen_ridge(fit, held_out)))
