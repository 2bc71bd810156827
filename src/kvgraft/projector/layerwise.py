"""A loss over many layers' adapters, a few layers at a time: what is held does not grow with the number of layers.

The gradients of a few layers are computed in the forward pass, and only they are kept, as in
:mod:`kvgraft.distill.fused`. The plain way, which this equals but for the order in which dropout is drawn, is to call
the adapter on all layers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from kvgraft.projector.adapters import ElasticBottleneck, layer_runs, sets_of_layers

# From what some layers give, ``[1, layers of a run, tokens, out_dim]``, and which they are, to their part of the loss.
LossOfLayers = Callable[[Tensor, slice], Tensor]

# Numbers of the input that are worked on at once: below the size from which the system maps memory anew each time.
_PIECE_NUMBERS = 1 << 22


def layerwise_loss(adapter: ElasticBottleneck, x: Tensor, loss_of: LossOfLayers) -> Tensor:
    """The sum of ``loss_of(adapter(x), layers)`` over runs of layers: a scalar, with the gradient of the adapter alone.

    Args:
        adapter: one that nothing has wrapped or hooked.
        x: ``[1, layers, tokens, in_dim]``.
        loss_of: called for each run; nothing else than what it is given may need a gradient.
    """
    loss: Tensor = _LayerwiseLoss.apply(  # type: ignore[no-untyped-call]
        adapter, x, loss_of, torch.is_grad_enabled(), *adapter.parameters()
    )
    return loss


class _LayerwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, adapter: ElasticBottleneck, x: Tensor, loss_of: LossOfLayers, learning: bool, *parameters: Tensor
    ) -> Tensor:
        names = [name for name, _ in adapter.named_parameters()]
        gradients = [torch.zeros_like(parameter) for parameter in parameters] if learning else []
        total = x.new_zeros((), dtype=torch.float32)
        num_layers = x.shape[1]
        for layers in layer_runs(adapter, num_layers, max(1, _PIECE_NUMBERS // x[0, 0].numel())):
            parts = [sets_of_layers(parameter, layers, num_layers) for parameter in parameters]
            leaves = [
                parameter.detach()[part].requires_grad_(learning)
                for parameter, part in zip(parameters, parts, strict=True)
            ]
            chosen = slice(layers.start, layers.stop)
            with torch.set_grad_enabled(learning):
                output = functional_call(adapter, dict(zip(names, leaves, strict=True)), (x[:, chosen],))
                loss = loss_of(output, chosen)
            total += loss.detach()
            if learning:
                for gradient, part, piece in zip(gradients, parts, torch.autograd.grad(loss, leaves), strict=True):
                    gradient[part].add_(piece)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, *(gradient * arriving for gradient in ctx.saved_tensors))
