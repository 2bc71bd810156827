"""A loss a few layers at a time against all layers at once, forward and backward."""

import pytest
import torch
from torch import Tensor

from kvgraft.projector import layerwise
from kvgraft.projector.adapters import ElasticBottleneck
from kvgraft.projector.layerwise import layerwise_loss

LAYERS, TOKENS = 6, 5
# What the layers share: nothing, all, pairs, or the trunk alone.
SHARING = {
    "per layer": {"num_layers": LAYERS},
    "shared": {"num_layers": 1},
    "grouped": {"num_layers": 3},
    "trunk": {"num_layers": LAYERS, "num_trunks": 2},
    "linear": {"num_layers": LAYERS, "mlp_ratio": "linear"},
}


def made(sharing: str, dropout: float = 0.0) -> tuple[ElasticBottleneck, Tensor, Tensor]:
    torch.manual_seed(0)
    options = {"mlp_ratio": 1.5, **SHARING[sharing]}
    adapter = ElasticBottleneck(8, 6, dropout=dropout, init_method="least_squares", **options)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return adapter, torch.randn(1, LAYERS, TOKENS, 8), torch.randn(1, LAYERS, TOKENS, 6)


def gradients(adapter: ElasticBottleneck, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(3 * loss, list(adapter.parameters())))


@pytest.mark.parametrize("piece_layers", [1, 2, 4, LAYERS])
@pytest.mark.parametrize("sharing", SHARING)
def test_equals_all_layers_at_once(sharing: str, piece_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "_PIECE_NUMBERS", piece_layers * TOKENS * 8)
    adapter, x, target = made(sharing)
    seen = []

    def loss_of(output: Tensor, layers: slice) -> Tensor:
        seen.append(layers)
        return (output - target[:, layers]).square().sum() / target.numel()

    loss, expected = layerwise_loss(adapter, x, loss_of), (adapter(x) - target).square().mean()
    assert [layer for layers in seen for layer in range(layers.start, layers.stop)] == list(range(LAYERS))
    assert max(layers.stop - layers.start for layers in seen) <= piece_layers
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(gradients(adapter, loss), gradients(adapter, expected), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_dropout_is_drawn_as_the_plain_way_does_where_all_is_one_piece() -> None:
    adapter, x, _ = made("per layer", dropout=0.5)
    torch.manual_seed(1)
    plain = adapter(x).square().sum()
    torch.manual_seed(1)
    loss = layerwise_loss(adapter, x, lambda output, _: output.square().sum())
    torch.testing.assert_close(loss, plain)
    assert loss != layerwise_loss(adapter.eval(), x, lambda output, _: output.square().sum())


def test_without_gradient_there_is_none() -> None:
    adapter, x, _ = made("per layer")
    with torch.no_grad():
        assert not layerwise_loss(adapter, x, lambda output, _: output.sum()).requires_grad
