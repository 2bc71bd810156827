"""One piece of the fused KV loss: errors of a few layers and rows, and their gradients added to where they are kept.

By hand, or by autograd (which ``torch.compile`` and autocast go through); both give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.func import functional_call

from kvgraft.distill.losses import FORMS, LossForm
from kvgraft.projector.adapters import ElasticBottleneck
from kvgraft.projector.by_hand import BottleneckByHand

SidesGradients = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Piece:
    """What one piece is computed from; ``rows`` are real tokens.

    Attributes:
        parameters: the adapter's for these layers, by name.
        source: ``[layers, rows, in_dim]``.
        target: ``[layers, rows, out_dim]`` in the loss's units.
        dropout: ``[layers, rows, h]``, what hidden units are multiplied by; None for 1.
        output_units: shift ``[layers, 1, out_dim]`` and factor ``[layers, 1, 1]`` from the adapter's output to the
            loss's units; None where it has them.
        weights: ``[layers, rows]`` or ``[layers, 1]``, what each error counts.
    """

    adapter: ElasticBottleneck
    parameters: Mapping[str, Tensor]
    source: Tensor
    target: Tensor
    dropout: Tensor | None
    output_units: tuple[Tensor, Tensor] | None
    form: LossForm
    weights: Tensor

    def by_hand(
        self, gradients: Mapping[str, Tensor | None], wants_target: bool, wants_source: bool
    ) -> tuple[Tensor, SidesGradients]:
        """Errors ``[layers, rows]`` without weights, and the weighted errors' gradients of target and source.

        Those of the parameters are added to ``gradients``, where they are not None.
        """
        adapter = BottleneckByHand(self.adapter, self.parameters, gradients)
        output = adapter.forward(self.source, self.dropout)
        predicted = _in_units(output.float(), self.output_units)
        learns = wants_source or any(gradient is not None for gradient in gradients.values())
        if not learns and not wants_target:
            return FORMS[self.form](predicted, self.target), (None, None)
        errors, of_predicted, of_target = self._compared(predicted, wants_target)
        if not learns:
            return errors, (of_target, None)
        if self.output_units is not None:
            of_predicted = of_predicted * self.output_units[1]
        return errors, (of_target, adapter.backward(of_predicted.to(output.dtype), wants_source))

    def by_autograd(
        self, gradients: Mapping[str, Tensor | None], wants_target: bool, wants_source: bool, compiled: bool
    ) -> tuple[Tensor, SidesGradients]:
        """As :meth:`by_hand`."""
        target, source = self.target.requires_grad_(wants_target), self.source.requires_grad_(wants_source)
        leaves = {
            name: parameter.detach().requires_grad_(gradients[name] is not None)
            for name, parameter in self.parameters.items()
        }
        moved = [leaf for leaf in (target, source, *leaves.values()) if leaf.requires_grad]
        errors_of: Callable[..., Tensor] = _errors
        if compiled:
            errors_of = _compiled_errors()
            for rows in (source, self.dropout, target):
                if rows is not None:
                    torch._dynamo.maybe_mark_dynamic(rows, 1)
        with torch.set_grad_enabled(bool(moved)):
            errors = errors_of(self.adapter, leaves, source, self.dropout, self.output_units, target, self.form)
            loss = (errors * self.weights).sum()
        found = iter(torch.autograd.grad(loss, moved) if moved else ())
        sides = (next(found) if wants_target else None, next(found) if wants_source else None)
        for total in gradients.values():
            if total is not None:
                total.add_(next(found))
        return errors.detach(), sides

    def _compared(self, predicted: Tensor, wants_target: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Errors, and the weighted errors' gradients of ``predicted`` and, if wanted, of the target."""
        if self.form == "mse":
            difference = predicted.sub_(self.target)
            errors = difference.square().mean(-1)
            of_predicted = difference.mul_((self.weights * (2 / difference.shape[-1]))[..., None])
            return errors, of_predicted, -of_predicted if wants_target else None
        leaves = [predicted.requires_grad_(), self.target.requires_grad_(wants_target)]
        with torch.enable_grad():
            errors = FORMS[self.form](predicted, self.target)
            loss = (errors * self.weights).sum()
        found = torch.autograd.grad(loss, leaves if wants_target else leaves[:1])
        return errors.detach(), found[0], found[1] if wants_target else None


def _in_units(output: Tensor, units: tuple[Tensor, Tensor] | None) -> Tensor:
    return output if units is None else torch.addcmul(units[0], output, units[1])


def _errors(
    adapter: ElasticBottleneck,
    parameters: dict[str, Tensor],
    source: Tensor,
    dropout: Tensor | None,
    output_units: tuple[Tensor, Tensor] | None,
    target: Tensor,
    form: LossForm,
) -> Tensor:
    """Errors ``[layers, rows]`` of what ``adapter`` with ``parameters`` makes of ``source [layers, rows, width]``."""
    weights = None if dropout is None else dropout[None]
    output = functional_call(adapter, parameters, (source[None], weights))[0].float()
    return FORMS[form](_in_units(output, output_units), target)


@cache
def _compiled_errors() -> Callable[..., Tensor]:
    """:func:`_errors`, compiled once for any number of rows."""
    return torch.compile(_errors)
