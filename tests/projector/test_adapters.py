import pytest
import torch
from torch import nn

from kvgraft.errors import ProjectorError
from kvgraft.projector.adapters import ElasticBottleneck, dead_unit_share, layer_sets

ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU}


def reference(adapter: ElasticBottleneck, layer: int) -> nn.Sequential:
    """The guide's plain module with the weights of one layer of ``adapter``."""
    hidden = adapter.up.weight.shape[1]
    modules = [nn.LayerNorm(adapter.in_dim)] if adapter.norm is not None else []
    modules += [
        nn.Linear(adapter.in_dim, hidden),
        ACTIVATIONS[adapter.activation](),
        nn.Dropout(adapter.dropout),
        nn.Linear(hidden, adapter.out_dim),
    ]
    stacked = [part for part in (adapter.norm, adapter.up, adapter.down) if part is not None]
    plain = [module for module in modules if hasattr(module, "weight")]
    for source, target in zip(stacked, plain, strict=True):
        target.load_state_dict({"weight": source.weight[layer], "bias": source.bias[layer]})
    return nn.Sequential(*modules).eval()


def randomised(adapter: ElasticBottleneck) -> ElasticBottleneck:
    """Biases and norms away from 0 and 1, so that swapping two of them shows."""
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    return adapter.eval()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_matches_plain_modules(num_layers: int, layer_norm: bool, activation: str) -> None:
    adapter = ElasticBottleneck(12, 5, 1.5, num_layers=num_layers, layer_norm=layer_norm, activation=activation)
    randomised(adapter)
    x = torch.randn(2, 3, 4, 12)
    expected = torch.stack([reference(adapter, layer % num_layers)(x[:, layer]) for layer in range(3)], 1)
    torch.testing.assert_close(adapter(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_gradients_match_plain_modules(num_layers: int) -> None:
    adapter = randomised(ElasticBottleneck(6, 4, 2.0, num_layers=num_layers))
    plain = [reference(adapter, layer) for layer in range(num_layers)]
    x = torch.randn(2, 3, 4, 6)
    adapter(x).square().sum().backward()
    for layer in range(3):
        plain[layer % num_layers](x[:, layer]).square().sum().backward()
    for layer in range(num_layers):
        expected = plain[layer][1].weight.grad
        torch.testing.assert_close(adapter.up.weight.grad[layer], expected, atol=1e-4, rtol=1e-4)


def test_layers_do_not_mix() -> None:
    adapter = ElasticBottleneck(6, 4, num_layers=3).eval()
    x = torch.randn(2, 3, 4, 6)
    changed = x.clone()
    changed[:, 1] += 1
    same = (adapter(x) == adapter(changed)).all(-1).all(-1).all(0)
    assert same.tolist() == [True, False, True]


@pytest.mark.parametrize("num_layers", [1, 2])
def test_skip_starts_as_its_linear_map_and_then_learns(num_layers: int) -> None:
    adapter = ElasticBottleneck(6, 4, num_layers=num_layers, skip=True)
    weight, bias = torch.randn(num_layers, 4, 6), torch.randn(num_layers, 4)
    adapter.load_linear(weight, bias)
    x = torch.randn(2, 2, 3, 6)
    expected = torch.einsum("blti,loi->blto", x, weight.expand(2, 4, 6)) + bias.expand(2, 4)[:, None]
    torch.testing.assert_close(adapter(x), expected, atol=1e-5, rtol=1e-5)
    adapter(x).sum().backward()
    assert adapter.down.weight.grad.abs().max() > 0


def test_linear_ratio_is_one_linear_layer() -> None:
    adapter = ElasticBottleneck(6, 4, "linear", skip=True)
    plain = nn.Linear(6, 4)
    adapter.load_linear(plain.weight[None], plain.bias[None])
    x = torch.randn(2, 3, 5, 6)
    assert torch.equal(adapter(x), plain(x))
    assert sorted(name for name, _ in adapter.named_parameters()) == ["skip.bias", "skip.weight"]


def test_load_linear_says_what_it_needs() -> None:
    with pytest.raises(ProjectorError, match="skip=True"):
        ElasticBottleneck(6, 4).load_linear(torch.zeros(1, 4, 6), torch.zeros(1, 4))
    with pytest.raises(ProjectorError, match=r"\[2, 4, 6\].*got \[2, 6, 4\]"):
        ElasticBottleneck(6, 4, num_layers=2, skip=True).load_linear(torch.zeros(2, 6, 4), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("init_method", "bound"),
    [("xavier", (6 / (200 + 100)) ** 0.5), ("kaiming", (6 / 200) ** 0.5)],
)
@pytest.mark.parametrize("num_layers", [1, 7])
def test_init_uses_the_fans_of_one_adapter(init_method: str, bound: float, num_layers: int) -> None:
    adapter = ElasticBottleneck(200, 30, 0.5, init_method=init_method, num_layers=num_layers)
    for weight in adapter.up.weight.detach():
        assert 0.97 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert adapter.up.bias.abs().max() == 0


def test_normal_init_has_std_002() -> None:
    adapter = ElasticBottleneck(200, 100, 1.0, init_method="normal", num_layers=2)
    assert adapter.up.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert adapter.down.weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_dropout_only_in_training() -> None:
    adapter = ElasticBottleneck(20, 4, dropout=0.5)
    x = torch.randn(1, 1, 8, 20)
    assert not torch.equal(adapter(x), adapter(x))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


def test_hidden_width_is_at_least_one_and_rounds_down() -> None:
    assert ElasticBottleneck(5, 4, 0.5).up.weight.shape == (1, 2, 5)
    assert ElasticBottleneck(5, 4, 0.01).up.weight.shape == (1, 1, 5)


def test_half_precision_input_is_mapped_in_the_weights_dtype() -> None:
    adapter = ElasticBottleneck(6, 4).eval()
    x = torch.randn(1, 2, 3, 6).bfloat16()
    assert torch.equal(adapter(x), adapter(x.float()))


def test_dead_unit_share_counts_units_dead_on_every_real_token() -> None:
    adapter = ElasticBottleneck(4, 2, 1.0, activation="relu", layer_norm=False)
    with torch.no_grad():
        adapter.up.weight.copy_(torch.eye(4)[None])
        adapter.up.bias.copy_(torch.tensor([[0.0, 0.0, -5.0, -5.0]]))
    x = torch.tensor([[1.0, -1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1000.0]]).reshape(1, 1, 2, 4)
    assert dead_unit_share(adapter, x) == 0.25
    assert dead_unit_share(adapter, x, torch.tensor([[True, False]])) == 0.75
    adapter.activation = "silu"
    assert dead_unit_share(adapter, x + 0.1) == 0
    with pytest.raises(ProjectorError, match="no real token"):
        dead_unit_share(adapter, x, torch.tensor([[False, False]]))
    with pytest.raises(ProjectorError, match="no hidden units"):
        dead_unit_share(ElasticBottleneck(4, 2, "linear"), x)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mlp_ratio", 0.0),
        ("mlp_ratio", "wide"),
        ("mlp_ratio", float("nan")),
        ("mlp_ratio", True),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("init_method", "orthogonal"),
        ("activation", "tanh"),
        ("num_layers", 0),
        ("in_dim", 2.0),
    ],
)
def test_settings_out_of_range_are_named(setting: str, value: object) -> None:
    arguments = {"in_dim": 6, "out_dim": 4, setting: value}
    with pytest.raises(ProjectorError, match=setting):
        ElasticBottleneck(**arguments)


@pytest.mark.parametrize(("layers", "sets"), [(5, 2), (4, 4), (6, 1), (7, 3)])
def test_runs_of_layers_share_an_adapter(layers: int, sets: int) -> None:
    adapter = randomised(ElasticBottleneck(6, 4, num_layers=sets, skip=True))
    x = torch.randn(2, layers, 3, 6)
    shared = layer_sets(layers, sets)
    assert shared == sorted(shared)
    assert max(shared.count(index) for index in range(sets)) - min(shared.count(index) for index in range(sets)) <= 1
    for layer, index in enumerate(shared):
        alone = ElasticBottleneck(6, 4, skip=True).eval()
        alone.load_state_dict({name: part[index : index + 1] for name, part in adapter.state_dict().items()})
        torch.testing.assert_close(adapter(x)[:, layer], alone(x[:, layer : layer + 1])[:, 0], atol=1e-5, rtol=1e-5)


def test_a_trunk_shares_matrices_and_nothing_else() -> None:
    adapter = randomised(ElasticBottleneck(6, 4, num_layers=5, num_trunks=2, skip=True))
    assert adapter.up.weight.shape[0] == adapter.down.weight.shape[0] == 2
    own = {name for name, part in adapter.named_parameters() if len(part) == 5}
    assert own == {"norm.weight", "norm.bias", "up.bias", "down.bias", "skip.weight", "skip.bias"}
    x = torch.randn(2, 5, 3, 6)
    for layer, trunk in enumerate(layer_sets(5, 2)):
        alone = ElasticBottleneck(6, 4, skip=True).eval()
        index = {name: layer if name in own else trunk for name in adapter.state_dict()}
        alone.load_state_dict({name: part[index[name]][None] for name, part in adapter.state_dict().items()})
        torch.testing.assert_close(adapter(x)[:, layer], alone(x[:, layer : layer + 1])[:, 0], atol=1e-5, rtol=1e-5)


def test_least_squares_waits_for_its_map_at_zero() -> None:
    adapter = ElasticBottleneck(6, 4, init_method="least_squares").eval()
    x = torch.randn(1, 1, 3, 6)
    assert float(adapter(x).detach().abs().max()) == 0
    adapter.load_linear(torch.ones(1, 4, 6), torch.zeros(1, 4))
    torch.testing.assert_close(adapter(x), x.sum(-1, keepdim=True).expand(1, 1, 3, 4))


def test_more_trunks_than_layers_are_refused() -> None:
    with pytest.raises(ProjectorError, match="num_trunks 3 is more than num_layers 2"):
        ElasticBottleneck(6, 4, num_layers=2, num_trunks=3)
