"""The projector-free loss: tokens of the student's KV should stand to each other as the teacher's tokens do.

Wang et al. 2020, MiniLMv2 (arXiv 2012.15828): scaled products between the tokens of one layer, a softmax over each row,
and the divergence of the student's rows from the teacher's. Rows have one entry for each token whatever the width, so
nothing has to be projected. Here the relations are those of keys with keys and of values with values, each row over the
tokens up to its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kvgraft.distill.losses import KVScale, normalised_layer_weights
from kvgraft.errors import KVGraftError
from kvgraft.kv import KV


def relation_errors(
    student: KV,
    teacher: KV,
    student_scale: KVScale,
    teacher_scale: KVScale,
    *,
    relation_heads: int,
    keys_weight: float = 1.0,
    values_weight: float = 1.0,
    layer_weights: Sequence[float] | None = None,
) -> Tensor:
    """Divergence of each token's relations, in the order of ``teacher.mask``'s true entries: ``[real tokens]``.

    A token's relations are with itself and the true tokens of ``teacher.mask`` before it. Means over relation heads,
    layers, and keys and values.

    Args:
        student: ``[batch, layers, heads, tokens, head_dim]``, the compared layers.
        teacher: the same layers and tokens, with heads of its own.
        student_scale, teacher_scale: fixed centre and spread of each. Unlike the paper's vectors, cached keys have
            channels whose mean is many times their spread; without the centre every row of relations would be alike.
        relation_heads: pieces into which the joined heads are cut, in both models alike.

    Raises:
        KVGraftError: ``relation_heads`` does not divide both widths.
    """
    require_relation_heads(relation_heads, student.geometry.kv_dim, teacher.geometry.kv_dim)
    mask = teacher.mask
    tokens = mask.shape[1]
    student_scale, teacher_scale = student_scale.to(mask.device), teacher_scale.to(mask.device)
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    related = (causal & mask[:, None, :])[:, None]
    layers = normalised_layer_weights(layer_weights, student.keys.shape[1], mask.device)
    total = torch.zeros(mask.shape, device=mask.device)
    sides = zip(student.flatten(), teacher.flatten(), (keys_weight, values_weight), strict=True)
    for kind, (own, target, weight) in enumerate(sides):
        if weight == 0:
            continue
        for layer, layer_weight in enumerate(layers):
            error = checkpoint(
                # The matrices of all layers at once would dwarf everything else that backward keeps.
                _divergence,
                _standard(own[:, layer], student_scale, kind, layer),
                _standard(target[:, layer], teacher_scale, kind, layer),
                related,
                relation_heads,
                use_reentrant=False,
            )
            total = total + weight * layer_weight * error
    return total[mask] / (keys_weight + values_weight)


def require_relation_heads(relation_heads: int, student_width: int, teacher_width: int) -> None:
    """Raise KVGraftError where one of the widths cannot be cut into ``relation_heads`` pieces."""
    if student_width % relation_heads or teacher_width % relation_heads:
        smaller = min(student_width, teacher_width)
        fitting = [n for n in range(1, smaller + 1) if student_width % n == 0 and teacher_width % n == 0]
        raise KVGraftError(
            f"kv_loss.relation_heads {relation_heads} does not divide the student's KV width {student_width} and the "
            f"teacher's {teacher_width}; use one of {fitting}"
        )


def _divergence(student: Tensor, teacher: Tensor, related: Tensor, heads: int) -> Tensor:
    """KL of each token's row, the teacher's from the student's, mean over heads: ``[batch, tokens]``."""
    own, target = _log_relations(student, related, heads), _log_relations(teacher, related, heads)
    return functional.kl_div(own, target, reduction="none", log_target=True).sum(-1).mean(1)


def _log_relations(states: Tensor, related: Tensor, heads: int) -> Tensor:
    """Logarithms of relations ``[batch, heads, tokens, tokens]`` of ``states [batch, tokens, width]``."""
    split = states.reshape(*states.shape[:-1], heads, -1).transpose(1, 2)
    products = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
    # A finite floor: a row without any related token stays free of NaN, forwards and backwards.
    return products.masked_fill(~related, torch.finfo(products.dtype).min).log_softmax(-1)


def _standard(states: Tensor, scale: KVScale, kind: int, layer: int) -> Tensor:
    return (states.float() - scale.mean[kind, layer]) / scale.deviation[kind, layer]
