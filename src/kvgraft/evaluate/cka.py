"""Linear centred kernel alignment: how alike two representations are, whatever rotation or scale sets them apart.

Kornblith, Norouzi, Lee and Hinton, "Similarity of Neural Network Representations Revisited", ICML 2019, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvgraft.errors import KVGraftError


class LinearCKA:
    """Linear CKA of chosen pairs of layers from tokens that stream by.

    In [0, 1]: 1 where one layer is the other rotated and scaled, 0 where no direction of one varies with any of the
    other. It is biased upwards where tokens are not many more than dimensions.

    Holds means and centred products in float64, whatever the number of tokens: ``x_dim^2`` numbers for each layer of
    ``x``, ``y_dim^2`` for each of ``y``, ``x_dim * y_dim`` for each pair.

    Args:
        pairs: ``(layer of x, layer of y)`` of each pair that is compared, as indices of what :meth:`add` is given.
        x_layers, y_layers: layers of each side.
        x_dim, y_dim: width of a token on each side.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], x_layers: int, y_layers: int, x_dim: int, y_dim: int) -> None:
        self.tokens = 0
        self._x_index = torch.tensor([x for x, _ in pairs])
        self._y_index = torch.tensor([y for _, y in pairs])
        self._mean_x, self._mean_y = _zeros(x_layers, x_dim), _zeros(y_layers, y_dim)
        self._products_xx, self._products_yy = _zeros(x_layers, x_dim, x_dim), _zeros(y_layers, y_dim, y_dim)
        self._products_xy = _zeros(len(pairs), x_dim, y_dim)

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in the same tokens of both sides: ``x [x_layers, tokens, x_dim]``, ``y [y_layers, tokens, y_dim]``."""
        for name, side, mean in (("x", x, self._mean_x), ("y", y, self._mean_y)):
            if side.dim() != 3 or side.shape[0] != mean.shape[0] or side.shape[2] != mean.shape[1]:
                expected = f"[{mean.shape[0]}, tokens, {mean.shape[1]}]"
                raise KVGraftError(f"{name} of linear CKA must be {expected}; got {list(side.shape)}")
        if x.shape[1] != y.shape[1]:
            raise KVGraftError(
                f"linear CKA compares the same tokens on both sides; got {x.shape[1]} of x and {y.shape[1]} of y"
            )
        added = x.shape[1]
        if added == 0:
            return
        # Some accelerators lack float64.
        x, y = x.cpu().double(), y.cpu().double()
        mean_x, mean_y = x.mean(1), y.mean(1)
        centred_x, centred_y = x - mean_x[:, None], y - mean_y[:, None]
        shift_x, shift_y = mean_x - self._mean_x, mean_y - self._mean_y
        # Merging centred sums, and not raw ones, keeps channels whose mean dwarfs their spread exact.
        between = self.tokens * added / (self.tokens + added)
        self._products_xx += centred_x.transpose(1, 2) @ centred_x + between * _outer(shift_x, shift_x)
        self._products_yy += centred_y.transpose(1, 2) @ centred_y + between * _outer(shift_y, shift_y)
        for pair, (one, other) in enumerate(zip(self._x_index.tolist(), self._y_index.tolist(), strict=True)):
            self._products_xy[pair] += centred_x[one].T @ centred_y[other]
        self._products_xy += between * _outer(shift_x[self._x_index], shift_y[self._y_index])
        self.tokens += added
        self._mean_x += shift_x * (added / self.tokens)
        self._mean_y += shift_y * (added / self.tokens)

    def similarity(self) -> Tensor:
        """Linear CKA of each pair ``[pairs]``, float64; 0 where a side does not vary.

        Raises:
            KVGraftError: no token was added.
        """
        self._require_tokens()
        shared = self._products_xy.square().sum((1, 2))
        own_x = torch.linalg.matrix_norm(self._products_xx)[self._x_index]
        own_y = torch.linalg.matrix_norm(self._products_yy)[self._y_index]
        return (shared / (own_x * own_y).clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=1.0)

    def effective_ranks(self) -> tuple[Tensor, Tensor]:
        """Effective rank of each layer of ``x [x_layers]`` and of ``y [y_layers]``; see :func:`effective_rank`."""
        self._require_tokens()
        return effective_rank(self._products_xx), effective_rank(self._products_yy)

    def _require_tokens(self) -> None:
        if self.tokens == 0:
            raise KVGraftError("linear CKA has seen no token: call add() with at least one first")


def effective_rank(covariance: Tensor) -> Tensor:
    """Exponential of the entropy of the spectrum of ``covariance [..., dim, dim]``, up to a factor: in [1, dim].

    Roy and Vetterli, "The effective rank", EUSIPCO 2007, of the covariance. NaN where it is not finite.
    """
    if not bool(covariance.isfinite().all()):
        return torch.full(covariance.shape[:-2], torch.nan, dtype=covariance.dtype, device=covariance.device)
    spectrum = torch.linalg.eigvalsh(covariance).clamp_min(0)
    share = spectrum / spectrum.sum(-1, keepdim=True).clamp_min(torch.finfo(spectrum.dtype).tiny)
    return torch.exp(-torch.special.xlogy(share, share).sum(-1))


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _outer(one: Tensor, other: Tensor) -> Tensor:
    return one[:, :, None] * other[:, None, :]
