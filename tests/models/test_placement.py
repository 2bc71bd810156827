"""Models in few bits and on several devices: what is captured from them, and what is refused."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvgraft.errors import ModelError
from kvgraft.identify import identify
from kvgraft.models import placement
from kvgraft.models.capture import KVRecorder, capture
from kvgraft.models.head import head_of, hidden_states
from kvgraft.models.loading import load_model
from kvgraft.recipe import TeacherRecipe

INPUT_IDS = torch.arange(24).view(2, 12) + 3
MASK = torch.ones_like(INPUT_IDS).index_fill(1, torch.tensor([11]), 0)
ON_DISK = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.layers.3": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="module")
def plain(tiny_teacher: Path) -> PreTrainedModel:
    return load_model(str(tiny_teacher), device="cpu")


@pytest.fixture(scope="module")
def in_blocks_of_64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama whose weights bitsandbytes can pack for processors with bfloat16 instructions."""
    folder = tmp_path_factory.mktemp("blocks")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, ON_DISK], ids=["auto", "cpu", "disk"])
def test_where_the_parts_are_does_not_change_what_they_compute(
    tiny_teacher: Path, plain: PreTrainedModel, device_map: object
) -> None:
    spread = load_model(str(tiny_teacher), device_map=device_map)
    if device_map is ON_DISK:
        assert {parameter.device.type for parameter in spread.parameters()} == {"cpu", "meta"}
    kv, expected = capture(spread, INPUT_IDS, MASK), capture(plain, INPUT_IDS, MASK)
    assert torch.equal(kv.keys, expected.keys)
    assert torch.equal(kv.values, expected.values)
    torch.testing.assert_close(hidden_states(spread, INPUT_IDS, MASK), hidden_states(plain, INPUT_IDS, MASK))


def test_layers_of_several_devices_are_brought_to_one(plain: PreTrainedModel) -> None:
    recorder = KVRecorder(plain, [0, 1], rotated=True)
    for layer, device in enumerate(("cpu", "meta")):
        recorder.note(layer, torch.zeros(1, 2, 5, 8, device=device), torch.zeros(1, 2, 5, 8, device=device))
    kv = recorder.kv(torch.ones(1, 5, device="meta"))
    assert kv.keys.device == kv.values.device == kv.mask.device == torch.device("meta")
    assert kv.keys.shape == (1, 2, 2, 5, 8)


def test_a_head_on_disk_is_named(tiny_teacher: Path) -> None:
    model = load_model(str(tiny_teacher), device_map={**ON_DISK, "lm_head": "disk"})
    with pytest.raises(ModelError, match="put lm_head on a device in device_map"):
        head_of(model)


# Relative errors of keys: int8 about 0.01, 4-bit about 0.1.
@pytest.mark.parametrize(
    ("quantization", "package", "largest"),
    [("8bit", "bitsandbytes", 0.03), ("4bit", "bitsandbytes", 0.3), ("torchao_8bit", "torchao", 0.03)],
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_few_bits_give_nearly_the_same_kv(
    in_blocks_of_64: Path, quantization: placement.Quantization, package: str, largest: float
) -> None:
    pytest.importorskip(package)
    plain = load_model(str(in_blocks_of_64), device="cpu")
    model = load_model(str(in_blocks_of_64), device="cpu", quantization=quantization)
    assert not model.training
    kv, expected = capture(model, INPUT_IDS, MASK), capture(plain, INPUT_IDS, MASK)
    for one, other in ((kv.keys, expected.keys), (kv.values, expected.values)):
        assert 0 < relative_difference(one, other) < largest
    # The head stays in full numbers.
    assert torch.equal(head_of(model).weight, head_of(plain).weight)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_8bit_does_not_tell_every_cast(in_blocks_of_64: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(str(in_blocks_of_64), device="cpu", quantization="8bit")
    capture(model, INPUT_IDS, MASK)
    assert [record.getMessage() for record in caplog.records if "will be cast" in record.getMessage()] == []


@pytest.mark.parametrize("quantization", ["8bit", "4bit", "torchao_8bit"])
def test_a_package_that_is_missing_is_named(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, quantization: placement.Quantization
) -> None:
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    package = "torchao" if quantization == "torchao_8bit" else "bitsandbytes"
    with pytest.raises(ModelError, match=rf"{quantization} needs the package {package}.*kvgraft\[quantization\]"):
        load_model(str(tiny_teacher), quantization=quantization)


def test_a_place_that_does_not_exist_is_an_error_of_ours(tiny_teacher: Path) -> None:
    with pytest.raises(ModelError, match="device 'nowhere' cannot be used here"):
        load_model(str(tiny_teacher), device_map={"model": "disk", "lm_head": "nowhere"})


def test_several_processes_do_not_each_spread_a_model(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        num_processes = 2

    monkeypatch.setattr(placement, "process_state", Two)
    with pytest.raises(ModelError, match="2 processes would each do so"):
        load_model(str(tiny_teacher), device_map="auto")


def test_a_store_is_of_these_bits(tiny_teacher: Path) -> None:
    settings = {"name": "teacher", "model": str(tiny_teacher), "device_map": "auto"}
    plain, same, few = (
        identify(TeacherRecipe.model_validate({**settings, **change})).fingerprint
        for change in ({}, {"device_map": None}, {"quantization": "4bit"})
    )
    assert plain == same
    assert few == f"{plain}, 4bit"


def test_a_teacher_is_in_one_place() -> None:
    with pytest.raises(ValueError, match=r"device cpu and device_map auto both say where the teacher is"):
        TeacherRecipe(name="teacher", model="owner/name", device="cpu", device_map="auto")
