"""Count, mean and spread of a store's tokens, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvgraft.kv import KVGeometry, all_finite


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
    def of(cls, numbers: Tensor, counted: Tensor) -> Moments:
        """Moments of the tokens of ``numbers [layers, 2, tokens, kv_dim]`` that are ``counted [tokens]`` bool.

        Two passes, the second over deviations from what the first found (Chan, Golub and LeVeque 1983), a layer at a
        time to stay in the processor's cache, in float32 as torch adds up: in pairs, and pairs of pairs.
        """
        rows = counted.nonzero()[:, 0]
        layers, kinds, tokens, width = numbers.shape
        count = len(rows)
        if count == 0:
            return cls(0, *torch.zeros(2, layers, kinds, width, dtype=torch.float64))
        own = numbers if count == tokens else numbers.index_select(2, rows)
        dtype = torch.promote_types(numbers.dtype, torch.float32)
        center, left, squares = torch.empty(3, layers, kinds, width, dtype=dtype)
        deviation = torch.empty(kinds, count, width, dtype=dtype)
        for layer, part in enumerate(own):
            torch.mean(deviation.copy_(part), 1, out=center[layer])
            torch.sum(deviation.sub_(center[layer, :, None]), 1, out=left[layer])
            torch.sum(deviation.square_(), 1, out=squares[layer])
        m2 = squares.double() - left.double().square() / count
        if dtype == torch.float32 and not all_finite(m2):
            # Squares beyond float32.
            return cls.of(numbers.double(), counted)
        return cls(count, center.double() + left.double() / count, m2)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of tokens together (Chan's formula)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / count)
        return Moments(count, mean, m2)
