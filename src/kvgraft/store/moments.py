"""Count, mean and spread of a store's tokens, channel by channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvgraft.kv import KVGeometry, all_finite
from kvgraft.store.layer_runs import layer_runs

# Numbers that are worked on at once.
_MOST = 1 << 20


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
    def of(cls, numbers: Tensor, counted: Tensor, before_layers: Callable[[slice], object] | None = None) -> Moments:
        """Moments of the tokens of ``numbers [layers, 2, tokens, kv_dim]`` that are ``counted [tokens]`` bool.

        Counted in float32 where they lie, or in float64 where squares go beyond it: where the mean is 3,000 deviations,
        the variance of many texts merged is right to 2e-4. NaN or Inf in a token that is counted makes some of ``m2``
        so.

        Args:
            numbers: any float dtype, any device.
            counted: which tokens.
            before_layers: called with some layers before they are read, for example to fill them.
        """
        rows = counted.nonzero()[:, 0].tolist()
        count = len(rows)
        in_one_run = count > 0 and rows[-1] - rows[0] == count - 1
        tokens = slice(rows[0], rows[-1] + 1) if in_one_run else counted
        layers, kinds, _, width = numbers.shape
        found = []
        for some_layers in layer_runs((layers, kinds, count, width), _MOST):
            if before_layers is not None:
                before_layers(some_layers)
            if count:
                found += _mean_and_variance(numbers[some_layers, :, tokens])
        if not found:
            return cls(0, *torch.zeros(2, layers, kinds, width, dtype=torch.float64))
        # Not every device has float64.
        mean, variance = (torch.stack(each).view(layers, kinds, width).cpu() for each in zip(*found, strict=True))
        m2 = variance.double() * count
        if variance.dtype == torch.float32 and not all_finite(m2):
            return cls.of(numbers.cpu().double(), counted.cpu())
        return cls(count, mean.double(), m2)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of tokens together (Chan's formula)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / count)
        return Moments(count, mean, m2)


def _mean_and_variance(numbers: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance ``[kv_dim]`` over the tokens of ``numbers [layers, 2, tokens, kv_dim]``, for layers and kinds.

    What torch counts for batch normalisation, where each layer's keys, or values, are an image of kv_dim channels. It
    converts on the way and holds nothing; sums, and sums of squares, would read the numbers more often.
    """
    dtype = torch.promote_types(numbers.dtype, torch.float32)
    # Of no use here, but what tells torch which dtype to count in.
    running_mean, running_variance = torch.zeros(2, numbers.shape[-1], dtype=dtype, device=numbers.device)
    images = numbers.flatten(0, 1).transpose(1, 2)[:, None, :, :, None].unbind()
    return [torch.batch_norm_update_stats(image, running_mean, running_variance, 1.0) for image in images]
