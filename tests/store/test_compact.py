"""Less than one bit a number: the record bit by bit, what it costs and loses, and stores that are continued."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvgraft.errors import StoreError
from kvgraft.kv import KVGeometry
from kvgraft.store.compact import CompactQuantizer, _levels, _normal_errors, compact_record_bytes
from kvgraft.store.format import stored_bytes_per_token
from kvgraft.store.quantize import QUANTIZED_FORMATS, Quantizer
from kvgraft.store.reader import KVStore
from kvgraft.store.writer import KVStoreWriter
from tests.store.test_writer import IDENTITY, KEYS, SHARD_BYTES, add, fill, make_kv

LAYERS, KV_DIM, HIDDEN = 2, 64, 48


def tokens_of_one_state(count: int = 2000, seed: int = 0) -> Tensor:
    """``[2, 2, count, 64]``: keys and values of one hidden state of falling spread, means far from zero."""
    state = torch.randn(LAYERS, 1, count, HIDDEN, generator=torch.Generator().manual_seed(seed))
    state = state * torch.arange(1, HIDDEN + 1) ** -0.7
    matrices, mean = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
    keys_louder = torch.tensor([30.0, 1.0])[None, :, None, None]
    numbers = state @ torch.randn(LAYERS, 2, HIDDEN, KV_DIM, generator=matrices) * keys_louder
    return numbers + 10 * torch.randn(LAYERS, 2, 1, KV_DIM, generator=mean)


def lost(quantizer: CompactQuantizer | Quantizer, tokens: Tensor) -> Tensor:
    """Share ``[layers, 2]`` of the variance of ``tokens`` that does not come back."""
    error = (quantizer.decode(quantizer.encode(tokens)) - tokens).square().sum((2, 3))
    return error / (tokens - tokens.mean(2, keepdim=True)).square().sum((2, 3))


def test_36_layers_of_8_heads_take_at_most_8_kilobytes_a_token() -> None:
    geometry = KVGeometry(36, 8, 128)
    assert stored_bytes_per_token(geometry, "float16") == 147_456
    assert stored_bytes_per_token(geometry, "compact") == 8_136


@pytest.mark.parametrize("kv_dim", [1, 8, 64, 192])
def test_a_record_is_as_long_as_is_said(kv_dim: int) -> None:
    tokens = torch.randn(1, 2, 5, kv_dim, generator=torch.Generator().manual_seed(0))
    quantizer = CompactQuantizer.calibrate(tokens)
    assert quantizer.encode(tokens).shape == (1, 2, 5, compact_record_bytes(kv_dim))
    assert torch.isfinite(quantizer.decode(quantizer.encode(tokens))).all()


@pytest.mark.parametrize("bits", [0, 1, 2, 3])
def test_levels_are_the_best_for_a_normal_variable(bits: int) -> None:
    points = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    density = torch.exp(-points.square() / 2)

    def error(levels: Tensor) -> float:
        nearest = (points[:, None] - levels).abs().amin(-1)
        return float((nearest.square() * density).sum() / density.sum())

    levels = _levels()[bits, : 2**bits].double()
    best = error(levels)
    assert best == pytest.approx(float(_normal_errors()[bits]), abs=1e-6)
    for index in range(len(levels)):
        for step in (-0.02, 0.02):
            moved = levels.clone()
            moved[index] += step
            assert error(moved) > best


def reference_bits(variances: list[float], code_bits: int) -> list[int]:
    """One bit after the other to where it gains most."""
    errors, bits = _normal_errors().tolist(), [0] * len(variances)
    for _ in range(code_bits):
        gains = [
            variance * (errors[held] - errors[held + 1]) if held < 8 else -1.0
            for variance, held in zip(variances, bits, strict=True)
        ]
        bits[gains.index(max(gains))] += 1
    return bits


def reference_decode(quantizer: CompactQuantizer, record: Tensor, layer: int) -> Tensor:
    """One token's keys and values ``[2, kv_dim]`` from the bits of ``record [2, record_bytes]``."""
    data = bytes(record.flatten().tolist())
    unit = float(torch.tensor(list(data[:2]), dtype=torch.uint8).view(torch.bfloat16))
    stream = "".join(f"{byte:08b}"[::-1] for byte in data[2:])
    found = torch.zeros(2 * KV_DIM, dtype=torch.float64)
    for component, bits in enumerate(quantizer.bits[layer].tolist()):
        code, stream = stream[:bits], stream[bits:]
        level = float(_levels()[bits, int(code[::-1] or "0", 2)])
        found += level * unit * quantizer.deviation[layer, component] * quantizer.components[layer, component].double()
    assert stream == ""
    return found.view(2, KV_DIM) * quantizer.spread[layer][:, None] + quantizer.center[layer]


def test_a_record_reads_as_its_bits_say() -> None:
    quantizer = CompactQuantizer.calibrate(tokens_of_one_state(), record_bytes=13)
    assert int(quantizer.bits.max()) > 3
    records = quantizer.encode(tokens_of_one_state(3, seed=2))
    decoded = quantizer.decode(records)
    for token, layer in ((0, 0), (1, 1), (2, 0)):
        expected = reference_decode(quantizer, records[layer, :, token], layer)
        torch.testing.assert_close(decoded[layer, :, token].double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(quantizer.decode(records[[1, 1, 0]], [1, 1, 0]), decoded[[1, 1, 0]])


def test_codes_are_those_of_the_plain_transform() -> None:
    tokens = tokens_of_one_state()
    quantizer = CompactQuantizer.calibrate(tokens)
    for layer in range(LAYERS):
        numbers = tokens[layer].double() - tokens[layer].double().mean(1, keepdim=True)
        spread = numbers.square().mean((1, 2)).sqrt()
        joint = torch.cat([numbers[0] / spread[0], numbers[1] / spread[1]], -1)
        variance, components = torch.linalg.eigh(joint.T @ joint / len(joint))
        variance = variance.clamp_min(0.05**2)
        bits = torch.tensor(reference_bits(variance.tolist(), 8 * (2 * compact_record_bytes(KV_DIM) - 2)))
        deviation = variance.sqrt()[bits > 0]
        coded = joint @ components[:, bits > 0] / deviation
        unit = ((coded.square() * deviation).sum(-1, keepdim=True) / deviation.sum()).sqrt()
        levels = [_levels()[held, : 2**held].double() for held in bits[bits > 0].tolist()]
        nearest = [own[(coded[:, index, None] / unit - own).abs().argmin(-1)] for index, own in enumerate(levels)]
        plain = torch.stack(nearest, -1) * unit * deviation @ components[:, bits > 0].T
        error = (plain - joint).square().mean(0).view(2, KV_DIM).mean(-1)
        # The unit in 8 bits and the components in float16 are all that is rounded besides.
        torch.testing.assert_close(lost(quantizer, tokens)[layer].double(), error, rtol=0.01, atol=0)


def test_the_error_falls_as_bytes_grow() -> None:
    tokens, later = tokens_of_one_state(), tokens_of_one_state(500, seed=1)
    errors = [float(lost(CompactQuantizer.calibrate(tokens, size), later).mean()) for size in (4, 7, 14, 28)]
    assert errors[0] < 0.2
    assert all(more < 0.5 * fewer for fewer, more in itertools.pairwise(errors))


def test_less_is_lost_than_by_int4_of_as_many_channels_as_the_bytes_allow() -> None:
    tokens, later = tokens_of_one_state(), tokens_of_one_state(500, seed=1)
    size = compact_record_bytes(KV_DIM)
    numbers = (tokens - tokens.mean(2, keepdim=True)).double()
    _, components = torch.linalg.eigh(numbers.transpose(-1, -2) @ numbers)
    # The leading components of keys, and of values, in 4 bits each: as many as give records of the same length.
    kept = max(width for width in range(2, KV_DIM, 2) if QUANTIZED_FORMATS["int4"].record_bytes(width) <= size)
    leading = components[..., -kept:].float()
    mean = tokens.mean(2, keepdim=True)
    turned, turned_later = ((part - mean) @ leading for part in (tokens, later))
    int4 = Quantizer.calibrate("int4", turned, kept)
    back = int4.decode(int4.encode(turned_later)) @ leading.transpose(-1, -2) + mean
    truncated = (back - later).square().sum((2, 3)) / (later - later.mean(2, keepdim=True)).square().sum((2, 3))
    assert (lost(CompactQuantizer.calibrate(tokens), later) < 0.7 * truncated).all()


def test_a_token_far_beyond_the_others_keeps_its_size_and_costs_them_nothing() -> None:
    quantizer = CompactQuantizer.calibrate(tokens_of_one_state())
    tokens = tokens_of_one_state(8, seed=3)
    alone = quantizer.decode(quantizer.encode(tokens[:, :, 1:]))
    center = quantizer.center
    tokens[:, :, 0] = center + 300 * (tokens[:, :, 0] - center)
    decoded = quantizer.decode(quantizer.encode(tokens))
    assert torch.equal(decoded[:, :, 1:], alone)
    error = (decoded - tokens)[:, :, 0].norm(dim=-1) / (tokens[:, :, 0] - center).norm(dim=-1)
    assert float(error.max()) < 0.8


def test_components_that_few_tokens_do_not_show_cost_later_ones_little() -> None:
    # More bits than 10 tokens have components for.
    quantizer = CompactQuantizer.calibrate(tokens_of_one_state(10), record_bytes=14)
    assert float(lost(quantizer, tokens_of_one_state(500, seed=1)).max()) < 0.3


def test_constant_channels_one_token_and_a_file_of_a_quantizer() -> None:
    tokens = tokens_of_one_state()
    tokens[..., 7], tokens[..., 40] = 0.0, 1.5
    quantizer = CompactQuantizer.calibrate(tokens)
    records = quantizer.encode(tokens[:, :, :4])
    decoded = quantizer.decode(records)
    torch.testing.assert_close(decoded[..., [7, 40]], tokens[:, :, :4][..., [7, 40]], rtol=0, atol=1e-5)
    again = CompactQuantizer.from_bytes(quantizer.to_bytes())
    assert torch.equal(records, again.encode(tokens[:, :, :4]))
    assert torch.equal(decoded, again.decode(records))
    of_one = CompactQuantizer.calibrate(tokens[:, :, :1])
    assert torch.isfinite(of_one.decode(of_one.encode(tokens))).all()


@pytest.mark.usefixtures("early_calibration")
def test_a_store_reads_as_its_quantizer_and_layers_read_alone(tmp_path: Path) -> None:
    store = fill(tmp_path, list(range(7)), replace(IDENTITY, dtype="compact"))
    assert isinstance(store.quantizer, CompactQuantizer)
    for index, key in enumerate(KEYS):
        kv, stored = make_kv(index), store.read(key).kv
        numbers = torch.stack([part[0] for part in kv.flatten()], 1)
        expected = store.quantizer.decode(store.quantizer.encode(numbers))
        assert torch.equal(torch.stack([part[0] for part in stored.flatten()], 1), expected)
        some = store.read(key, layers=[5, 1, 1])
        torch.testing.assert_close(some.kv.values, stored.select_layers([5, 1, 1]).values)
    # Statistics are of the exact numbers, whatever the codes lose.
    plain = fill(tmp_path / "plain", list(range(7))).statistics()
    torch.testing.assert_close(store.statistics().variance, plain.variance)


@pytest.mark.usefixtures("early_calibration")
def test_numbers_too_large_to_code_are_refused(tmp_path: Path) -> None:
    with KVStoreWriter(tmp_path, replace(IDENTITY, dtype="compact"), SHARD_BYTES) as writer:
        for index in range(4):
            add(writer, index)
        kv = make_kv(4)
        kv.keys[0, 1, 0, 1, 0] = 1e30
        with pytest.raises(StoreError, match=r"range of compact in the keys of layer 4, token 1.*bfloat16 or float32"):
            add(writer, 4, kv)
        assert KEYS[4] in writer.missing(KEYS)
        kv.keys[0, 1, 0, 1, 0] = 1e10
        add(writer, 4, kv)
        writer.finish()
    largest = float(KVStore.open(tmp_path).read(KEYS[4]).kv.keys.abs().max())
    assert math.isfinite(largest)
    assert largest > 1e8
