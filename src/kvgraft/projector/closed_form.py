"""Least squares in closed form, from tokens that stream by once."""

from __future__ import annotations

import torch
from torch import Tensor

from kvgraft.errors import ProjectorError


class LeastSquares:
    """Streaming normal equations in float64, one linear map per layer.

    Holds means and centred products only, ``num_layers * in_dim * (in_dim + out_dim)`` float64 numbers, however many
    tokens go by.

    Args:
        num_layers: maps to fit; 1 fits one map to the tokens of all layers that come.
        in_dim: width of the input.
        out_dim: width of the target.
        device: where the sums live, default the CPU (some accelerators lack float64).
    """

    def __init__(self, num_layers: int, in_dim: int, out_dim: int, device: torch.device | str = "cpu") -> None:
        self.num_layers, self.in_dim, self.out_dim = num_layers, in_dim, out_dim
        self.device = torch.device(device)
        self.num_rows = 0
        self._mean_x = self._zeros(num_layers, in_dim)
        self._mean_y = self._zeros(num_layers, out_dim)
        self._scatter_xx = self._zeros(num_layers, in_dim, in_dim)
        self._scatter_xy = self._zeros(num_layers, in_dim, out_dim)

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor, mask: Tensor) -> None:
        """Take in the real tokens of one batch.

        Args:
            x: ``[batch, layers, tokens, in_dim]``.
            y: ``[batch, layers, tokens, out_dim]``.
            mask: ``[batch, tokens]`` bool, true where a token is real.

        Raises:
            ProjectorError: shapes that do not fit, or a real token that is not finite.
        """
        self._require_shapes(x, y, mask)
        rows_x, rows_y = self._rows(x, mask), self._rows(y, mask)
        added = rows_x[0].shape[0]
        if added == 0:
            return
        total = self.num_rows + added
        for layer in range(self.num_layers):
            chunk_x, chunk_y = rows_x[layer].double(), rows_y[layer].double()
            _require_finite(layer, x=chunk_x, y=chunk_y)
            mean_x, mean_y = chunk_x.mean(0), chunk_y.mean(0)
            centred_x = chunk_x - mean_x
            shift_x, shift_y = mean_x - self._mean_x[layer], mean_y - self._mean_y[layer]
            # Merging centred sums, and not raw ones, keeps channels whose mean dwarfs their spread exact.
            between = self.num_rows * added / total
            self._scatter_xx[layer] += centred_x.T @ centred_x + between * torch.outer(shift_x, shift_x)
            self._scatter_xy[layer] += centred_x.T @ (chunk_y - mean_y) + between * torch.outer(shift_x, shift_y)
            self._mean_x[layer] += shift_x * (added / total)
            self._mean_y[layer] += shift_y * (added / total)
        self.num_rows = total

    @torch.no_grad()
    def solve(self, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
        """Weights ``[num_layers, out_dim, in_dim]`` and biases ``[num_layers, out_dim]``, float64.

        Args:
            ridge: penalty relative to the inputs' mean variance once every channel has unit variance, so that an
                outlier channel neither sets the scale nor escapes the penalty; 0 is plain least squares of least norm.

        Raises:
            ProjectorError: no token was added, or ``ridge`` is negative.
        """
        if self.num_rows == 0:
            raise ProjectorError("least squares has seen no token: call add() with at least one true mask entry first")
        if not 0 <= ridge < float("inf"):
            raise ProjectorError(f"ridge must be 0 or more; got {ridge!r}")
        weights = torch.stack([self._solve_layer(layer, ridge) for layer in range(self.num_layers)])
        biases = self._mean_y - torch.einsum("loi,li->lo", weights, self._mean_x)
        return weights, biases

    def _solve_layer(self, layer: int, ridge: float) -> Tensor:
        epsilon = torch.finfo(torch.float64).eps
        deviation = (self._scatter_xx[layer].diagonal() / self.num_rows).clamp_min(0).sqrt()
        # Rounding leaves a constant channel a spread of about epsilon times its mean, which is no information.
        varies = deviation > 8 * epsilon * self._mean_x[layer].abs()
        inverse = torch.where(varies, 1 / deviation.where(varies, 1.0), 0.0)
        correlation = self._scatter_xx[layer] / self.num_rows * torch.outer(inverse, inverse)
        covariance = self._scatter_xy[layer] / self.num_rows * inverse[:, None]
        values, vectors = torch.linalg.eigh(correlation)
        known = values > self.in_dim * epsilon * values.max().clamp_min(epsilon)
        damped = torch.where(known, 1 / (values.where(known, 1.0) + ridge), 0.0)
        standard: Tensor = vectors @ (damped[:, None] * (vectors.T @ covariance))
        return (standard * inverse[:, None]).T

    def _rows(self, tensor: Tensor, mask: Tensor) -> list[Tensor]:
        """Real tokens of each map: ``num_layers`` tensors ``[rows, width]``."""
        by_layer = tensor.detach().transpose(1, 2)[mask].to(self.device).transpose(0, 1)
        return [by_layer.flatten(0, 1)] if self.num_layers == 1 else list(by_layer)

    def _require_shapes(self, x: Tensor, y: Tensor, mask: Tensor) -> None:
        if x.dim() != 4 or x.shape[3] != self.in_dim or (self.num_layers != 1 and x.shape[1] != self.num_layers):
            raise ProjectorError(
                f"x must be [batch, {self.num_layers} layers, tokens, {self.in_dim}]; got {list(x.shape)}"
            )
        if y.shape != (*x.shape[:3], self.out_dim):
            raise ProjectorError(f"y must be {[*x.shape[:3], self.out_dim]} to go with x; got {list(y.shape)}")
        if mask.shape != (x.shape[0], x.shape[2]) or mask.dtype != torch.bool:
            raise ProjectorError(
                f"mask must be bool [{x.shape[0]}, {x.shape[2]}] to go with x; got {mask.dtype} {list(mask.shape)}"
            )

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)


def _require_finite(layer: int, **rows: Tensor) -> None:
    for name, tensor in rows.items():
        if not torch.isfinite(tensor).all():
            raise ProjectorError(
                f"{name} of layer {layer} has NaN or Inf at a real token. Capture the KV in float32 or bfloat16, "
                "or leave that sample out."
            )
