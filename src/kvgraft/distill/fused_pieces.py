"""One piece of the fused KV loss: errors of a few layers and rows, and their gradients added to where they are kept.

By hand, also under autocast and when ``torch.compile`` makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

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
        target: ``[layers, rows, out_dim]`` less its centre.
        deviation: ``[layers, 1, 1]``, by which the target is divided to the loss's units.
        dropout: ``[layers, rows, h]``, what hidden units are multiplied by; None for 1.
        output_units: shift ``[layers, 1, out_dim]`` and factor ``[layers, 1, 1]`` from the adapter's output to the
            loss's units; None where it has them.
        weights: ``[layers, rows]`` or ``[layers, 1]``, what each error counts.
    """

    adapter: ElasticBottleneck
    parameters: Mapping[str, Tensor]
    source: Tensor
    target: Tensor
    deviation: Tensor
    dropout: Tensor | None
    output_units: tuple[Tensor, Tensor] | None
    form: LossForm
    weights: Tensor

    def errors_and_gradients(
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
            return FORMS[self.form](predicted, self.target / self.deviation), (None, None)
        errors, of_predicted, of_target = self._compared(predicted, wants_target)
        if of_target is not None:
            of_target = of_target / self.deviation
        if not learns:
            return errors, (of_target, None)
        if self.output_units is not None:
            of_predicted = of_predicted * self.output_units[1]
        return errors, (of_target, adapter.backward(of_predicted.to(output.dtype), wants_source))

    def _compared(self, predicted: Tensor, wants_target: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Errors, and the weighted errors' gradients of ``predicted`` and, if wanted, of the target in its units."""
        if self.form == "mse":
            difference = predicted.addcdiv_(self.target, self.deviation, value=-1)
            errors = difference.square().mean(-1)
            of_predicted = difference.mul_((self.weights * (2 / difference.shape[-1]))[..., None])
            return errors, of_predicted, -of_predicted if wants_target else None
        errors, backward = torch.func.vjp(FORMS[self.form], predicted, self.target / self.deviation)[:2]
        of_predicted, of_target = backward(self.weights.expand_as(errors))
        return errors, of_predicted, of_target if wants_target else None


def _in_units(output: Tensor, units: tuple[Tensor, Tensor] | None) -> Tensor:
    return output if units is None else torch.addcmul(units[0], output, units[1])


def compiled_errors_and_gradients(
    piece: Piece, gradients: Mapping[str, Tensor | None], wants_target: bool, wants_source: bool
) -> tuple[Tensor, SidesGradients]:
    """:meth:`Piece.errors_and_gradients`, compiled once for any number of rows."""
    for rows in (piece.source, piece.dropout, piece.target, piece.weights):
        if rows is not None and rows.shape[1] > 1:
            torch._dynamo.maybe_mark_dynamic(rows, 1)
    return _compiled()(piece, gradients, wants_target, wants_source)


@cache
def _compiled() -> Callable[..., tuple[Tensor, SidesGradients]]:
    return torch.compile(Piece.errors_and_gradients)
