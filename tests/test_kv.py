"""The one data type."""

import pytest
import torch

from kvgraft.errors import KVGraftError
from kvgraft.kv import KV, KVGeometry, all_finite, stack_kv


def make(tokens: int = 4, layers: tuple[int, ...] = (2, 5, 7), seed: int = 0, batch: int = 1) -> KV:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, len(layers), 2, tokens, 3, generator=generator)
    positions = torch.arange(tokens).expand(batch, tokens)
    return KV(keys, values, positions, torch.ones(batch, tokens).bool(), layers)


def test_flatten_joins_heads_and_unflatten_splits_them() -> None:
    kv = make()
    keys, values = kv.flatten()
    assert keys.shape == (1, 3, 4, 6)
    assert torch.equal(keys[0, 1, 2], torch.cat([kv.keys[0, 1, 0, 2], kv.keys[0, 1, 1, 2]]))
    back = kv.unflatten(keys, values, kv.geometry)
    assert torch.equal(back.keys, kv.keys)
    assert torch.equal(back.values, kv.values)


def test_geometry() -> None:
    assert make().geometry == KVGeometry(3, 2, 3)
    assert KVGeometry(28, 4, 128).kv_dim == 512


def test_layers_are_chosen_by_their_index_in_the_model() -> None:
    kv = make()
    chosen = kv.select_layers([7, 2, 7])
    assert chosen.layers == (7, 2, 7)
    assert torch.equal(chosen.keys, kv.keys[:, [2, 0, 2]])
    with pytest.raises(KVGraftError, match=r"\[3\].*\[2, 5, 7\]"):
        kv.select_layers([2, 3])


def test_stacking_pads_on_the_right_with_a_false_mask() -> None:
    short, long = make(2, seed=1), make(4, seed=2, batch=2)
    stacked = stack_kv([short, long])
    assert stacked.mask.tolist() == [[True, True, False, False], [True] * 4, [True] * 4]
    assert torch.equal(stacked.keys[0, :, :, :2], short.keys[0])
    assert torch.equal(stacked.keys[1:], long.keys)
    assert float(stacked.keys[0, :, :, 2:].abs().sum()) == 0
    with pytest.raises(KVGraftError, match="cannot stack"):
        stack_kv([short, make(layers=(0, 1, 2))])


@pytest.mark.parametrize("count", [1, 2])
def test_stacking_casts_as_it_copies(count: int) -> None:
    halves = [make(3, seed=index).to(torch.float16) for index in range(count)]
    wide = stack_kv(halves, torch.float32)
    assert wide.values.dtype == torch.float32
    assert torch.equal(wide.keys, stack_kv(halves).keys.float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_and_padding_is_not_looked_at(bad: float) -> None:
    kv = make()
    kv.mask[0, 3] = False
    kv.values[0, 1, 0, 3, 2] = bad
    assert kv.require_finite("teacher big") is kv
    kv.values[0, 1, 0, 2, 2] = bad
    with pytest.raises(KVGraftError, match="values of teacher big are not finite at sample 0, layer 5, token 2"):
        kv.require_finite("teacher big")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_finite_is_told_from_what_is_not(dtype: torch.dtype) -> None:
    inf, largest = float("inf"), torch.finfo(dtype).max
    for numbers in ([1.0, -2.0], [largest, largest, -largest]):
        assert all_finite(torch.tensor(numbers, dtype=dtype))
    for numbers in ([1.0, float("nan")], [inf, 1.0], [inf, -inf]):
        assert not all_finite(torch.tensor(numbers, dtype=dtype))


def test_shapes_that_do_not_fit_are_refused() -> None:
    kv = make()
    with pytest.raises(KVGraftError, match="must share one shape"):
        KV(kv.keys, kv.values[:, :2], kv.positions, kv.mask, kv.layers)
    with pytest.raises(KVGraftError, match=r"3 layers but names 2"):
        KV(kv.keys, kv.values, kv.positions, kv.mask, (1, 2))
    with pytest.raises(KVGraftError, match=r"mask must be \[1, 4\]"):
        KV(kv.keys, kv.values, kv.positions, kv.mask[:, :3], kv.layers)


def test_moving_changes_numbers_only() -> None:
    half = make().to(torch.float16)
    assert half.keys.dtype == half.values.dtype == torch.float16
    assert half.positions.dtype == torch.int64
    assert half.mask.dtype == torch.bool
