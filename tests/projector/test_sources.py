"""A projection that joins what adapters read for a few layers at a time, against one that joins it for all at once."""

from typing import Any

import pytest
import torch

from kvgraft.errors import ProjectorError
from kvgraft.projector import layerwise
from kvgraft.projector.adapters import ElasticBottleneck
from kvgraft.projector.projector import KVDimensionProjector

LAYERS, TOKENS, TEACHER = 6, 5, "a.teacher"
SOURCES = {TEACHER: [[layer, (layer + 2) % LAYERS] for layer in range(LAYERS)]}
# What is read and what is shared: the number of layers in a piece then depends on both.
SETTINGS = {
    "shared": {},
    "per layer": {"sharing": "per_layer"},
    "grouped": {"sharing": "grouped", "num_groups": 2},
    "trunk": {"sharing": "trunk", "num_groups": 2, "skip": True},
    "linear": {"sharing": "per_layer", "mlp_ratio": "linear"},
    "several layers of both kinds": {"sharing": "per_layer", "source_layers": SOURCES, "source_kinds": "both"},
    "tokens before": {"sharing": "per_layer", "source_layers": SOURCES, "context_tokens": 2},
}


def made(setting: str) -> KVDimensionProjector:
    torch.manual_seed(0)
    options = {"init_method": "normal", **SETTINGS[setting]}
    projector = KVDimensionProjector({TEACHER: {"d_model": 8, "num_layers": LAYERS}}, 6, **options)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    projector.standardise_inputs(TEACHER, torch.randn(2, LAYERS, 8), torch.rand(2, LAYERS, 8) + 0.5)
    projector.standardise_outputs(TEACHER, torch.randn(2, LAYERS, 6), torch.rand(2, LAYERS) + 0.5)
    return projector.eval()


@pytest.mark.parametrize("piece_numbers", [1, 400, 1 << 20])
@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_all_layers_at_once(setting: str, piece_numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "_CACHED_NUMBERS", piece_numbers)
    projector = made(setting)
    keys, values = torch.randn(2, 2, LAYERS, TOKENS, 8)
    plain = projector.project_teacher_kv(TEACHER, keys, values)
    assert plain[0].requires_grad
    with torch.no_grad():
        found = projector.project_teacher_kv(TEACHER, keys, values)
    for part, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(part, expected.detach(), atol=1e-5, rtol=1e-5)


def test_fewer_layers_through_a_shared_adapter() -> None:
    projector = KVDimensionProjector({TEACHER: {"d_model": 8, "num_layers": LAYERS}}, 6).eval()
    keys, values = torch.randn(2, 1, 2, TOKENS, 8)
    plain = projector.project_teacher_kv(TEACHER, keys, values)
    with torch.no_grad():
        found = projector.project_teacher_kv(TEACHER, keys, values)
    for part, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(part, expected.detach())


@pytest.mark.parametrize(("device", "pieces"), [("cpu", LAYERS), ("meta", 1)])
def test_a_processor_gets_small_pieces_and_another_device_large_ones(
    device: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "_CACHED_NUMBERS", 1)
    call, calls = layerwise.functional_call, []

    def call_and_note(adapter: ElasticBottleneck, *arguments: Any) -> torch.Tensor:
        calls.append(adapter)
        return call(adapter, *arguments)

    monkeypatch.setattr(layerwise, "functional_call", call_and_note)
    projector = made("per layer").to(device)
    with torch.no_grad():
        keys, _ = projector.project_teacher_kv(TEACHER, *torch.randn(2, 1, LAYERS, TOKENS, 8, device=device))
    assert keys.device.type == device
    assert len(calls) == 2 * pieces


def test_a_hooked_adapter_is_called_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "_CACHED_NUMBERS", 1)
    projector, calls = made("per layer"), []
    projector.adapters(TEACHER)[0].register_forward_hook(lambda *_: calls.append(1))
    keys, values = torch.randn(2, 1, LAYERS, TOKENS, 8)
    with torch.no_grad():
        projector.project_teacher_kv(TEACHER, keys, values)
    assert calls == [1]


@torch.no_grad()
def test_no_tokens_and_too_many_layers() -> None:
    projector = made("per layer")
    keys, values = projector.project_teacher_kv(TEACHER, *torch.randn(2, 1, LAYERS, 0, 8))
    assert keys.shape == values.shape == (1, LAYERS, 0, 6)
    with pytest.raises(ProjectorError, match="has 7 layers"):
        projector.project_teacher_kv(TEACHER, *torch.randn(2, 1, LAYERS + 1, TOKENS, 8))
