"""Count, mean and spread of a store's tokens, channel by channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvgraft.kv import KVGeometry, all_finite
from kvgraft.store.layer_runs import layer_runs

# How far off, squared and in variances, a guess of the mean may be: float32 then has five digits of the variance.
_FARTHEST = 100
# Numbers that are worked on at once.
_MOST = 1 << 18


@dataclass(frozen=True)
class Moments:
    """Count, mean and summed squared deviation of tokens per channel, ``[layers, 2, kv_dim]`` in float64.

    Deviations from the running mean, and not plain sums of squares, keep the variance of channels whose mean is far
    from zero; keys have such channels.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, geometry: KVGeometry) -> Moments:
        """Moments of no tokens."""
        zeros = torch.zeros(geometry.num_layers, 2, geometry.kv_dim, dtype=torch.float64)
        return cls(0, zeros, zeros)

    @classmethod
    def of(
        cls,
        numbers: Tensor,
        counted: Tensor,
        about: Tensor | None = None,
        before_layers: Callable[[slice], object] | None = None,
    ) -> Moments:
        """Moments of the tokens of ``numbers [layers, 2, tokens, kv_dim]`` that are ``counted [tokens]`` bool.

        Sums of deviations and of their squares (Chan, Golub and LeVeque 1983). NaN or Inf in a token that is counted
        makes some of ``m2`` so.

        Args:
            numbers: any float dtype.
            counted: which tokens.
            about: ``[layers, 2, kv_dim]``, a guess of the mean, which deviations are taken from; it saves a pass, and
                is dropped where it is too far off for float32. Default the tokens' own mean.
            before_layers: called with some layers before they are read, for example to fill them.
        """
        rows = counted.nonzero()[:, 0]
        count = len(rows)
        center, left, squares = _sums(numbers, rows, about, before_layers)
        from_center = left.double().square() / max(count, 1)
        m2 = squares.double() - from_center
        if about is not None and not bool((from_center <= _FARTHEST * m2).all()):
            return cls.of(numbers, counted)
        if center.dtype == torch.float32 and not all_finite(m2):
            # Squares beyond float32.
            return cls.of(numbers.double(), counted)
        return cls(count, center.double() + left.double() / max(count, 1), m2)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of tokens together (Chan's formula)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / count)
        return Moments(count, mean, m2)


def _sums(
    numbers: Tensor, rows: Tensor, about: Tensor | None, before_layers: Callable[[slice], object] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What deviations were taken from, their sums and those of their squares, ``[layers, 2, kv_dim]`` each.

    ``rows`` are the tokens that count; without one all three are zero. In float32 as torch adds up: in pairs, and
    pairs of pairs.
    """
    layers, kinds, _, width = numbers.shape
    count = len(rows)
    in_one_run = count > 0 and int(rows[-1] - rows[0]) == count - 1
    dtype = torch.promote_types(numbers.dtype, torch.float32)
    center, left, squares = torch.zeros(3, layers, kinds, width, dtype=dtype)
    if about is not None and count:
        center.copy_(about)
    runs = layer_runs((layers, kinds, count, width), _MOST)
    deviations = torch.empty(runs[0].stop, kinds, count, width, dtype=dtype)
    for chosen in runs:
        if before_layers is not None:
            before_layers(chosen)
        if count == 0:
            continue
        part = numbers[chosen]
        deviation = deviations[: len(part)]
        deviation.copy_(part[:, :, rows[0] : rows[-1] + 1] if in_one_run else part[:, :, rows])
        if about is None:
            torch.mean(deviation, 2, out=center[chosen])
        torch.sum(deviation.sub_(center[chosen, :, None]), 2, out=left[chosen])
        torch.sum(deviation.square_(), 2, out=squares[chosen])
    return center, left, squares
