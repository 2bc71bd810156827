"""Reading: the numbers that were put in, by layer and by key, in this process and in forked workers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from kvgraft.data.spans import sample_key
from kvgraft.errors import StoreError
from kvgraft.store.checksum import checksum
from kvgraft.store.format import StoreIdentity
from kvgraft.store.open_shards import OpenShard
from kvgraft.store.reader import KVStore
from kvgraft.store.writer import KVStoreWriter
from tests.store.test_writer import (
    IDENTITY,
    KEYS,
    SHARD_BYTES,
    TEXTS,
    add,
    assert_same_content,
    fill,
    make_kv,
    make_spans,
    shard_names,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layers", [None, [4], [5, 1, 1, 4, 5]])
def test_what_was_added_comes_back(tmp_path: Path, dtype: str, layers: list[int] | None) -> None:
    identity = replace(IDENTITY, dtype=dtype)
    store = fill(tmp_path, list(range(7)), identity)
    for index, key in enumerate(KEYS):
        stored = store.read(key, layers=layers)
        kept = make_kv(index).to(identity.torch_dtype).to(torch.float32)
        expected = kept if layers is None else kept.select_layers(layers)
        assert stored.kv.keys.dtype == torch.float32
        assert torch.equal(stored.kv.keys, expected.keys)
        assert torch.equal(stored.kv.values, expected.values)
        assert stored.kv.layers == expected.layers
        assert not stored.kv.rotated
        assert stored.kv.positions.tolist() == [list(range(expected.mask.shape[1]))]
        assert stored.kv.mask.all()
        assert stored.spans.dtype == np.int32
        np.testing.assert_array_equal(stored.spans, make_spans(index))
        assert (stored.text_bytes, stored.truncated_bytes) == (len(TEXTS[index]), index)


@pytest.mark.parametrize("layers", [None, [4], [5, 1], [5, 1, 5, 1]])
def test_the_bytes_of_samples_and_no_others_are_asked_for_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: list[int] | None
) -> None:
    store = fill(tmp_path, list(range(7)))
    asked: list[tuple[Path, int, int]] = []
    monkeypatch.setattr(OpenShard, "is_cached", lambda shard, place: False)
    for key in KEYS:
        store.read(key)
    monkeypatch.setattr(OpenShard, "ask_ahead", lambda shard, *place: asked.append((shard._path, *place)))
    chosen = [KEYS[5], KEYS[2]]
    store.ask_ahead(chosen, layers)
    found = b"".join(path.read_bytes()[start : start + length] for path, start, length in asked)
    # Each once, however often it is read.
    once = None if layers is None else list(dict.fromkeys(layers))
    stored = [store.read(key, once, as_stored=True).kv for key in chosen]
    kinds = [torch.stack(kv.flatten(), 2)[0] for kv in stored]
    assert found == b"".join(kind.contiguous().numpy().tobytes() for kind in kinds)


def test_asking_ahead_names_what_is_not_there(tmp_path: Path) -> None:
    store = fill(tmp_path, [1])
    with pytest.raises(StoreError, match="is not in the KV store"):
        store.ask_ahead([KEYS[2]])
    with pytest.raises(StoreError, match="teacher layers"):
        store.ask_ahead([KEYS[1]], [99])


def test_layout_on_disk_is_layer_major_with_heads_joined(tmp_path: Path) -> None:
    store = fill(tmp_path, [1, 3])
    (name,) = shard_names(tmp_path)
    shard = store._shard(name)
    kv = make_kv(3)
    raw = shard.get_tensor("kv")
    assert list(raw.shape) == [4 + 3, 3 * 2 * 8]
    sample = raw[4:].view(3, 2, 3, 8)
    assert torch.equal(sample[1, 1, 2], kv.values[0, 1, :, 2].flatten())
    assert torch.equal(sample[2, 0, 0], kv.keys[0, 2, :, 0].flatten())


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_store_of_format_version_1_is_read_and_not_continued(tmp_path: Path, dtype: str) -> None:
    identity = replace(IDENTITY, dtype=dtype)
    store = fill(tmp_path / "now", list(range(7)), identity)
    old = shutil.copytree(tmp_path / "now", tmp_path / "old")
    content = json.loads((old / "manifest.json").read_text())
    content["identity"]["format_version"] = 1
    for name in store.manifest.shards:
        tensors = load_file(old / name)
        for sample in store.manifest.samples.values():
            if sample.shard == name:
                rows = tensors["kv"][sample.first_token : sample.first_token + sample.tokens]
                rows.copy_(rows.clone().view(3, 2, sample.tokens, -1).permute(2, 0, 1, 3).flatten(1))
        tensors["kv"] = tensors["kv"].unflatten(1, (3, 2, -1))
        (old / name).write_bytes(shard := kv_last(tensors))
        # The checksum's name and kind were others.
        known = content["shards"][name]
        content["shards"][name] = {"tokens": known["tokens"], "samples": known["samples"], "bytes": len(shard)}
        content["shards"][name]["sha256"] = hashlib.sha256(shard).hexdigest()
    (old / "manifest.json").write_text(json.dumps(content))

    then = KVStore.open(old, identity)
    assert_same_content(then, store)
    some = then.read(KEYS[4], layers=[5, 1])
    assert torch.equal(some.kv.values, store.read(KEYS[4], layers=[5, 1]).kv.values)
    with pytest.raises(StoreError, match=r"version 1, which can be read but not continued.* Delete the folder"):
        KVStoreWriter(old, identity, SHARD_BYTES)


def kv_last(tensors: dict[str, torch.Tensor]) -> bytes:
    """A shard as it was before KV stood in front of the spans: the KV last, and no room before it."""
    codes = {torch.int32: "I32", torch.int64: "I64", torch.float64: "F64", torch.float32: "F32"}
    codes |= {torch.float16: "F16", torch.uint8: "U8"}
    header, data = {}, b""
    for name in ("count", "mean", "m2", "spans", "kv"):
        content = tensors[name].numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        shape = list(tensors[name].shape)
        header[name] = {"dtype": codes[tensors[name].dtype], "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_shards_whose_kv_is_last_are_read_and_continued(tmp_path: Path, dtype: str) -> None:
    identity = replace(IDENTITY, dtype=dtype)
    with KVStoreWriter(tmp_path / "old", identity, SHARD_BYTES) as writer:
        for index in range(5):
            add(writer, index)
        writer.finish()
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    content = json.loads((tmp_path / "old" / "manifest.json").read_text())
    for name, shard in content["shards"].items():
        path = tmp_path / "old" / name
        path.write_bytes(kv_last(load_file(path)))
        shard["bytes"], shard["checksum"] = path.stat().st_size, checksum([path.read_bytes()])
        del shard["head_bytes"]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(content))

    for folder in ("old", "new"):
        with KVStoreWriter(tmp_path / folder, identity, SHARD_BYTES) as writer:
            assert writer.missing(KEYS) == KEYS[5:]
            for index in (5, 6):
                add(writer, index)
            writer.finish()
    old, new = KVStore.open(tmp_path / "old"), KVStore.open(tmp_path / "new")
    assert_same_content(old, new)
    for key in KEYS:
        assert torch.equal(old.read(key, [5, 1]).kv.keys, new.read(key, [5, 1]).kv.keys)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_as_stored_is_the_mapped_file_itself(tmp_path: Path, dtype: str) -> None:
    store = fill(tmp_path, list(range(7)), replace(IDENTITY, dtype=dtype))
    one, other = store.read(KEYS[4], as_stored=True).kv, store.read(KEYS[4], as_stored=True).kv
    assert one.keys.dtype == one.values.dtype == store.identity.torch_dtype
    assert one.keys.data_ptr() == other.keys.data_ptr()
    assert torch.equal(one.keys.float(), store.read(KEYS[4]).kv.keys)
    some = store.read(KEYS[4], layers=[5, 1], as_stored=True).kv
    assert torch.equal(some.values, one.select_layers([5, 1]).values)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice on files")
def test_the_system_is_asked_for_the_layers_that_are_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, list(range(7)))
    asked: list[bytes] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda file, offset, length, advice: asked.append(os.pread(file, length, offset))
    )
    cached = False
    monkeypatch.setattr(OpenShard, "is_cached", lambda shard, place: cached)
    store = KVStore.open(tmp_path)
    store.read(KEYS[0])
    # Of each file all that is not KV, at first, and the byte of the KV that mapping it looks at.
    beginning, end = asked
    content = (tmp_path / store.manifest.samples[KEYS[0]].shard).read_bytes()
    assert content[: len(beginning)] == beginning
    assert len(beginning) == store.manifest.shards["kv-00000.safetensors"].head_bytes + 1
    assert content[-len(end) :] == end
    assert end.startswith(store.read_spans(KEYS[0]).astype("int32").tobytes())
    for key in KEYS:
        store.read(key)
        asked.clear()
        stored = store.read(key, layers=IDENTITY.layers[-1:], as_stored=True).kv
        (content,) = asked
        both = [part[0, 0].transpose(0, 1).flatten(1) for part in (stored.keys, stored.values)]
        assert content == torch.stack(both).numpy().tobytes()
    asked.clear()
    cached = True
    store.read(KEYS[0], layers=IDENTITY.layers[-1:])
    assert not asked


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system does not say what it has cached")
def test_a_byte_is_cached_where_it_comes_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"kv": torch.zeros(4)}, tmp_path / "file")
    shard = OpenShard(tmp_path / "file")
    # No file system can refuse to answer then, as some do.
    monkeypatch.setattr(os, "RWF_NOWAIT", 0, raising=False)
    assert shard.is_cached(0)
    assert not shard.is_cached(1 << 20)

    def would_wait(*_: object) -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", would_wait)
    assert not shard.is_cached(0)


def test_no_shard_is_kept_open(tmp_path: Path) -> None:
    store = fill(tmp_path, list(range(7)))
    process = psutil.Process()
    before = process.num_fds()
    for key in KEYS:
        store.read(key, layers=IDENTITY.layers[-1:])
    store.statistics()
    assert len(store.manifest.shards) > 1
    assert process.num_fds() == before


def test_spans_are_read_without_the_kv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(tmp_path, [0, 1, 2])
    touched: list[str] = []
    real = KVStore._slice
    monkeypatch.setattr(KVStore, "_slice", lambda self, entry, name: touched.append(name) or real(self, entry, name))
    np.testing.assert_array_equal(store.read_spans(KEYS[2]), make_spans(2))
    assert touched == ["spans"]


def test_changing_a_sample_does_not_change_the_store(tmp_path: Path) -> None:
    store = fill(tmp_path, [0])
    first = store.read(KEYS[0])
    first.kv.keys.zero_()
    first.spans[:] = -1
    assert torch.equal(store.read(KEYS[0]).kv.keys, make_kv(0).keys)
    np.testing.assert_array_equal(store.read(KEYS[0]).spans, make_spans(0))
    KVStore.open(tmp_path)


def _all_tokens() -> torch.Tensor:
    packed = []
    for index in range(7):
        keys, values = make_kv(index).flatten()
        packed.append(torch.stack([keys[0], values[0]], dim=2).transpose(0, 1))
    return torch.cat(packed)


def test_statistics_are_those_of_all_tokens(tmp_path: Path) -> None:
    store = fill(tmp_path, list(range(7)))
    tokens = _all_tokens()
    statistics = store.statistics()
    assert statistics.count == len(tokens) == store.num_tokens
    assert statistics.mean.dtype == statistics.variance.dtype == torch.float32
    torch.testing.assert_close(statistics.mean, tokens.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(statistics.variance, tokens.var(0, correction=0), rtol=1e-6, atol=1e-6)
    some = store.statistics(layers=[5, 1, 5])
    assert torch.equal(some.mean, statistics.mean[[2, 0, 2]])
    assert torch.equal(some.variance, statistics.variance[[2, 0, 2]])


def test_statistics_hold_for_a_mean_far_from_zero(tmp_path: Path) -> None:
    with KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES) as writer:
        shifted = []
        for index in range(7):
            kv = make_kv(index)
            shifted.append(replace(kv, keys=kv.keys + 3000.0))
            add(writer, index, shifted[-1])
        writer.finish()
    keys = torch.cat([kv.flatten()[0][0] for kv in shifted], dim=1).double()
    variance = KVStore.open(tmp_path).statistics().variance[:, 0]
    torch.testing.assert_close(variance.double(), keys.var(1, correction=0), rtol=2e-4, atol=0.0)


def test_only_counted_tokens_enter_the_statistics(tmp_path: Path) -> None:
    with KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES) as writer:
        for index in range(3):
            kv = make_kv(index)
            kv.keys[..., 0, :] = 1e4
            counted = torch.arange(kv.mask.shape[1]) > 0
            writer.add(KEYS[index], kv, make_spans(index), 0, 9, counted=counted)
        writer.finish()
    statistics = KVStore.open(tmp_path).statistics()
    kept = torch.cat([make_kv(index).flatten()[0][0, :, 1:] for index in range(3)], dim=1)
    assert statistics.count == kept.shape[1]
    torch.testing.assert_close(statistics.mean[:, 0], kept.mean(1), rtol=1e-6, atol=1e-6)


def test_statistics_need_a_token_that_counts(tmp_path: Path) -> None:
    with KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES) as writer:
        writer.add(KEYS[0], make_kv(0), make_spans(0), 0, 9, counted=torch.zeros(3, dtype=torch.bool))
        writer.finish()
    with pytest.raises(StoreError, match=r"no token .* counts"):
        KVStore.open(tmp_path).statistics()


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    store = fill(tmp_path, list(range(7)))
    on_disk = sum((tmp_path / name).stat().st_size for name in shard_names(tmp_path))
    assert store.total_bytes == on_disk
    assert store.num_tokens == sum(make_kv(index).mask.shape[1] for index in range(7))
    assert store.bytes_per_token == pytest.approx(on_disk / store.num_tokens)
    assert len(store) == 7
    assert KEYS[3] in store
    assert sample_key("a text that was never added") not in store
    assert store.keys() == KEYS
    assert store.identity == IDENTITY


def test_an_absent_sample_or_layer_is_named(tmp_path: Path) -> None:
    store = fill(tmp_path, [0])
    with pytest.raises(StoreError, match=f"sample {KEYS[1][:12]} is not in the KV store"):
        store.read(KEYS[1])
    with pytest.raises(StoreError, match=r"layers \[2\] are not .* holds layers \[1, 4, 5\]"):
        store.read(KEYS[0], layers=[1, 2])
    with pytest.raises(StoreError, match=r"layers \[9\]"):
        store.statistics(layers=[9])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "teacher-b"}, "the teacher: the store holds teacher-a, this run needs teacher-b"),
        ({"tokenizer": "tokenizer-b"}, "the tokenizer: the store holds tokenizer-a, this run needs tokenizer-b"),
        ({"text": "other"}, "the text: the store holds"),
        ({"layers": (1, 4)}, r"the layers: the store holds \[1, 4, 5\], this run needs \[1, 4\]"),
    ],
)
def test_another_identity_is_refused_naming_what_differs(tmp_path: Path, change: dict, sentence: str) -> None:
    fill(tmp_path, [0])
    needed = replace(IDENTITY, **change)
    with pytest.raises(StoreError, match=sentence) as caught:
        KVStore.open(tmp_path, needed)
    assert str(caught.value).count("the store holds") == 1


def test_no_store_and_an_unfinished_store_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no KV store"):
        KVStore.open(tmp_path / "nowhere")
    with KVStoreWriter(tmp_path, IDENTITY, SHARD_BYTES) as writer:
        add(writer, 0)
    with pytest.raises(StoreError, match="incomplete: 1 samples"):
        KVStore.open(tmp_path)


def test_a_flipped_byte_is_found_by_checksum_and_a_short_file_always(tmp_path: Path) -> None:
    fill(tmp_path, list(range(7)))
    name = shard_names(tmp_path)[2]
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 64
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StoreError, match=f"shard {name} .* another checksum"):
        KVStore.open(tmp_path)
    assert len(KVStore.open(tmp_path, verify=False)) == 7
    (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(StoreError, match=f"shard {name} .* bytes where"):
        KVStore.open(tmp_path, verify=False)


class _KeySums(Dataset):  # type: ignore[type-arg]
    def __init__(self, store: KVStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(KEYS)

    def __getitem__(self, index: int) -> tuple[float, int]:
        return float(self.store.read(KEYS[index]).kv.keys.double().sum()), len(self.store._handles)


def test_forked_workers_open_their_own_files(tmp_path: Path) -> None:
    store = fill(tmp_path, list(range(7)))
    data = _KeySums(store)
    here = [data[index][0] for index in range(7)]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    there = list(loader)
    assert [total for total, _ in there] == here
    assert all(processes == 2 for _, processes in there)
    assert len(store._handles) == 1


def test_a_manifest_from_a_later_version_or_damaged_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, [0])
    path = tmp_path / "manifest.json"
    good = json.loads(path.read_text())
    for change, match in [
        ({"identity": {**good["identity"], "format_version": 3}}, "format version 3; this kvgraft reads 2 and 1"),
        ({"samples": {KEYS[0]: {**good["samples"][KEYS[0]], "first_token": 1}}}, "lies outside shard"),
        ({"shards": {"../kv.safetensors": next(iter(good["shards"].values()))}}, "is damaged at shards"),
        ({"identity": {**good["identity"], "dtype": "int3"}}, "is damaged at identity"),
    ]:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(StoreError, match=match):
            KVStore.open(tmp_path)
    path.write_text("{")
    with pytest.raises(StoreError, match="not the manifest"):
        KVStore.open(tmp_path)


def test_a_store_may_be_empty(tmp_path: Path) -> None:
    identity = StoreIdentity("m", "t", "x", (0,), 1, 1, "float32", 4)
    with KVStoreWriter(tmp_path, identity, 10) as writer:
        writer.finish()
    store = KVStore.open(tmp_path, identity)
    assert len(store) == 0
    assert store.bytes_per_token == 0.0
