"""How far one KV is from another: the losses between a student's KV and what its teachers say it should be.

Every loss is a sum over real tokens divided by ``num_tokens``, so that accumulating micro-batches or processes gives
the gradient of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvgraft.errors import KVGraftError
from kvgraft.kv import KV

LossForm = Literal["mse", "l1", "smooth_l1", "cosine"]
KVPair = KV | tuple[Tensor, Tensor]

# Each form maps predicted and target ``[tokens, layers, kv_dim]`` to ``[tokens, layers]``.
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda predicted, target: F.mse_loss(predicted, target, reduction="none").mean(-1),
    "l1": lambda predicted, target: (predicted - target).abs().mean(-1),
    "smooth_l1": lambda predicted, target: F.smooth_l1_loss(predicted, target, reduction="none").mean(-1),
    "cosine": lambda predicted, target: 1 - F.cosine_similarity(predicted, target, dim=-1),
}


@dataclass(frozen=True)
class KVScale:
    """Centre and spread of a target, fixed before training, so that every layer weighs the same.

    Attributes:
        mean: ``[2, layers, kv_dim]``, keys first.
        deviation: ``[2, layers]``, root of the channels' mean variance (first-measurements.md: "mean squared error
            over the mean variance of the target").
    """

    mean: Tensor
    deviation: Tensor

    def to(self, device: torch.device) -> KVScale:
        """The same numbers on ``device``."""
        return KVScale(self.mean.to(device), self.deviation.to(device))

    @classmethod
    def from_moments(cls, mean: Tensor, variance: Tensor) -> KVScale:
        """From per-channel ``mean`` and ``variance``, both ``[layers, 2, kv_dim]`` as a store keeps them."""
        floor = torch.finfo(torch.float32).tiny
        return cls(mean.transpose(0, 1), variance.mean(-1).clamp_min(floor).sqrt().transpose(0, 1))

    @classmethod
    def from_tokens(cls, pair: KVPair, mask: Tensor) -> KVScale:
        """From the real tokens (``mask [batch, tokens]``) of one KV, without gradient."""
        rows = [_real_tokens(tensor.detach(), mask) for tensor in _as_tensors(pair, "target")]
        mean = torch.stack([row.mean(0) for row in rows], 1)
        variance = torch.stack([row.var(0, unbiased=False) for row in rows], 1)
        scale = cls.from_moments(mean, variance)
        # A layer without any spread, of one token say, has no unit of its own.
        has_spread = variance.mean(-1).transpose(0, 1) > 0
        return cls(scale.mean, scale.deviation.where(has_spread, 1.0))


def kv_token_errors(
    predicted: KVPair,
    target: KVPair,
    mask: Tensor,
    *,
    scale: KVScale | None = None,
    form: LossForm = "mse",
    keys_weight: float = 1.0,
    values_weight: float = 1.0,
    layer_weights: Sequence[float] | None = None,
) -> Tensor:
    """Error of each real token, in the order of ``mask``'s true entries: ``[real tokens]``, float32.

    Means over layers and over keys and values. The arguments are those of :func:`kv_regression_loss`.
    """
    predicted_parts, target_parts = _as_tensors(predicted, "predicted"), _as_tensors(target, "target")
    _require_same_shape(predicted_parts, target_parts, mask)
    if form not in FORMS:
        raise KVGraftError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
    if not (min(keys_weight, values_weight) >= 0 and 0 < keys_weight + values_weight < float("inf")):
        raise KVGraftError(
            "keys_weight and values_weight must not be negative, and one must be above 0; got "
            f"{keys_weight} and {values_weight}"
        )
    scale = (scale or KVScale.from_tokens(target_parts, mask)).to(mask.device)
    layers = normalised_layer_weights(layer_weights, predicted_parts[0].shape[1], predicted_parts[0].device)
    total = predicted_parts[0].new_zeros(int(mask.sum()), dtype=torch.float32)
    for index, weight in enumerate((keys_weight, values_weight)):
        if weight == 0:
            continue
        centre, deviation = scale.mean[index], scale.deviation[index][:, None]
        error = FORMS[form](
            (_real_tokens(predicted_parts[index], mask) - centre) / deviation,
            (_real_tokens(target_parts[index], mask) - centre) / deviation,
        )
        total = total + weight * (error * layers).sum(-1)
    return total / (keys_weight + values_weight)


def kv_regression_loss(
    predicted: KVPair,
    target: KVPair,
    mask: Tensor,
    *,
    scale: KVScale | None = None,
    form: LossForm = "mse",
    keys_weight: float = 1.0,
    values_weight: float = 1.0,
    layer_weights: Sequence[float] | None = None,
    num_tokens: Tensor | int | None = None,
) -> Tensor:
    """Loss between ``predicted`` and ``target`` KV of one teacher: a scalar.

    Args:
        predicted: keys and values ``[batch, layers, tokens, kv_dim]``, or with heads, or a ``KV``.
        target: the same shape.
        mask: ``[batch, tokens]`` bool, true where the token counts.
        scale: centre and spread of the target; default: measured on this batch's real tokens.
        form: ``mse`` (default), ``l1``, ``smooth_l1`` or ``cosine``, on the scaled KV.
        keys_weight, values_weight: relative weights, their mean over keys and values is taken.
        layer_weights: relative weight of each layer, default equal.
        num_tokens: what to divide by; default the number of true entries of ``mask``. Give the count of the whole
            batch when it is split over accumulation steps or processes.
    """
    errors = kv_token_errors(
        predicted,
        target,
        mask,
        scale=scale,
        form=form,
        keys_weight=keys_weight,
        values_weight=values_weight,
        layer_weights=layer_weights,
    )
    return mean_error(errors, num_tokens)


def mean_error(errors: Tensor, num_tokens: Tensor | int | None = None) -> Tensor:
    """Sum of ``errors [real tokens]`` over ``num_tokens``, by default their own number; 0 where there is none."""
    count = len(errors) if num_tokens is None else num_tokens
    return errors.sum() / torch.as_tensor(count, device=errors.device).clamp_min(1)


def compute_kv_loss(
    student_kv: KVPair,
    aligned_kvs: Mapping[str, KVPair],
    *,
    mask: Tensor | None = None,
    scales: Mapping[str, KVScale] | None = None,
    teacher_weights: Mapping[str, float] | None = None,
    form: LossForm = "mse",
    keys_weight: float = 1.0,
    values_weight: float = 1.0,
    layer_weights: Sequence[float] | None = None,
    num_tokens: Tensor | int | None = None,
) -> Tensor:
    """The guide's ``compute_kv_loss``: the student's KV against every teacher's aligned KV, averaged by weight.

    Args:
        student_kv: keys and values ``[batch, layers, tokens, kv_dim]`` (or with heads, or a ``KV``).
        aligned_kvs: for each teacher, KV of the student's shape, as ``project_multi_teacher_kv`` returns it.
        mask: ``[batch, tokens]`` bool; default: for each teacher, where ``student_kv`` and its aligned KV both have a
            token, as far as they are a ``KV``, which brings its mask along.
        scales: for each teacher, the centre and spread of its aligned KV; default: measured on this batch.
        teacher_weights: relative weights, default equal.

    The other arguments are those of :func:`kv_regression_loss`.
    """
    if not isinstance(aligned_kvs, Mapping):
        raise KVGraftError(
            "aligned_kvs must be {name: (K, V)}, as project_multi_teacher_kv gives it, or {name: KV}; got "
            f"{type(aligned_kvs).__name__}"
        )
    if not aligned_kvs:
        raise KVGraftError("aligned_kvs is empty: give the projected KV of at least one teacher, {name: (K, V)}")
    weights = {name: (teacher_weights or {}).get(name, 1.0) for name in aligned_kvs}
    unknown = sorted(set(teacher_weights or {}) - set(aligned_kvs))
    if unknown:
        raise KVGraftError(f"teacher_weights names {unknown}; aligned_kvs holds {', '.join(aligned_kvs)}")
    if not (min(weights.values()) >= 0 and 0 < sum(weights.values()) < float("inf")):
        raise KVGraftError(f"teacher_weights must be positive in sum and none negative; got {weights}")
    losses = [
        weights[name]
        * kv_regression_loss(
            student_kv,
            aligned,
            _tokens_of_both(name, student_kv, aligned) if mask is None else mask,
            scale=(scales or {}).get(name),
            form=form,
            keys_weight=keys_weight,
            values_weight=values_weight,
            layer_weights=layer_weights,
            num_tokens=num_tokens,
        )
        for name, aligned in aligned_kvs.items()
    ]
    return torch.stack(losses).sum() / sum(weights.values())


def _as_tensors(pair: KVPair, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(pair, KV):
        return pair.flatten()
    if isinstance(pair, Tensor) or len(pair) != 2:
        raise KVGraftError(f"{name}: expected two tensors (keys, values) or one KV; got {type(pair).__name__}")
    keys, values = pair
    if keys.shape != values.shape:
        raise KVGraftError(f"{name}: keys {list(keys.shape)} and values {list(values.shape)} differ in shape")
    if keys.dim() == 5:
        return keys.transpose(2, 3).flatten(3), values.transpose(2, 3).flatten(3)
    if keys.dim() != 4:
        raise KVGraftError(
            f"{name}: expected [batch, layers, tokens, kv_dim] or [batch, layers, heads, tokens, head_dim]; "
            f"got {list(keys.shape)}"
        )
    return keys, values


def _real_tokens(tensor: Tensor, mask: Tensor) -> Tensor:
    """``[batch, layers, tokens, kv_dim]`` to ``[real tokens, layers, kv_dim]`` in float32.

    Padding is left out rather than multiplied by zero: a NaN there would survive the product.
    """
    return tensor.transpose(1, 2)[mask].float()


def _require_same_shape(predicted: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], mask: Tensor) -> None:
    if predicted[0].shape != target[0].shape:
        raise KVGraftError(
            f"student KV {list(predicted[0].shape)} and aligned teacher KV {list(target[0].shape)} differ; both must "
            "be [batch, layers, tokens, kv_dim]. Align tokens and layers and project the width first."
        )
    batch, _, tokens, _ = predicted[0].shape
    if mask.shape != (batch, tokens) or mask.dtype != torch.bool:
        # Numbers would be taken for indices of texts.
        raise KVGraftError(
            f"mask must be [{batch}, {tokens}] and bool to go with the KV; got {list(mask.shape)} and {mask.dtype}; "
            "of a tokenizer's attention_mask, give attention_mask.bool()"
        )


def normalised_layer_weights(
    layer_weights: Sequence[float] | None, num_layers: int, device: torch.device | None = None
) -> Tensor:
    """Weights ``[num_layers]`` that sum to one; None is equal weights."""
    if layer_weights is None:
        return torch.full((num_layers,), 1.0 / num_layers, device=device)
    if len(layer_weights) != num_layers or not (min(layer_weights) >= 0 and 0 < sum(layer_weights) < float("inf")):
        raise KVGraftError(
            f"layer_weights must hold {num_layers} weights with a positive sum, none negative; got {layer_weights}"
        )
    weights = torch.tensor(layer_weights, dtype=torch.float32, device=device)
    return weights / weights.sum()


def _tokens_of_both(teacher: str, student_kv: KVPair, aligned: KVPair) -> Tensor:
    """Where each of the two has a token that says so: ``[batch, tokens]`` bool."""
    held = [pair for pair in (student_kv, aligned) if isinstance(pair, KV)]
    if len({kv.rotated for kv in held}) > 1:
        raise KVGraftError(
            f"of the student's KV and the aligned KV of teacher {teacher!r} one has rotated keys and one has not; "
            "capture both with rotated=False"
        )
    if not held:
        keys, _ = _as_tensors(student_kv, "predicted")
        return torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
    fitting = [kv.mask for kv in held if kv.mask.shape == held[0].mask.shape]  # others are refused with their shapes
    return torch.stack(fitting).all(0)
