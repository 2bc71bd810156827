"""The Elastic Bottleneck: the small network that maps one teacher's keys (or values) to another width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvgraft.errors import ProjectorError
from kvgraft.kv import real_tokens
from kvgraft.projector.settings import whole_number

MlpRatio = float | Literal["linear"]
InitMethod = Literal["xavier", "kaiming", "normal", "least_squares", "identity"]
Activation = Literal["silu", "relu", "gelu"]

NORMAL_STD = 0.02

_INITIALISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "xavier": nn.init.xavier_uniform_,
    "kaiming": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu"),
    "normal": lambda weight: nn.init.normal_(weight, std=NORMAL_STD),
    # The bottleneck's first layer; the linear part waits for its closed form.
    "least_squares": nn.init.xavier_uniform_,
    "identity": nn.init.xavier_uniform_,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
}


def layer_sets(num_layers: int, num_sets: int) -> list[int]:
    """Which of ``num_sets`` sets of weights each layer takes: runs of consecutive layers, as even as they can be."""
    return [layer * num_sets // num_layers for layer in range(num_layers)]


def sets_of_layers(parameter: Tensor, layers: range, num_layers: int) -> slice:
    """The sets of ``parameter [sets, ...]`` that ``layers`` of ``num_layers`` take."""
    sets = layer_sets(num_layers, len(parameter))
    return slice(sets[layers.start], sets[layers.stop - 1] + 1)


def layer_runs(adapter: nn.Module, num_layers: int, longest: int) -> Iterator[range]:
    """``num_layers`` layers in runs of at most ``longest``, never over the border of a group that shares weights."""
    shared = {len(parameter) for parameter in adapter.parameters()} - {num_layers}
    groups = [tuple(layer_sets(num_layers, sets)[layer] for sets in shared) for layer in range(num_layers)]
    start = 0
    for layer in range(1, num_layers + 1):
        if layer == num_layers or layer - start == longest or groups[layer] != groups[start]:
            yield range(start, layer)
            start = layer


class StackedLinear(nn.Module):
    """Linear maps for many layers side by side: ``[layers, rows, in_dim]`` to ``[layers, rows, out_dim]``.

    Args:
        num_matrices: weight matrices; where there are fewer than layers, a run of layers shares one.
        in_dim, out_dim: widths.
        num_biases: default ``num_matrices``.
    """

    def __init__(self, num_matrices: int, in_dim: int, out_dim: int, num_biases: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_matrices, out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(num_biases or num_matrices, out_dim))

    def initialise(self, init_method: str) -> None:
        """Draw every map on its own: the fans of the stacked tensor would be those of another network."""
        for weight in self.weight.detach():
            _INITIALISERS[init_method](weight)

    def forward(self, rows: Tensor) -> Tensor:
        """Map ``rows [layers, rows, in_dim]``."""
        layers, matrices = rows.shape[0], len(self.weight)
        if matrices == len(self.bias) == 1:
            # The same call as nn.Linear, so that a migrated checkpoint gives the same bits.
            return functional.linear(rows, self.weight[0], self.bias[0])
        bias = _for_layers(self.bias, layers)[:, None]
        if matrices == layers:
            return torch.baddbmm(bias, rows, self.weight.transpose(1, 2))
        sets = layer_sets(layers, matrices)
        runs = torch.split(rows, [sets.count(index) for index in range(matrices)])
        return torch.cat([run @ weight.T for run, weight in zip(runs, self.weight, strict=True)]) + bias


class StackedLayerNorm(nn.Module):
    """Layer norms for many layers side by side over the last axis of ``[layers, rows, dim]``."""

    def __init__(self, num_layers: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_layers, dim))
        self.bias = nn.Parameter(torch.zeros(num_layers, dim))

    def forward(self, rows: Tensor) -> Tensor:
        """Normalise ``rows [layers, rows, dim]``."""
        if len(self.weight) == 1:
            return functional.layer_norm(rows, rows.shape[-1:], self.weight[0], self.bias[0])
        weight, bias = (_for_layers(part, rows.shape[0])[:, None] for part in (self.weight, self.bias))
        return functional.layer_norm(rows, rows.shape[-1:]) * weight + bias


def _for_layers(parameter: Tensor, layers: int) -> Tensor:
    """``[sets, dim]`` as ``[layers, dim]``."""
    sets = parameter.shape[0]
    return parameter if sets == layers else parameter[layer_sets(layers, sets)]


class ElasticBottleneck(nn.Module):
    """``LayerNorm(d) -> Linear(d, h) -> activation -> Dropout -> Linear(h, d_out)`` for one or many layers.

    Args:
        in_dim: width ``d`` of what comes in.
        out_dim: width of what goes out.
        mlp_ratio: ``h = int(in_dim * mlp_ratio)``, at least 1; ``"linear"`` is one Linear without norm or skip.
        dropout: share of hidden units dropped in training, in [0, 1).
        init_method: ``xavier``, ``kaiming`` (both uniform), ``normal`` (std 0.02), or ``least_squares``: the adapter
            gets a linear part that is zero until :meth:`load_linear` puts the closed-form map there. ``identity``: the
            linear part gives back what comes in, for equal widths. Biases start at zero.
        num_layers: independent adapters. Input of more layers is split into so many runs of consecutive layers, each
            of which shares one; 1 is one adapter shared by all layers.
        num_trunks: matrices of the bottleneck where runs of layers share them, while norm, biases and linear part
            stay each layer's own; default ``num_layers``, nothing shared.
        layer_norm: whether the bottleneck normalises its input.
        activation: ``silu``, ``relu`` or ``gelu``.
        skip: add a linear map of the raw input. The bottleneck's last layer then starts at zero, so that the adapter
            is that linear map at step 0.

    Raises:
        ProjectorError: a setting out of its range.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        mlp_ratio: MlpRatio = 1.0,
        dropout: float = 0.1,
        init_method: InitMethod = "xavier",
        num_layers: int = 1,
        layer_norm: bool = True,
        activation: Activation = "silu",
        skip: bool = False,
        num_trunks: int | None = None,
    ) -> None:
        super().__init__()
        trunks = num_layers if num_trunks is None else num_trunks
        _require_settings(in_dim, out_dim, mlp_ratio, dropout, init_method, num_layers, activation, trunks)
        self.in_dim, self.out_dim, self.num_layers = in_dim, out_dim, num_layers
        self.mlp_ratio, self.dropout, self.activation = mlp_ratio, dropout, activation
        self.norm: StackedLayerNorm | None = None
        self.up: StackedLinear | None = None
        self.down: StackedLinear | None = None
        self.skip: StackedLinear | None = None
        if isinstance(mlp_ratio, str):
            self.skip = StackedLinear(num_layers, in_dim, out_dim)
        else:
            hidden = hidden_width(in_dim, mlp_ratio)
            self.norm = StackedLayerNorm(num_layers, in_dim) if layer_norm else None
            self.up = StackedLinear(trunks, in_dim, hidden, num_layers)
            self.down = StackedLinear(trunks, hidden, out_dim, num_layers)
            has_skip = skip or init_method in ("least_squares", "identity")
            self.skip = StackedLinear(num_layers, in_dim, out_dim) if has_skip else None
        self._initialise(init_method)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Map ``x [batch, layers, tokens, in_dim]`` to ``[batch, layers, tokens, out_dim]`` in the weights' dtype.

        ``layers`` is at least ``num_layers``. ``kept [batch, layers, tokens, h]`` is what the hidden units are
        multiplied by in place of a dropout drawn here.
        """
        rows = self._as_rows(x)
        mapped = None
        if self.down is not None:
            hidden = self._hidden(rows)
            if kept is None:
                hidden = functional.dropout(hidden, self.dropout, self.training)
            else:
                hidden = hidden * self._as_rows(kept)
            mapped = self.down(hidden)
        if self.skip is not None:
            linear = self.skip(rows)
            mapped = linear if mapped is None else linear + mapped
        assert mapped is not None
        return self._from_rows(mapped, x)

    @torch.no_grad()
    def load_linear(self, weight: Tensor, bias: Tensor) -> None:
        """Set the linear part (the skip, or all of a ``"linear"`` adapter) from a closed-form map.

        Args:
            weight: ``[num_layers, out_dim, in_dim]``.
            bias: ``[num_layers, out_dim]``.
        """
        if self.skip is None:
            raise ProjectorError(
                "this adapter has no linear part to load into: build the projector with skip=True or mlp_ratio='linear'"
            )
        for name, given, own in (("weight", weight, self.skip.weight), ("bias", bias, self.skip.bias)):
            if given.shape != own.shape:
                raise ProjectorError(
                    f"the {name} of a linear map into this adapter must be {list(own.shape)} ([num_layers, out_dim"
                    f"{', in_dim' if name == 'weight' else ''}]); got {list(given.shape)}"
                )
            own.copy_(given)

    def hidden_units(self, x: Tensor) -> Tensor:
        """Activated hidden units ``[num_layers, rows, h]`` of ``x``, before dropout; an error if it has none."""
        return self._hidden(self._as_rows(x))

    def _hidden(self, rows: Tensor) -> Tensor:
        if self.up is None:
            raise ProjectorError("an adapter with mlp_ratio='linear' has no hidden units; give a number as mlp_ratio")
        normed = rows if self.norm is None else self.norm(rows)
        return ACTIVATIONS[self.activation](self.up(normed))

    def _as_rows(self, x: Tensor) -> Tensor:
        """``[batch, layers, tokens, dim]`` to ``[layers, rows, dim]``, all as one layer where all share."""
        reference = self.up if self.up is not None else self.skip
        assert reference is not None
        x = x.to(reference.weight.dtype)
        if self.num_layers == 1:
            return x.reshape(1, -1, x.shape[-1])
        return x.transpose(0, 1).reshape(x.shape[1], -1, x.shape[-1])

    def _from_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        batch, layers, tokens, _ = like.shape
        if self.num_layers == 1:
            return rows.reshape(batch, layers, tokens, self.out_dim)
        return rows.reshape(layers, batch, tokens, self.out_dim).transpose(0, 1)

    def _initialise(self, init_method: str) -> None:
        if self.up is not None:
            self.up.initialise(init_method)
        if self.skip is None:
            assert self.down is not None
            self.down.initialise(init_method)
        elif init_method == "identity":
            with torch.no_grad():
                self.skip.weight.copy_(torch.eye(self.in_dim))
        elif init_method != "least_squares":
            self.skip.initialise(init_method)


@torch.no_grad()
def dead_unit_share(adapter: ElasticBottleneck, x: Tensor, mask: Tensor | None = None) -> float:
    """Share of hidden units that give exactly zero on every calibration token, in [0, 1].

    Such a unit passes no gradient. It is ReLU's trouble: SiLU and GELU give zero only far out, where they underflow.

    Args:
        adapter: a bottleneck (an error for ``"linear"``).
        x: calibration input ``[batch, layers, tokens, in_dim]``.
        mask: ``[batch, tokens]`` bool, true where a token is real; default all.
    """
    layers = x.shape[1]
    real = x if mask is None else real_tokens(x, mask)[None]
    if real.shape[2] == 0:
        raise ProjectorError(f"no real token among calibration input {list(x.shape)}: every entry of its mask is false")
    if layers < adapter.num_layers:
        raise ProjectorError(f"calibration input has {layers} layers, the adapter {adapter.num_layers}")
    alive = (adapter.hidden_units(real) != 0).any(1)
    return 1 - float(alive.float().mean())


def hidden_width(in_dim: int, mlp_ratio: float) -> int:
    """Hidden units of a bottleneck: ``int(in_dim * mlp_ratio)``, at least 1."""
    return max(1, int(in_dim * mlp_ratio))


def _require_settings(
    in_dim: int,
    out_dim: int,
    mlp_ratio: object,
    dropout: object,
    init_method: object,
    num_layers: int,
    activation: object,
    num_trunks: int,
) -> None:
    sizes = {"in_dim": in_dim, "out_dim": out_dim, "num_layers": num_layers, "num_trunks": num_trunks}
    for name, size in sizes.items():
        whole_number(name, size)
    if num_trunks > num_layers:
        raise ProjectorError(f"num_trunks {num_trunks} is more than num_layers {num_layers}; share among at most those")
    if mlp_ratio != "linear" and not (isinstance(mlp_ratio, int | float) and _is_number(mlp_ratio) and mlp_ratio > 0):
        raise ProjectorError(f"mlp_ratio must be a number over 0 or 'linear'; got {mlp_ratio!r}")
    if not (isinstance(dropout, int | float) and _is_number(dropout) and 0 <= dropout < 1):
        raise ProjectorError(f"dropout must be a number in [0, 1); got {dropout!r}")
    if init_method not in _INITIALISERS:
        raise ProjectorError(f"init_method must be one of {', '.join(_INITIALISERS)}; got {init_method!r}")
    if init_method == "identity" and in_dim != out_dim:
        raise ProjectorError(
            f"init_method 'identity' needs equal widths; this adapter goes from {in_dim} to {out_dim}; use "
            "'least_squares' or 'xavier'"
        )
    if activation not in ACTIVATIONS:
        raise ProjectorError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
