"""Many layers' adapters, a few layers at a time: what is held does not grow with the number of layers.

For a loss the gradients of a few layers are computed in the forward pass, and only they are kept, as in
:mod:`kvgraft.distill.fused`. The plain way, which this equals but for the order in which dropout is drawn, is to call
the adapter on all layers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from kvgraft.gradients import times_arriving
from kvgraft.projector.adapters import ElasticBottleneck, layer_runs, sets_of_layers
from kvgraft.projector.sources import AdapterInputs

# From what some layers give, ``[1, layers of a run, tokens, out_dim]``, and which they are, to their part of the loss.
LossOfLayers = Callable[[Tensor, slice], Tensor]

# Numbers of the input that are worked on at once: below the size from which the system maps memory anew each time.
_PIECE_NUMBERS = 1 << 22
# The same for a projection alone, by what a processor's caches hold; another device is slow at many small pieces.
_CACHED_NUMBERS, _DEVICE_NUMBERS = 1 << 20, 1 << 24


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


@torch.no_grad()
def project_layerwise(
    adapters: tuple[ElasticBottleneck, ElasticBottleneck],
    inputs: AdapterInputs,
    standard: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Keys and values ``[batch, layers, tokens, out_dim]`` that ``adapters`` make from ``inputs``.

    What an adapter reads is joined for a few layers at a time, so that on a processor it stays in the caches.

    Args:
        adapters: of keys and of values, of one shape, that nothing has wrapped or hooked.
        inputs: what they read.
        standard: mean ``[2, layers, out_dim]`` and deviation ``[2, layers]`` that outputs are brought to; or None.
    """
    inputs = inputs.to(next(adapters[0].parameters()).dtype)
    num_layers, shape = inputs.num_layers, inputs.keys.shape
    outputs: list[Tensor] = []
    numbers_of_layer = max(1, shape[0] * shape[2]) * adapters[0].in_dim
    most = _CACHED_NUMBERS if inputs.keys.device.type == "cpu" else _DEVICE_NUMBERS
    for layers in layer_runs(adapters[0], num_layers, max(1, most // numbers_of_layer)):
        chosen = slice(layers.start, layers.stop)
        for kind, (adapter, x) in enumerate(zip(adapters, inputs.of_layers(layers), strict=True)):
            parts = {
                name: parameter[sets_of_layers(parameter, layers, num_layers)]
                for name, parameter in adapter.named_parameters()
            }
            output = functional_call(adapter, parts, (x,))
            if standard is not None:
                mean, deviation = standard[0][kind, chosen, None], standard[1][kind, chosen, None, None]
                output = mean + deviation * output
            if layers.start == 0:
                outputs.append(output.new_empty(shape[0], num_layers, *output.shape[2:]))
            outputs[kind][:, chosen] = output
    return outputs[0], outputs[1]


def is_bare(adapter: nn.Module) -> bool:
    """Whether ``adapter`` may be called on some of its weights: nothing has wrapped or hooked it, as sharded training
    does, where weights are whole inside the adapter's own forward pass only."""
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in adapter.modules())
    return type(adapter) is ElasticBottleneck and not hooked


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
        return (None, None, None, None, *times_arriving(ctx.saved_tensors, arriving))
