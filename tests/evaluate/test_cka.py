"""Streaming linear CKA against the plain formula over all tokens at once."""

import pytest
import torch
from torch import Tensor

from kvgraft.errors import KVGraftError
from kvgraft.evaluate.cka import LinearCKA, effective_rank


def plain_cka(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    cross, own_x, own_y = (torch.linalg.norm(one.T @ other) for one, other in ((x, y), (x, x), (y, y)))
    return float(cross**2 / (own_x * own_y))


def linear_cka(x: Tensor, y: Tensor) -> float:
    cka = LinearCKA([(0, 0)], 1, 1, x.shape[-1], y.shape[-1])
    cka.add(x[None], y[None])
    return float(cka.similarity()[0])


@pytest.fixture
def sides() -> tuple[Tensor, Tensor]:
    """Two layers of width 6 and three of width 4 that share something; a mean that dwarfs the spread."""
    torch.manual_seed(0)
    shared = torch.randn(300, 4, dtype=torch.float64)
    x = torch.stack([shared @ torch.randn(4, 6, dtype=torch.float64) for _ in range(2)])
    y = torch.stack([shared @ torch.randn(4, 4, dtype=torch.float64) for _ in range(3)])
    return x + 0.5 * torch.randn_like(x) + 1e4, y + torch.randn_like(y)


def test_streaming_equals_the_formula_for_every_pair(sides: tuple[Tensor, Tensor]) -> None:
    x, y = sides
    pairs = [(one, other) for one in range(2) for other in range(3)]
    cka = LinearCKA(pairs, 2, 3, 6, 4)
    for start, end in ((0, 1), (1, 120), (120, 120), (120, 300)):
        cka.add(x[:, start:end], y[:, start:end])
    expected = [plain_cka(x[one], y[other]) for one, other in pairs]
    assert cka.similarity().tolist() == pytest.approx(expected, rel=1e-6)


def test_rotation_and_scale_do_not_count_and_unrelated_sides_are_apart() -> None:
    torch.manual_seed(1)
    x = torch.randn(4000, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, torch.randn(4000, 8)) < 0.01
    assert linear_cka(x, torch.ones(4000, 8)) == 0


def test_effective_rank_counts_directions() -> None:
    assert float(effective_rank(torch.eye(5))) == pytest.approx(5)
    assert float(effective_rank(torch.diag(torch.tensor([3.0, 0, 0])))) == pytest.approx(1)


def test_what_does_not_fit_is_named() -> None:
    cka = LinearCKA([(0, 0)], 1, 1, 6, 4)
    with pytest.raises(KVGraftError, match="has seen no token"):
        cka.similarity()
    with pytest.raises(KVGraftError, match=r"y of linear CKA must be \[1, tokens, 4\]; got \[1, 3, 5\]"):
        cka.add(torch.zeros(1, 3, 6), torch.zeros(1, 3, 5))
    with pytest.raises(KVGraftError, match="the same tokens on both sides; got 3 of x and 2 of y"):
        cka.add(torch.zeros(1, 3, 6), torch.zeros(1, 2, 4))
