"""Fusion by adapters that read the student's own KV and the teacher's together, and change the student's own.

After Cache-to-Cache (arXiv 2510.03215), whose fuser reads both models' keys and values of a layer.
"""

from __future__ import annotations

from typing import Literal

import torch

from kvgraft.fit.data import FitData
from kvgraft.graft.grafter import Grafter
from kvgraft.graft.own import own_adapter_settings
from kvgraft.graft.pieces import common_width, in_widths
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.projector.sizing import adapter_parameters
from kvgraft.recipe import Recipe


def joint_grafter(recipe: Recipe, data: FitData, teacher_sources: list[list[int]]) -> Grafter:
    """Adapters that read each layer of the student's own KV and some of the teacher's; at first they change nothing.

    They have no more parameters than the control's, :func:`kvgraft.graft.own.own_grafter`, unless both are linear.

    Args:
        teacher_sources: for each student layer, the teacher layers that its adapters read.
    """
    own, teacher, name = data.student.geometry, data.teacher.geometry, data.teacher.recipe.name
    width = common_width(own, teacher)
    own_pieces, teacher_pieces = own.kv_dim // width, teacher.kv_dim // width
    first = own.num_layers * own_pieces
    sources = [
        _pieces_of([layer], own_pieces) + [first + piece for piece in _pieces_of(read, teacher_pieces)]
        for layer, read in enumerate(teacher_sources)
    ]
    kinds = 2 if recipe.fit.source_kinds == "both" else 1
    in_dim = kinds * width * len(sources[0]) * (1 + recipe.fit.context_tokens)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        projector = KVDimensionProjector(
            {name: {"d_model": width, "num_layers": first + teacher.num_layers * teacher_pieces}},
            own.kv_dim,
            _mlp_ratio(recipe, data, in_dim),
            recipe.projector.dropout,
            # With a linear part that is zero, and a bottleneck whose last layer is.
            "least_squares",
            sharing=recipe.projector.sharing,
            num_groups=recipe.projector.num_groups,
            layer_norm=recipe.projector.layer_norm,
            activation=recipe.projector.activation,
            source_layers={name: sources},
            source_kinds=recipe.fit.source_kinds,
            context_tokens=recipe.fit.context_tokens,
        )
    of_teacher, of_own = data.train.statistics()
    mean, deviation = (
        torch.cat([in_widths(part[:, :, None], width)[:, :, 0] for part in parts], 1)
        for parts in zip(of_own.standard(), of_teacher.standard(), strict=True)
    )
    projector.standardise_inputs(name, mean, deviation)
    # A change has no mean to add.
    projector.standardise_outputs(name, torch.zeros(2, own.num_layers, own.kv_dim), of_own.layer_deviations())
    return Grafter(projector, name, own.num_kv_heads, recipe.graft.own_first_tokens, "joint")


def _pieces_of(layers: list[int], pieces: int) -> list[int]:
    return [layer * pieces + piece for layer in layers for piece in range(pieces)]


def _mlp_ratio(recipe: Recipe, data: FitData, in_dim: int) -> float | Literal["linear"]:
    """The hidden width, over ``in_dim``, with which an adapter is as large as the control's."""
    out_dim = data.student.geometry.kv_dim
    control_dim, ratio = own_adapter_settings(recipe, out_dim, data.teacher.geometry.kv_dim)
    if ratio == "linear":
        return ratio
    norm = recipe.projector.layer_norm
    size = adapter_parameters(control_dim, out_dim, ratio, skip=True, layer_norm=norm)
    without_hidden = adapter_parameters(in_dim, out_dim, 0.0, skip=True, layer_norm=norm)
    hidden = 1 + (size - without_hidden) // (in_dim + out_dim + 1)
    # Half a unit more, so that dividing does not lose one.
    return (max(hidden, 1) + 0.5) / in_dim
