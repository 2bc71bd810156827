"""Count, mean and spread of a store's tokens, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvgraft.kv import KVGeometry

# Float32 sums run over at least so many tokens before they are added up in float64, and over an eighth of a long text.
_BLOCK_TOKENS, _MOST_BLOCKS = 64, 8


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
        time to stay in the processor's cache. Sums are products with a matrix of ones, in float32 over blocks of
        tokens, and in float64 from there.
        """
        count = int(counted.sum())
        layers, kinds, _, width = numbers.shape
        mean, m2 = torch.zeros(2, layers, kinds, width, dtype=torch.float64)
        if count == 0:
            return cls(0, mean, m2)
        wide = torch.promote_types(numbers.dtype, torch.float32)
        blocks = _blocks(counted).to(wide)
        for layer, own in enumerate(numbers):
            center = (_sums(blocks, own.to(wide)) / count).to(wide)
            deviation = own - center[:, None]
            left = _sums(blocks, deviation)
            mean[layer] = center.double() + left / count
            m2[layer] = _sums(blocks, deviation.square_()) - left.square() / count
        if wide == torch.float32 and not bool(torch.isfinite(m2).all()):
            # Squares beyond float32, perhaps of tokens that do not even count.
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


def _blocks(counted: Tensor) -> Tensor:
    """``[blocks, tokens]``, one where a token counts and belongs to the block."""
    tokens = len(counted)
    size = max(_BLOCK_TOKENS, -(-tokens // _MOST_BLOCKS))
    own = torch.arange(tokens) // size == torch.arange(-(-tokens // size))[:, None]
    return own & counted


def _sums(blocks: Tensor, numbers: Tensor) -> Tensor:
    """Sums ``[2, kv_dim]`` in float64 of ``numbers [2, tokens, kv_dim]`` over the tokens of all blocks."""
    return (blocks @ numbers).sum(1, dtype=torch.float64)
