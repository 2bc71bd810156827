"""Kept gradients in a backward pass: right however often they are asked for, and not copied for the last time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kvgraft import gradients
from kvgraft.gradients import times_arriving


class Weighted(torch.autograd.Function):
    """The sum of ``x * weights``. Its gradient is kept, at a place that ``places`` gets to know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, places: list[int]) -> Tensor:
        kept = weights.clone()
        places.append(kept.data_ptr())
        ctx.save_for_backward(kept, None, None)
        return (x * weights).sum()

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(times_arriving(ctx.saved_tensors, arriving))


WEIGHTS = [1.0, 2.0, -4.0]


def made() -> tuple[Tensor, Tensor, int]:
    """A leaf, three times its weighted sum, and where the kept gradient is."""
    x, places = torch.randn(3, requires_grad=True), []
    loss = Weighted.apply(x, torch.tensor(WEIGHTS), places)  # type: ignore[no-untyped-call]
    return x, 3 * loss, places[0]


def test_every_pass_gets_its_own_and_the_last_one_the_kept() -> None:
    x, loss, place = made()
    for _ in range(2):
        (found,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert found.tolist() == [3 * weight for weight in WEIGHTS]
        assert found.data_ptr() != place
    loss.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3 * weight for weight in WEIGHTS]
    assert x.grad.data_ptr() == place


def test_a_torch_that_cannot_tell_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_graph_is_kept", lambda: True)
    x, loss, place = made()
    loss.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3 * weight for weight in WEIGHTS]
    assert x.grad.data_ptr() != place
