"""The control that a graft is judged by: the same adapters, reading the student's own KV.

What they gain when they are trained is what tuning the student to the text gives, and did not come from the teacher.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from kvgraft.distill.dataset import TeacherSource
from kvgraft.fit.closed_form import fit_closed_form
from kvgraft.fit.data import FitData, PairDataset
from kvgraft.fit.run import build_projector, start_from_closed_form
from kvgraft.graft.grafter import Grafter
from kvgraft.projector.sizing import auto_mlp_ratio
from kvgraft.recipe import Recipe

# The map that is sought is the identity, for which no ridge is needed.
_RIDGE = 1e-6


def student_as_its_own_teacher(data: FitData) -> FitData:
    """``data`` with the student's stored KV on both sides."""
    layers = list(range(data.student.geometry.num_layers))

    def own(pairs: PairDataset) -> PairDataset:
        teacher = pairs.teacher
        source = TeacherSource(
            data.student.recipe.name, pairs.student_store, layers, teacher.policy, teacher.skip_first_tokens
        )
        return replace(pairs, teacher=source)

    return replace(
        data,
        teacher=data.student,
        layer_map=[(layer, layer) for layer in layers],
        train=own(data.train),
        held_out=own(data.held_out),
    )


def own_grafter(recipe: Recipe, own: FitData, teacher_kv_dim: int) -> Grafter:
    """Adapters as the recipe's, with as many hidden units and source layers, started at what changes nothing.

    Args:
        own: as :func:`student_as_its_own_teacher` gives it.
        teacher_kv_dim: width of the KV that the recipe's adapters read.
    """
    geometry, name = own.student.geometry, own.teacher.recipe.name
    _, ratio = own_adapter_settings(recipe, geometry.kv_dim, teacher_kv_dim)
    sources = [_nearest(layer, geometry.num_layers, recipe.fit.sources) for layer in range(geometry.num_layers)]
    linear = build_projector(recipe, own, sources, "linear")
    fit_closed_form(linear, name, own.train, ridge=_RIDGE)
    projector = build_projector(recipe, own, sources, ratio)
    start_from_closed_form(projector, linear, name)
    return Grafter(projector, name, geometry.num_kv_heads, recipe.graft.own_first_tokens)


def own_adapter_settings(recipe: Recipe, kv_dim: int, teacher_kv_dim: int) -> tuple[int, float | Literal["linear"]]:
    """``in_dim`` and ``mlp_ratio`` of the adapters of :func:`own_grafter`, for a student of ``kv_dim``."""
    kinds = 2 if recipe.fit.source_kinds == "both" else 1
    ratio = recipe.projector.mlp_ratio
    if ratio == "auto":
        ratio = auto_mlp_ratio(teacher_kv_dim)
    if ratio != "linear":
        ratio *= teacher_kv_dim / kv_dim
    return kinds * recipe.fit.sources * kv_dim * (1 + recipe.fit.context_tokens), ratio


def _nearest(layer: int, num_layers: int, count: int) -> list[int]:
    return sorted(range(num_layers), key=lambda other: (abs(other - layer), other))[:count]
