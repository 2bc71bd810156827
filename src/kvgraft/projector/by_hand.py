"""The Elastic Bottleneck on rows, forward and backward without autograd.

Around pieces that fit a processor's caches, autograd and what it allocates cost as much again as the matrix products.
Here every gradient is added right where it is kept. The plain way, which this equals, is the adapter and autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kvgraft.projector.adapters import ACTIVATIONS, ElasticBottleneck

_ACTIVATIONS_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "relu": lambda gradient, units: torch.ops.aten.threshold_backward(gradient, units, 0),
    "gelu": torch.ops.aten.gelu_backward,
}
_EPSILON = 1e-5


class BottleneckByHand:
    """Some layers of an adapter: one forward pass, then one backward pass over the same rows.

    Args:
        adapter: whose settings count.
        parameters: its parameters by name, ``[sets, ...]``: one set for all layers, or one for each.
        gradients: for each parameter the tensor of its shape that its gradient is added to, None where none is wanted.
    """

    def __init__(
        self, adapter: ElasticBottleneck, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
    ) -> None:
        self.activation = adapter.activation
        self.parameters, self.gradients = parameters, gradients
        # One set for all is one map over all rows, which is a product of two matrices and not of many.
        self.is_single = all(len(parameter) == 1 for parameter in parameters.values())

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """``[layers, rows, out_dim]`` of ``x [layers, rows, in_dim]``.

        ``weights [layers, rows, h]`` is what the hidden units are multiplied by (dropout); default 1.
        """
        self.shape = x.shape[:2]
        self.x, self.weights = self._as_rows(x), None if weights is None else self._as_rows(weights)
        output = None
        if "down.weight" in self.parameters:
            self.normed = self._normalise()
            self.units = self._map("up", self.normed)
            self.hidden = ACTIVATIONS[self.activation](self.units)
            if self.weights is not None:
                self.hidden.mul_(self.weights)
            output = self._map("down", self.hidden)
        if "skip.weight" in self.parameters:
            linear = self._map("skip", self.x)
            output = linear if output is None else output.add_(linear)
        assert output is not None
        return output.view(*self.shape, -1)

    def backward(self, gradient: Tensor, wants_x: bool) -> Tensor | None:
        """Add the parameters' gradients, and give that of ``x`` where it is wanted.

        ``gradient [layers, rows, out_dim]`` is that of the output.
        """
        gradient = self._as_rows(gradient)
        of_x = None
        if "down.weight" in self.parameters:
            self._add_gradients("down", gradient, self.hidden)
            inner = self._map_back("down", gradient)
            if self.weights is not None:
                inner.mul_(self.weights)
            inner = _ACTIVATIONS_BACKWARD[self.activation](inner, self.units)
            self._add_gradients("up", inner, self.normed)
            if wants_x or any(self.gradients.get(f"norm.{part}") is not None for part in ("weight", "bias")):
                of_x = self._normalise_back(self._map_back("up", inner), wants_x)
        if "skip.weight" in self.parameters:
            self._add_gradients("skip", gradient, self.x)
            if wants_x:
                linear = self._map_back("skip", gradient)
                of_x = linear if of_x is None else of_x.add_(linear)
        return None if of_x is None else of_x.view(*self.shape, -1)

    def _as_rows(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1) if self.is_single else tensor

    def _map(self, name: str, rows: Tensor) -> Tensor:
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        if self.is_single:
            return torch.addmm(bias, rows, weight[0].T)
        return torch.baddbmm(bias[:, None], rows, weight.expand(len(rows), -1, -1).transpose(1, 2))

    def _map_back(self, name: str, gradient: Tensor) -> Tensor:
        weight = self.parameters[f"{name}.weight"]
        return gradient @ (weight[0] if self.is_single else weight)

    def _add_gradients(self, name: str, gradient: Tensor, rows: Tensor) -> None:
        weight, bias = self.gradients[f"{name}.weight"], self.gradients[f"{name}.bias"]
        if weight is not None and len(weight) == 1:
            _add_product(weight[0], gradient.flatten(0, -2).T, rows.flatten(0, -2))
        elif weight is not None:
            _add_product(weight, gradient.transpose(1, 2), rows)
        if bias is not None:
            # Not summed in autocast's dtype, of which a compiled sum that is rounded twice is no valid C++.
            bias.add_(gradient.sum(-2, dtype=bias.dtype))

    def _normalise(self) -> Tensor:
        if "norm.weight" not in self.parameters:
            return self.x
        weight, bias = self.parameters["norm.weight"], self.parameters["norm.bias"]
        width = [self.x.shape[-1]]
        if self.is_single:
            normed, self.mean, self.reciprocal = torch.native_layer_norm(self.x, width, weight[0], bias[0], _EPSILON)
            return normed
        self.plain, self.mean, self.reciprocal = torch.native_layer_norm(self.x, width, None, None, _EPSILON)
        return torch.addcmul(bias[:, None], self.plain, weight[:, None])

    def _normalise_back(self, gradient: Tensor, wants_x: bool) -> Tensor | None:
        if "norm.weight" not in self.parameters:
            return gradient
        weight, bias = self.parameters["norm.weight"], self.parameters["norm.bias"]
        totals = self.gradients["norm.weight"], self.gradients["norm.bias"]
        width, gradient = [self.x.shape[-1]], gradient.to(self.x.dtype)
        learns = any(total is not None for total in totals)
        if self.is_single:
            of_x, *found = torch.ops.aten.native_layer_norm_backward(
                gradient, self.x, width, self.mean, self.reciprocal, weight[0], bias[0], [wants_x, learns, learns]
            )
        else:
            found = [(gradient * self.plain).sum(1), gradient.sum(1)] if learns else []
            of_x, _, _ = torch.ops.aten.native_layer_norm_backward(
                gradient * weight[:, None],
                self.x,
                width,
                self.mean,
                self.reciprocal,
                None,
                None,
                [wants_x, False, False],
            )
        for total, part in zip(totals, found, strict=False):
            if total is not None:
                total.add_(part)
        return of_x if wants_x else None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    # Autocast leaves products in place alone, and a compiler makes a copy of what they are added to.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(total.device.type):
        total.add_(left @ right)
    elif total.dim() == 2:
        total.addmm_(left, right)
    else:
        total.baddbmm_(left, right)
