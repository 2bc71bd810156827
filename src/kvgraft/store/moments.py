"""Count, mean and spread of a store's tokens, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvgraft.kv import KVGeometry


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
        count = int(counted.sum())
        layers, kinds, tokens, width = numbers.shape
        mean, m2 = torch.zeros(2, layers, kinds, width, dtype=torch.float64)
        if count == 0:
            return cls(0, mean, m2)
        deviation = torch.empty(kinds, count, width, dtype=torch.promote_types(numbers.dtype, torch.float32))
        for layer, own in enumerate(numbers):
            deviation.copy_(own if count == tokens else own[:, counted])
            center = deviation.mean(1)
            left = deviation.sub_(center[:, None]).sum(1).double()
            mean[layer] = center.double() + left / count
            m2[layer] = deviation.square_().sum(1).double() - left.square() / count
        if deviation.dtype == torch.float32 and not bool(torch.isfinite(m2).all()):
            # Squares beyond float32.
            return cls.of(numbers.double(), counted)
        return cls(count, mean, m2)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of tokens together (Chan's formula)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / count)
        return Moments(count, mean, m2)
