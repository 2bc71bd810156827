"""The bottleneck's backward pass by hand against autograd."""

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from kvgraft.projector.adapters import ElasticBottleneck
from kvgraft.projector.by_hand import BottleneckByHand

LAYERS, ROWS, IN_DIM, OUT_DIM = 3, 7, 8, 6
ADAPTERS: list[dict[str, Any]] = [
    {},
    {"num_layers": 1, "skip": True},
    {"num_trunks": 1, "activation": "gelu", "init_method": "least_squares"},
    {"layer_norm": False, "activation": "relu", "skip": True},
    {"num_layers": 1, "layer_norm": False},
    {"mlp_ratio": "linear"},
]
by_settings = pytest.mark.parametrize("settings", ADAPTERS, ids=lambda settings: "-".join(map(str, settings.values())))


def made(settings: dict[str, Any]) -> tuple[ElasticBottleneck, Tensor, Tensor, Tensor | None]:
    """An adapter, its input, the gradient that arrives at its output, and a dropout."""
    torch.manual_seed(0)
    adapter = ElasticBottleneck(IN_DIM, OUT_DIM, **{"num_layers": LAYERS, "mlp_ratio": 1.5, **settings})
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    dropout = None if adapter.up is None else 2.0 * (torch.rand(LAYERS, ROWS, adapter.up.weight.shape[1]) < 0.5)
    return adapter, torch.randn(LAYERS, ROWS, IN_DIM), torch.randn(LAYERS, ROWS, OUT_DIM), dropout


def by_hand(
    adapter: ElasticBottleneck,
    x: Tensor,
    arriving: Tensor,
    dropout: Tensor | None,
    wanted: set[str],
    wants_x: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and gradients by name, which are added to ones."""
    parameters = {name: parameter.detach() for name, parameter in adapter.named_parameters()}
    totals = {name: torch.ones_like(parameter) if name in wanted else None for name, parameter in parameters.items()}
    adapter_by_hand = BottleneckByHand(adapter, parameters, totals)
    output = adapter_by_hand.forward(x, dropout)
    of_x = adapter_by_hand.backward(arriving, wants_x)
    assert (of_x is not None) == wants_x
    found = {name: total - 1 for name, total in totals.items() if total is not None}
    return output, found if of_x is None else {**found, "x": of_x}


@by_settings
@pytest.mark.parametrize("drops", [True, False])
def test_equals_autograd(settings: dict[str, Any], drops: bool) -> None:
    adapter, x, arriving, dropout = made(settings)
    dropout = dropout if drops else None
    names = dict(adapter.named_parameters())
    x.requires_grad_()
    expected = adapter.eval()(x[None], None if dropout is None else dropout[None])[0]
    gradients = torch.autograd.grad((expected * arriving).sum(), [x, *names.values()])
    output, found = by_hand(adapter, x.detach(), arriving, dropout, set(names))
    torch.testing.assert_close(output, expected.detach(), atol=1e-5, rtol=1e-5)
    for name, gradient in zip(["x", *names], gradients, strict=True):
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)


@by_settings
def test_what_is_frozen_changes_nothing_else(settings: dict[str, Any]) -> None:
    adapter, x, arriving, dropout = made(settings)
    names = set(dict(adapter.named_parameters()))
    _, whole = by_hand(adapter, x, arriving, dropout, names)
    for frozen in (*({name} for name in names), names):
        for wants_x in (True, False):
            _, found = by_hand(adapter, x, arriving, dropout, names - frozen, wants_x)
            assert found.keys() == whole.keys() - frozen - (set() if wants_x else {"x"})
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, whole[name])


def test_what_came_in_is_left_as_it_was() -> None:
    adapter, x, arriving, dropout = made({"skip": True})
    assert dropout is not None
    before = [tensor.clone() for tensor in (x, arriving, dropout)]
    by_hand(adapter, x, arriving, dropout, set(dict(adapter.named_parameters())))
    for tensor, copy in zip((x, arriving, dropout), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiles_in_bfloat16_to_the_same_gradients() -> None:
    torch.manual_seed(0)
    adapter = ElasticBottleneck(8, 16, dropout=0.0, num_layers=2, skip=True)
    parameters = {name: parameter.detach() for name, parameter in adapter.named_parameters()}

    def gradients(x: Tensor, arriving: Tensor) -> list[Tensor]:
        found = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        by_hand = BottleneckByHand(adapter, parameters, found)
        output = by_hand.forward(x)
        by_hand.backward((output.float() * arriving).to(output.dtype), True)
        return list(found.values())

    x, arriving = torch.randn(2, 37, 8), torch.randn(2, 37, 16)
    with torch.autocast("cpu", torch.bfloat16):
        plain, compiled = gradients(x, arriving), torch.compile(gradients)(x, arriving)
    for one, other in zip(plain, compiled, strict=True):
        assert (one - other).norm() <= 5e-2 * one.norm()
