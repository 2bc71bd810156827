"""Numbers in a few bits: the record byte by byte, what it loses, and stores that are continued."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvgraft.errors import StoreError
from kvgraft.kv import KVGeometry
from kvgraft.processes import process_state
from kvgraft.store import writer as writer_module
from kvgraft.store.format import stored_bytes_per_token
from kvgraft.store.quantize import QUANTIZED_FORMATS, Quantizer, _steps
from kvgraft.store.reader import KVStore
from kvgraft.store.writer import KVStoreWriter
from tests.store.test_writer import IDENTITY, KEYS, SHARD_BYTES, add, assert_same_content, fill, make_kv

DTYPES = list(QUANTIZED_FORMATS)
HEAD_DIM, KV_DIM = 64, 128
# Standard deviation of the error over that of the channel: half a step of 255, of 2^3 per octave, of 16 per group.
LARGEST_ERROR = {"int8": 0.015, "float8": 0.035, "int4": 0.1}


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("kv-*.safetensors"))


def tokens_like_keys(count: int = 400, seed: int = 0) -> Tensor:
    """``[2, 2, count, 128]``: channels of one head correlated, unequal spreads, means far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(2, 2, KV_DIM // HEAD_DIM, HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    numbers = torch.randn(2, 2, KV_DIM // HEAD_DIM, count, HEAD_DIM, generator=generator) @ mixing
    spread, mean = torch.rand(2, 2, 2, 1, KV_DIM, generator=torch.Generator().manual_seed(6)) + 0.1
    return numbers.transpose(2, 3).flatten(-2) * spread + 10 * mean


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_small_beside_each_channels_spread(dtype: str) -> None:
    quantizer = Quantizer.calibrate(dtype, tokens_like_keys(), HEAD_DIM)
    tokens = tokens_like_keys(seed=1)
    error = (quantizer.decode(quantizer.encode(tokens)) - tokens).square().mean(2).sqrt() / tokens.std(2)
    assert float(error.max()) < LARGEST_ERROR[dtype]
    assert float(error.mean()) > LARGEST_ERROR[dtype] / 10


def reference_decode(quantizer: Quantizer, record: Tensor, layer: int, kind: int) -> Tensor:
    """One record taken apart byte by byte."""
    scheme, data = QUANTIZED_FORMATS[quantizer.dtype], bytes(record.tolist())
    kept = quantizer.exact.shape[-1]
    groups = scheme.groups(KV_DIM)
    unit, *exact = struct.unpack(f"<{1 + kept}e", data[: 2 * (1 + kept)])
    shares = struct.unpack(f"<{groups}b", data[2 * (1 + kept) :][:groups])
    codes = data[2 * (1 + kept) + groups :]
    if scheme.floating:
        numbers = torch.tensor(list(codes), dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()
    elif scheme.bits == 8:
        numbers = list(struct.unpack(f"<{KV_DIM}b", codes))
    else:
        numbers = [code % 16 - 8 for code in codes] + [code // 16 - 8 for code in codes]
    size = KV_DIM // groups
    steps = [unit * (1 if share > 0 else -1) * 2 ** (-(abs(share) - 1) / 8) for share in shares]
    found = torch.tensor([number * steps[place // size] for place, number in enumerate(numbers)], dtype=torch.float64)
    found = found * quantizer.deviation[layer, kind]
    if scheme.components:
        heads = [
            matrix.double() @ part
            for matrix, part in zip(quantizer.components[layer, kind], found.split(HEAD_DIM), strict=True)
        ]
        found = torch.cat(heads)
    found = found + quantizer.center[layer, kind]
    for channel, number in zip(quantizer.exact[layer, kind].tolist(), exact, strict=True):
        found[channel] = number
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_record_reads_as_its_bytes_say(dtype: str) -> None:
    quantizer = Quantizer.calibrate(dtype, tokens_like_keys(), HEAD_DIM)
    records = quantizer.encode(tokens_like_keys(3, seed=2))
    assert records.shape == (2, 2, 3, QUANTIZED_FORMATS[dtype].record_bytes(KV_DIM))
    decoded = quantizer.decode(records)
    for token, layer, kind in ((0, 0, 0), (1, 1, 0), (2, 0, 1)):
        expected = reference_decode(quantizer, records[layer, kind, token], layer, kind)
        torch.testing.assert_close(decoded[layer, kind, token].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(quantizer.decode(records[[1, 1, 0]], [1, 1, 0]), decoded[[1, 1, 0]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_far_beyond_the_others_is_not_clipped_and_costs_them_nothing(dtype: str) -> None:
    quantizer = Quantizer.calibrate(dtype, tokens_like_keys(), HEAD_DIM)
    tokens = tokens_like_keys(8, seed=3)
    alone = quantizer.decode(quantizer.encode(tokens[:, :, 1:]))
    tokens[:, :, 0] *= 300
    decoded = quantizer.decode(quantizer.encode(tokens))
    assert torch.equal(decoded[:, :, 1:], alone)
    assert float((decoded - tokens)[:, :, 0].norm() / tokens[:, :, 0].norm()) < 3 * LARGEST_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_channel_comes_back_constant(dtype: str) -> None:
    tokens = tokens_like_keys()
    tokens[..., 7], tokens[..., 90] = 0.0, 1.7
    quantizer = Quantizer.calibrate(dtype, tokens, HEAD_DIM)
    decoded = quantizer.decode(quantizer.encode(tokens))
    assert float((decoded[..., [7, 90]] - torch.tensor([0.0, 1.7])).abs().max()) < 1e-9


def test_the_channel_with_the_heaviest_tail_stays_exact() -> None:
    tokens = tokens_like_keys()
    tokens[1, 0, ::50, 33] *= 40
    quantizer = Quantizer.calibrate("int8", tokens, HEAD_DIM)
    assert quantizer.exact[1, 0].tolist() == [33]
    decoded = quantizer.decode(quantizer.encode(tokens))
    assert torch.equal(decoded[1, 0, :, 33], tokens[1, 0, :, 33].half().float())


@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.52), ("float8", 0.52), ("int4", 0.29)])
@pytest.mark.parametrize("kv_dim", [192, 256, 512, 1024])
def test_bytes_against_float16(dtype: str, share: float, kv_dim: int) -> None:
    geometry = KVGeometry(3, 1, kv_dim)
    assert stored_bytes_per_token(geometry, dtype) <= share * stored_bytes_per_token(geometry, "float16")


def test_with_4_bits_no_next_step_would_leave_a_smaller_error() -> None:
    scheme = QUANTIZED_FORMATS["int4"]
    numbers = torch.randn(50, 1, scheme.group, generator=torch.Generator().manual_seed(0))
    unit, shares = _steps(numbers, scheme)

    def error(row: int, share: int) -> float:
        step = float(unit[row, 0]) * (1 if share > 0 else -1) * 2 ** (-(abs(share) - 1) / 8)
        codes = [min(max(round(number / step), -8), 7) for number in numbers[row, 0].tolist()]
        return sum((code * step - number) ** 2 for code, number in zip(codes, numbers[row, 0].tolist(), strict=True))

    smaller_steps = 0
    for row, (share,) in enumerate(shares.view(torch.int8).tolist()):
        chosen, sign = error(row, share), 1 if share > 0 else -1
        for size in range(1, 4):
            assert chosen <= error(row, sign * size) + 1e-6
        smaller_steps += abs(share) > 1
    assert 10 < smaller_steps < 50


def test_one_token_and_a_file_of_a_quantizer() -> None:
    for dtype in DTYPES:
        quantizer = Quantizer.calibrate(dtype, tokens_like_keys(1), HEAD_DIM)
        again = Quantizer.from_bytes(dtype, quantizer.to_bytes())
        tokens = tokens_like_keys(4)
        records = quantizer.encode(tokens)
        assert torch.equal(records, again.encode(tokens))
        assert torch.isfinite(again.decode(records)).all()


@pytest.mark.usefixtures("early_calibration")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_store_gives_back_what_was_added_up_to_its_bits(tmp_path: Path, dtype: str) -> None:
    identity = replace(IDENTITY, dtype=dtype)
    store = fill(tmp_path, list(range(7)), identity)
    assert store.quantizer is not None
    for index, key in enumerate(KEYS):
        expected, stored = make_kv(index), store.read(key)
        # Scales come from a few tokens of eight channels here: only the plumbing is at stake.
        assert float((stored.kv.keys - expected.keys).abs().mean()) < 3 * LARGEST_ERROR[dtype]
        some = store.read(key, layers=[5, 1, 1])
        assert torch.equal(some.kv.values, stored.kv.select_layers([5, 1, 1]).values)
    statistics = store.statistics()
    plain = fill(tmp_path / "plain", list(range(7))).statistics()
    torch.testing.assert_close(statistics.mean, plain.mean)
    on_disk = sum((tmp_path / name).stat().st_size for name in shard_names(tmp_path))
    assert store.total_bytes == on_disk + (tmp_path / "quantizer.safetensors").stat().st_size


@pytest.mark.usefixtures("early_calibration")
@pytest.mark.parametrize("dtype", ["float32", "float16", *DTYPES, "compact"])
def test_kv_on_an_accelerator_gives_the_same_bits(tmp_path: Path, dtype: str) -> None:
    # Of use where there is one, as in tests/test_on_accelerator.py.
    identity, device = replace(IDENTITY, dtype=dtype), process_state().device
    with KVStoreWriter(tmp_path / "there", identity, 300) as writer:
        for index in range(7):
            add(writer, index, make_kv(index).to(device))
        writer.finish()
    assert_same_content(KVStore.open(tmp_path / "there", identity), fill(tmp_path / "here", list(range(7)), identity))


@pytest.mark.usefixtures("early_calibration")
@pytest.mark.parametrize("dtype", ["float16", "float8", "compact"])
def test_kv_on_apples_accelerator_is_worked_on_by_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    # Of use where there is an accelerator. Apple's has no kernel for this:
    device, count = process_state().device, torch.batch_norm_update_stats

    def count_beside_apples(numbers: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        assert numbers.device.type == "cpu"
        return count(numbers, *rest)

    monkeypatch.setattr(writer_module, "is_apples", lambda given: given == device)
    monkeypatch.setattr(torch, "batch_norm_update_stats", count_beside_apples)
    identity = replace(IDENTITY, dtype=dtype)
    with KVStoreWriter(tmp_path / "there", identity, 300) as writer:
        for index in range(7):
            add(writer, index, make_kv(index).to(device))
        writer.finish()
    assert_same_content(KVStore.open(tmp_path / "there", identity), fill(tmp_path / "here", list(range(7)), identity))


@pytest.mark.usefixtures("early_calibration")
@pytest.mark.parametrize(("dtype", "shard_bytes"), [*((dtype, 300) for dtype in DTYPES), ("compact", 60)])
def test_a_continued_store_has_the_same_bits(tmp_path: Path, dtype: str, shard_bytes: int) -> None:
    identity = replace(IDENTITY, dtype=dtype)
    for indices in ([0, 1, 2, 3], [4], [5, 6]):
        with KVStoreWriter(tmp_path / "parts", identity, shard_bytes) as writer:
            for index in indices:
                add(writer, index)
            if indices[-1] == 6:
                writer.finish()
    parts, whole = KVStore.open(tmp_path / "parts", identity), fill(tmp_path / "whole", list(range(7)), identity)
    assert len(shard_names(tmp_path / "parts")) > 2
    assert_same_content(parts, whole)
    assert parts.manifest.quantizer == whole.manifest.quantizer

    lost = shard_names(tmp_path / "parts")[0]
    (tmp_path / "parts" / lost).unlink()
    with KVStoreWriter(tmp_path / "parts", identity, shard_bytes) as writer:
        for key in reversed(writer.missing(KEYS)):
            add(writer, KEYS.index(key))
        writer.finish()
    assert_same_content(KVStore.open(tmp_path / "parts", identity), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_too_few_texts_for_scales_are_not_written_unless_they_are_all(tmp_path: Path, dtype: str) -> None:
    identity = replace(IDENTITY, dtype=dtype)
    with KVStoreWriter(tmp_path, identity, 1) as writer:
        add(writer, 0)
    with KVStoreWriter(tmp_path, identity, 1) as writer:
        assert writer.missing(KEYS[:1]) == KEYS[:1]
        add(writer, 0)
        writer.finish()
    assert len(KVStore.open(tmp_path, identity)) == 1


@pytest.mark.usefixtures("early_calibration")
def test_without_its_quantizer_a_store_is_refused_and_made_anew(tmp_path: Path) -> None:
    identity = replace(IDENTITY, dtype="int8")
    fill(tmp_path, list(range(7)), identity)
    path = tmp_path / "quantizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StoreError, match=r"quantizer\.safetensors .* missing or damaged"):
        KVStore.open(tmp_path, identity)
    with KVStoreWriter(tmp_path, identity, SHARD_BYTES) as writer:
        assert writer.missing(KEYS) == KEYS
    assert not shard_names(tmp_path)
    assert_same_content(fill(tmp_path, list(range(7)), identity), fill(tmp_path / "whole", list(range(7)), identity))


@pytest.mark.usefixtures("early_calibration")
def test_numbers_too_large_to_code_are_refused(tmp_path: Path) -> None:
    identity = replace(IDENTITY, dtype="int8")
    with KVStoreWriter(tmp_path, identity, SHARD_BYTES) as writer:
        for index in range(4):
            add(writer, index)
        kv = make_kv(4)
        kv.keys[0, 1, 0, 1, 0] = 1e30
        with pytest.raises(StoreError, match=r"range of int8 in the keys of layer 4, token 1.*bfloat16 or float32"):
            add(writer, 4, kv)
        assert KEYS[4] in writer.missing(KEYS)


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(StoreError, match="even KV width; got 3"):
        replace(IDENTITY, dtype="int4", num_kv_heads=1, head_dim=3)
