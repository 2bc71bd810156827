"""Filling a store from a model: once, batch by batch, on from where it stopped."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvgraft.data.datasets import Example
from kvgraft.data.spans import EncodedText
from kvgraft.data.tokenizers import train_tokenizer
from kvgraft.errors import KVGraftError
from kvgraft.kv import KV
from kvgraft.models.capture import capture
from kvgraft.processes import process_state
from kvgraft.store.fill import FillReport, encode_for_teacher, fill_store, store_folder
from kvgraft.store.fill_kv import KVStoreToFill
from kvgraft.store.format import StoreIdentity, text_fingerprint
from kvgraft.store.reader import KVStore
from kvgraft.store.writer import KVStoreWriter

TEXTS = ["one", "two and two are four", "three apples and five more", "a much longer text than all of the others here"]
LAYERS = (0, 2)


def teacher() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def encoded() -> list[EncodedText]:
    return encode_for_teacher([Example(text) for text in TEXTS], train_tokenizer(TEXTS, 300), 64)


def identity(texts: list[EncodedText]) -> StoreIdentity:
    fingerprint = text_fingerprint(text.sample_key for text in texts)
    return StoreIdentity("model", "tokenizer", fingerprint, LAYERS, 1, 8, "float32", 64)


def fill(folder: Path, load=teacher, token_budget: int = 40) -> tuple[KVStore, FillReport]:
    texts = encoded()
    store = KVStoreToFill(folder, identity(texts), shard_bytes=1000)
    return fill_store(store, "tiny", load, texts, token_budget=token_budget)


@pytest.mark.parametrize("token_budget", [1, 40, 10_000])
def test_stored_kv_is_what_the_model_gives_text_by_text(tmp_path: Path, token_budget: int) -> None:
    store, report = fill(tmp_path, token_budget=token_budget)
    texts, model = encoded(), teacher()
    assert report.tokens == sum(len(text.input_ids) for text in texts) == store.num_tokens
    assert report.tokens_per_second is not None
    for text in texts:
        expected = capture(model, torch.tensor([text.input_ids]), layers=LAYERS)
        stored = store.read(text.sample_key)
        torch.testing.assert_close(stored.kv.keys, expected.keys, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(stored.kv.values, expected.values, atol=1e-6, rtol=1e-5)
        assert (stored.spans == text.spans).all()


def test_kv_is_handed_over_where_the_model_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of use where there is an accelerator, as in tests/test_on_accelerator.py: its KV is converted there.
    device, seen = process_state().device, set()
    add = KVStoreWriter.add

    def noting(writer: KVStoreWriter, key: str, kv: KV, *rest: object) -> None:
        seen.update({kv.keys.device.type, kv.values.device.type})
        add(writer, key, kv, *rest)

    monkeypatch.setattr(KVStoreWriter, "add", noting)
    there, _ = fill(tmp_path / "there", load=lambda: teacher().to(device))
    assert seen == {device.type}
    here, _ = fill(tmp_path / "here")
    for text in encoded():
        key = text.sample_key
        torch.testing.assert_close(there.read(key).kv.keys, here.read(key).kv.keys, atol=1e-6, rtol=1e-5)


def test_second_time_the_teacher_is_not_even_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path)
    with caplog.at_level(logging.INFO):
        store, report = fill(tmp_path, load=lambda: pytest.fail("the teacher was loaded"))
    assert len(store) == len(TEXTS)
    assert report.tokens == 0
    assert report.tokens_per_second is None
    assert "the teacher is not run" in caplog.text


def test_stopped_in_the_middle_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def stop_after_two(model, input_ids, mask, **options):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(input_ids))
        return capture(model, input_ids, mask, **options)

    monkeypatch.setattr("kvgraft.store.fill.capture", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, token_budget=1)
    monkeypatch.undo()
    store, report = fill(tmp_path, token_budget=1)
    assert 0 < report.tokens < store.num_tokens
    whole, _ = fill(tmp_path / "whole", token_budget=1)
    for key in whole.keys():  # noqa: SIM118 - a store is not a mapping
        assert torch.equal(store.read(key).kv.keys, whole.read(key).kv.keys)


def test_a_shard_that_was_damaged_is_made_again(tmp_path: Path) -> None:
    store, _ = fill(tmp_path)
    shard = tmp_path / next(iter(store.manifest.shards))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    again, report = fill(tmp_path)
    assert 0 < report.tokens < again.num_tokens
    KVStore.open(again.folder)


def test_nan_is_named_by_teacher_text_and_layer(tmp_path: Path) -> None:
    def broken() -> LlamaForCausalLM:
        model = teacher()
        model.model.layers[2].self_attn.k_proj.weight.data.fill_(float("nan"))
        return model

    with pytest.raises(KVGraftError, match=r"teacher tiny: sample [0-9a-f]{12} has NaN or Inf in the keys of layer 2"):
        fill(tmp_path, load=broken)


def test_runs_that_differ_never_share_a_folder(tmp_path: Path) -> None:
    texts = encoded()
    one, other = identity(texts), identity(texts[:2])
    assert store_folder(tmp_path, "org/model 1", one) != store_folder(tmp_path, "org/model 1", other)
    assert store_folder(tmp_path, "org/model 1", one).parent == tmp_path
