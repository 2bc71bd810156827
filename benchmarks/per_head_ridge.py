"""The published closed-form transfer, reimplemented to compare with: Heo et al. 2026, arXiv 2608.03893.

After its abstract: keys without their rotation; for every target head a ridge regression of its own, from the source
layers that predict this head best; keys from keys, values from values. Our least squares differs in that one map serves
all heads of a layer, that layers are chosen for what they add to each other, and that keys and values may both be read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvgraft.fit.data import PairDataset

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
_CHOOSING_EVERY = 10


@dataclass(frozen=True)
class HeadMaps:
    """What was found for keys or for values.

    Attributes:
        weights: ``[target layers, source channels, width]``, all layers' channels side by side; zero for what a head
            does not read. It maps source channels less ``mean`` and over ``deviation`` ``[source layers, width]`` to
            target channels less ``target_mean [target layers, width]``.
        r2: held out, the mean over target layers.
    """

    weights: Tensor
    mean: Tensor
    deviation: Tensor
    target_mean: Tensor
    r2: float


def per_head_ridge(train: PairDataset, held_out: PairDataset, top_k: int) -> tuple[HeadMaps, HeadMaps]:
    """The maps of keys and of values."""
    choosing = list(range(_CHOOSING_EVERY - 1, len(train), _CHOOSING_EVERY)) or [0]
    fitting = [index for index in range(len(train)) if index not in choosing] or [0]
    parts = train.subset(fitting), train.subset(choosing), held_out
    keys, values = (_maps_of(kind, *parts, top_k) for kind in (0, 1))
    return keys, values


def _maps_of(kind: int, fitting: PairDataset, choosing: PairDataset, held_out: PairDataset, top_k: int) -> HeadMaps:
    reference: dict[str, Tensor] = {}
    fitted, chosen, measured = (_products(pairs, kind, reference) for pairs in (fitting, choosing, held_out))
    weights = _weights(fitted, chosen, held_out[0].target.geometry.num_kv_heads, top_k)
    everything, out = torch.arange(weights.shape[1]), torch.arange(weights.shape[2])
    error = torch.stack([_error(weight, measured, everything, target, out) for target, weight in enumerate(weights)])
    return HeadMaps(
        weights,
        reference["mean"][:, 0],
        reference["deviation"][:, 0],
        reference["target_mean"][:, 0],
        float((1 - error / measured["spread"].sum(1)).mean()),
    )


def _products(pairs: PairDataset, kind: int, reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """Products of all source channels with each other and with all targets; standardised by the first set."""
    rows = [pairs[index].rows() for index in range(len(pairs))]
    source = torch.cat([part.source[kind] for part in rows], 1)
    target = torch.cat([part.target[kind] for part in rows], 1)
    if not reference:
        reference.update(mean=source.mean(1, keepdim=True), deviation=source.std(1, keepdim=True).clamp_min(1e-6))
        reference.update(target_mean=target.mean(1, keepdim=True))
    flat = ((source - reference["mean"]) / reference["deviation"]).transpose(0, 1).flatten(1)
    centred = target - reference["target_mean"]
    own = target - target.mean(1, keepdim=True)
    return {
        "xx": (flat.T @ flat).double() / len(flat),
        "xy": torch.stack([flat.T @ layer for layer in centred]).double() / len(flat),
        "yy": centred.square().mean(1).double(),
        "spread": own.square().mean(1).double(),
        "width": torch.tensor(source.shape[2]),
    }


def _weights(fitted: dict[str, Tensor], chosen: dict[str, Tensor], heads: int, top_k: int) -> Tensor:
    width, (num_targets, num_channels, out_dim) = int(fitted["width"]), fitted["xy"].shape
    weights = torch.zeros(num_targets, num_channels, out_dim, dtype=torch.float64)
    single = torch.arange(num_channels).split(width)
    factors = [torch.linalg.cholesky(_damped(fitted["xx"][part][:, part], 1e-2)) for part in single]
    for target in range(num_targets):
        for head in range(heads):
            out = torch.arange(out_dim).chunk(heads)[head]
            ranks = torch.stack(
                [
                    _error(torch.cholesky_solve(fitted["xy"][target][part][:, out], factor), chosen, part, target, out)
                    for part, factor in zip(single, factors, strict=True)
                ]
            )
            part = torch.cat([single[int(layer)] for layer in ranks.argsort()[:top_k]])
            maps = [
                torch.cholesky_solve(
                    fitted["xy"][target][part][:, out],
                    torch.linalg.cholesky(_damped(fitted["xx"][part][:, part], ridge)),
                )
                for ridge in RIDGES
            ]
            best = min(maps, key=lambda weight: float(_error(weight, chosen, part, target, out)))
            weights[target, part[:, None], out] = best
    return weights


def _damped(products: Tensor, ridge: float) -> Tensor:
    return products + ridge * torch.eye(len(products), dtype=products.dtype)


def _error(weight: Tensor, products: dict[str, Tensor], part: Tensor, target: int, out: Tensor) -> Tensor:
    """Mean squared error, summed over the channels of one head."""
    mapped = products["xx"][part][:, part] @ weight
    cross = products["xy"][target][part][:, out]
    return products["yy"][target][out].sum() + ((mapped - 2 * cross) * weight).sum()
