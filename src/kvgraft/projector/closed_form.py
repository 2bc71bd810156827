"""Least squares in closed form, from tokens that stream by once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product

import torch
from torch import Tensor

from kvgraft.errors import ProjectorError
from kvgraft.kv import all_finite
from kvgraft.projector.adapters import layer_sets

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# Where nothing was held out to choose by.
DEFAULT_RIDGE = 1e-3


class LeastSquares:
    """Streaming normal equations in float64, one linear map per layer.

    Holds means and centred products only, ``num_layers * in_dim * (in_dim + out_dim)`` float64 numbers, however many
    tokens go by.

    Args:
        num_layers: maps to fit. Where more layers come, each run of consecutive layers has one map
            (:func:`kvgraft.projector.adapters.layer_sets`); 1 fits one map to the tokens of all layers.
        in_dim: width of the input.
        out_dim: width of the target.
        device: where the sums live, default the CPU (some accelerators lack float64).
    """

    def __init__(self, num_layers: int, in_dim: int, out_dim: int, device: torch.device | str = "cpu") -> None:
        self.num_layers, self.in_dim, self.out_dim = num_layers, in_dim, out_dim
        self.device = torch.device(device)
        self.weight_sums = self._zeros(num_layers)
        self._mean_x = self._zeros(num_layers, in_dim)
        self._mean_y = self._zeros(num_layers, out_dim)
        self._scatter_xx = self._zeros(num_layers, in_dim, in_dim)
        self._scatter_xy = self._zeros(num_layers, in_dim, out_dim)
        self._squares_y = self._zeros(num_layers, out_dim)

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor, mask: Tensor, weights: Tensor | None = None) -> None:
        """Take in the real tokens of one batch.

        Args:
            x: ``[batch, layers, tokens, in_dim]``.
            y: ``[batch, layers, tokens, out_dim]``.
            mask: ``[batch, tokens]`` bool, true where a token is real.
            weights: ``[batch, layers, tokens]``, how much each token counts, zero or more; default one each.

        Raises:
            ProjectorError: shapes that do not fit, or a real token that is not finite.
        """
        self._require_shapes(x, y, mask, weights)
        rows_x, rows_y = self._rows(x, mask), self._rows(y, mask)
        rows_weight = None if weights is None else self._rows(weights[..., None], mask)
        if rows_x[0].shape[0] == 0:
            return
        for index in range(self.num_layers):
            chunk_x, chunk_y = rows_x[index].double(), rows_y[index].double()
            _require_finite(index, x=chunk_x, y=chunk_y)
            weight = chunk_x.new_ones(len(chunk_x), 1) if rows_weight is None else rows_weight[index].double()
            if float(weight.sum()) > 0:
                self._merge(index, _moments(chunk_x, chunk_y, weight))

    @torch.no_grad()
    def add_joined(self, parts: Tensor, joined: Sequence[Sequence[int]], y: Tensor) -> None:
        """:meth:`add` where the inputs of several maps have parts in common, whose products are computed once.

        Args:
            parts: ``[parts, rows, width]``.
            joined: for each map the parts that stand side by side in its input, as wide as ``in_dim`` in all.
            y: ``[num_layers, rows, out_dim]``.

        Raises:
            ProjectorError: shapes that do not fit, or a number that is not finite.
        """
        widths = {len(chosen) * parts.shape[2] for chosen in joined}
        expected = (self.num_layers, parts.shape[1], self.out_dim)
        if widths != {self.in_dim} or len(joined) != self.num_layers or tuple(y.shape) != expected:
            raise ProjectorError(
                f"{self.num_layers} maps of {self.in_dim} to {self.out_dim} do not go with {len(joined)} inputs of "
                f"width {sorted(widths)} and y {list(y.shape)}"
            )
        rows = parts.shape[1]
        if rows == 0:
            return
        means, centred = _centred(parts.to(self.device))
        products: dict[tuple[int, int], Tensor] = {}
        for first, second in {pair for chosen in joined for pair in combinations_with_replacement(sorted(chosen), 2)}:
            products[first, second] = centred[first].T @ centred[second]
            products[second, first] = products[first, second].T.contiguous()
        blocks = centred.new_empty(len(joined[0]), parts.shape[2], len(joined[0]), parts.shape[2])
        for index, chosen in enumerate(joined):
            mean_x = torch.cat([means[part] for part in chosen])
            mean_y, centred_y = _centred(y[index].to(self.device))
            # The mean of a column is finite only if all of it is.
            _require_finite(index, x=mean_x, y=mean_y)
            for (row, first), (column, second) in product(enumerate(chosen), repeat=2):
                blocks[row, :, column] = products[first, second]
            scatter_xy = torch.cat([centred[part].T @ centred_y for part in chosen])
            weight, squares_y = means.new_tensor(rows), centred_y.square().sum(0)
            scatter_xx = blocks.view(self.in_dim, self.in_dim)
            self._merge(index, _Moments(weight, mean_x, mean_y, scatter_xx, scatter_xy, squares_y))

    def of_inputs(self, columns: Tensor) -> LeastSquares:
        """The normal equations of the inputs ``columns [chosen]`` alone, over the same tokens: a copy."""
        chosen = LeastSquares(self.num_layers, 0, self.out_dim, self.device)
        chosen.in_dim = len(columns)
        chosen.weight_sums = self.weight_sums.clone()
        chosen._mean_x, chosen._mean_y = self._mean_x[:, columns], self._mean_y.clone()
        chosen._scatter_xx = self._scatter_xx[:, columns[:, None], columns]
        chosen._scatter_xy, chosen._squares_y = self._scatter_xy[:, columns], self._squares_y.clone()
        return chosen

    def merge(self, other: LeastSquares) -> None:
        """Take in everything that ``other``, of the same widths, has seen."""
        for index in range(self.num_layers):
            if float(other.weight_sums[index]) > 0:
                self._merge(index, other._moments_of(index))

    def _merge(self, index: int, added: _Moments) -> None:
        total = self.weight_sums[index] + added.weight
        shift_x, shift_y = added.mean_x - self._mean_x[index], added.mean_y - self._mean_y[index]
        # Merging centred sums, and not raw ones, keeps channels whose mean dwarfs their spread exact.
        between = self.weight_sums[index] * added.weight / total
        self._scatter_xx[index].add_(added.scatter_xx).addr_(between * shift_x, shift_x)
        self._scatter_xy[index].add_(added.scatter_xy).addr_(between * shift_x, shift_y)
        self._squares_y[index] += added.squares_y + between * shift_y.square()
        self._mean_x[index] += shift_x * (added.weight / total)
        self._mean_y[index] += shift_y * (added.weight / total)
        self.weight_sums[index] = total

    def _moments_of(self, index: int) -> _Moments:
        return _Moments(
            self.weight_sums[index],
            self._mean_x[index],
            self._mean_y[index],
            self._scatter_xx[index],
            self._scatter_xy[index],
            self._squares_y[index],
        )

    @torch.no_grad()
    def r2(self, weight: Tensor, bias: Tensor) -> Tensor:
        """R2 of a linear map on the tokens seen here, from their moments alone.

        Args:
            weight: ``[num_layers, out_dim, in_dim]``.
            bias: ``[num_layers, out_dim]``.

        Returns:
            ``[num_layers]``: one minus the squared error over the squares about the mean, over all channels.
        """
        residual = self._residual(weight.double(), bias.double())
        return 1 - residual.sum(-1) / self._squares_y.sum(-1).clamp_min(torch.finfo(torch.float64).tiny)

    def _residual(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Sum of squared errors ``[num_layers, out_dim]``."""
        offset = bias + torch.einsum("loi,li->lo", weight, self._mean_x) - self._mean_y
        mapped = torch.einsum("loi,lij->loj", weight, self._scatter_xx)
        explained = (mapped * weight).sum(-1) - 2 * torch.einsum("loi,lio->lo", weight, self._scatter_xy)
        return self._squares_y + explained + self.weight_sums[:, None] * offset.square()

    @torch.no_grad()
    def solve(self, ridge: float | Tensor = DEFAULT_RIDGE) -> tuple[Tensor, Tensor]:
        """Weights ``[num_layers, out_dim, in_dim]`` and biases ``[num_layers, out_dim]``, float64.

        Args:
            ridge: penalty relative to the inputs' mean variance once every channel has unit variance, so that an
                outlier channel neither sets the scale nor escapes the penalty; 0 is plain least squares of least norm.
                One number, or one for each map ``[num_layers]``.

        Raises:
            ProjectorError: no token was added, or ``ridge`` is negative.
        """
        if not bool((self.weight_sums > 0).all()):
            raise ProjectorError("least squares has seen no token: call add() with at least one true mask entry first")
        ridges = torch.as_tensor(ridge, dtype=torch.float64).expand(self.num_layers).tolist()
        if not all(0 <= penalty < float("inf") for penalty in ridges):
            raise ProjectorError(f"ridge must be 0 or more; got {ridge!r}")
        weights = torch.stack([self._solve_map(index, penalty) for index, penalty in enumerate(ridges)])
        biases = self._mean_y - torch.einsum("loi,li->lo", weights, self._mean_x)
        return weights, biases

    def _solve_map(self, index: int, ridge: float) -> Tensor:
        epsilon = torch.finfo(torch.float64).eps
        deviation = (self._scatter_xx[index].diagonal() / self.weight_sums[index]).clamp_min(0).sqrt()
        # Rounding leaves a constant channel a spread of about epsilon times its mean, which is no information.
        varies = deviation > 8 * epsilon * self._mean_x[index].abs()
        inverse = torch.where(varies, 1 / deviation.where(varies, 1.0), 0.0)
        correlation = self._scatter_xx[index] / self.weight_sums[index] * torch.outer(inverse, inverse)
        covariance = self._scatter_xy[index] / self.weight_sums[index] * inverse[:, None]
        standard = _solve_ridge(correlation, covariance, ridge)
        return (standard * inverse[:, None]).T

    def _rows(self, tensor: Tensor, mask: Tensor) -> list[Tensor]:
        """Real tokens of each map: ``num_layers`` tensors ``[rows, width]``."""
        by_layer = tensor.detach().transpose(1, 2)[mask].to(self.device).transpose(0, 1)
        sets = layer_sets(len(by_layer), self.num_layers)
        return [
            run.flatten(0, 1) for run in torch.split(by_layer, [sets.count(index) for index in range(self.num_layers)])
        ]

    def _require_shapes(self, x: Tensor, y: Tensor, mask: Tensor, weights: Tensor | None) -> None:
        if x.dim() != 4 or x.shape[3] != self.in_dim or x.shape[1] < self.num_layers:
            raise ProjectorError(
                f"x must be [batch, at least {self.num_layers} layers, tokens, {self.in_dim}]; got {list(x.shape)}"
            )
        if weights is not None and (weights.shape != x.shape[:3] or not bool((weights >= 0).all())):
            raise ProjectorError(
                f"weights must be {list(x.shape[:3])} to go with x, none negative; got {list(weights.shape)}"
            )
        if y.shape != (*x.shape[:3], self.out_dim):
            raise ProjectorError(f"y must be {[*x.shape[:3], self.out_dim]} to go with x; got {list(y.shape)}")
        if mask.shape != (x.shape[0], x.shape[2]) or mask.dtype != torch.bool:
            raise ProjectorError(
                f"mask must be bool [{x.shape[0]}, {x.shape[2]}] to go with x; got {mask.dtype} {list(mask.shape)}"
            )

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)


def choose_ridge(fit: LeastSquares, held_out: LeastSquares, ridges: Sequence[float] = RIDGES) -> Tensor:
    """For each map, the ridge strength ``[num_layers]`` whose map from ``fit`` errs least on ``held_out``.

    :data:`DEFAULT_RIDGE` where one of the two has seen no token.
    """
    if not all(bool((seen.weight_sums > 0).all()) for seen in (fit, held_out)):
        return torch.full((fit.num_layers,), DEFAULT_RIDGE, dtype=torch.float64)
    r2 = torch.stack([held_out.r2(*fit.solve(ridge)) for ridge in ridges])
    return torch.tensor(list(ridges), dtype=torch.float64)[r2.argmax(0).cpu()]


def solve_with_chosen_ridge(fit: LeastSquares, held_out: LeastSquares) -> tuple[Tensor, Tensor]:
    """Weights and biases as :meth:`LeastSquares.solve` gives them, from the tokens of both, which ``fit`` then holds.

    The ridge of each map is that of :func:`choose_ridge`.
    """
    ridges = choose_ridge(fit, held_out)
    fit.merge(held_out)
    return fit.solve(ridges)


@dataclass(frozen=True)
class _Moments:
    """Weight, means and centred products of some tokens of one map."""

    weight: Tensor
    mean_x: Tensor
    mean_y: Tensor
    scatter_xx: Tensor
    scatter_xy: Tensor
    squares_y: Tensor


def _centred(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[..., width]`` of ``rows [..., rows, width]``, and ``rows`` less it, in float64."""
    rows = rows.detach().double()
    mean = rows.mean(-2)
    return mean, rows - mean[..., None, :]


def _moments(x: Tensor, y: Tensor, weight: Tensor) -> _Moments:
    """Of ``x [rows, in_dim]`` and ``y [rows, out_dim]``, each row counted ``weight [rows, 1]`` times."""
    total = weight.sum()
    mean_x, mean_y = (weight * x).sum(0) / total, (weight * y).sum(0) / total
    centred_x, centred_y = x - mean_x, y - mean_y
    weighted = (weight * centred_x).T
    return _Moments(
        total, mean_x, mean_y, weighted @ centred_x, weighted @ centred_y, (weight * centred_y.square()).sum(0)
    )


def _solve_ridge(correlation: Tensor, covariance: Tensor, ridge: float) -> Tensor:
    """``(correlation + ridge)^-1 covariance``; the solution of least norm where the matrix is singular."""
    if ridge > 0:
        damped = correlation + ridge * torch.eye(len(correlation), dtype=correlation.dtype, device=correlation.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return torch.cholesky_solve(covariance, factor)
    epsilon = torch.finfo(torch.float64).eps
    values, vectors = torch.linalg.eigh(correlation)
    known = values > len(values) * epsilon * values.max().clamp_min(epsilon)
    inverse = torch.where(known, 1 / (values.where(known, 1.0) + ridge), 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ covariance))


def _require_finite(layer: int, **rows: Tensor) -> None:
    for name, tensor in rows.items():
        if not all_finite(tensor):
            raise ProjectorError(
                f"{name} of layer {layer} has NaN or Inf at a real token. Capture the KV in float32 or bfloat16, "
                "or leave that sample out."
            )
