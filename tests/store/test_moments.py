"""Moments beside float64 in one go."""

import pytest
import torch

from kvgraft.kv import KVGeometry
from kvgraft.store.moments import Moments


def numbers(tokens: int, mean: float = 100.0) -> torch.Tensor:
    return torch.randn(2, 2, tokens, 3, generator=torch.Generator().manual_seed(tokens)) * 5 + mean


def test_moments_merge_like_one_pass() -> None:
    tokens = numbers(11)
    merged = Moments.empty(KVGeometry(2, 1, 3))
    for part in (tokens[:, :, :1], tokens[:, :, 1:1], tokens[:, :, 1:4], tokens[:, :, 4:]):
        merged = merged.merge(Moments.of(part, torch.ones(part.shape[2], dtype=torch.bool)))
    assert merged.count == 11
    # As much as float32 can say.
    torch.testing.assert_close(merged.mean, tokens.double().mean(2), rtol=2e-7, atol=0)
    torch.testing.assert_close(merged.m2 / 11, tokens.double().var(2, correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000, 5000])
def test_moments_of_a_long_text_whose_mean_is_far_from_zero(tokens: int, dtype: torch.dtype) -> None:
    given = numbers(tokens, mean=1000.0).to(dtype)
    counted = torch.rand(tokens, generator=torch.Generator().manual_seed(1)) < 0.9
    found, expected = Moments.of(given, counted), given.double()[:, :, counted]
    assert found.count == expected.shape[2]
    if found.count:
        torch.testing.assert_close(found.mean, expected.mean(2), rtol=2e-6, atol=0)
        torch.testing.assert_close(
            found.m2, (expected - expected.mean(2)[:, :, None]).square().sum(2), rtol=1e-4, atol=0
        )


def test_squares_beyond_float32_cost_nothing() -> None:
    given = numbers(9)
    given[0, 0, 0] = given[1, 1, 4, 2] = 1e30
    counted = torch.arange(9) > 0
    found, expected = Moments.of(given, counted), given.double()[:, :, counted]
    torch.testing.assert_close(found.m2 / 8, expected.var(2, correction=0))


@pytest.mark.parametrize("tokens", [3, 100_000])
@pytest.mark.parametrize("counted", [0, 2])
def test_layers_are_there_before_they_are_read(tokens: int, counted: int) -> None:
    given, filled = numbers(tokens), torch.full((2, 2, tokens, 3), torch.nan)
    calls = []

    def fill(layers: slice) -> None:
        calls.append(layers)
        filled[layers] = given[layers]

    chosen = torch.arange(tokens) < counted
    found = Moments.of(filled, chosen, before_layers=fill)
    assert torch.equal(filled, given)
    assert [layer for layers in calls for layer in range(2)[layers]] == [0, 1]
    plain = Moments.of(given, chosen)
    assert torch.equal(found.mean, plain.mean)
    assert torch.equal(found.m2, plain.m2)
