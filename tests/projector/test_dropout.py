"""Dropout by seed and place: right shares, the same however a text is cut, different everywhere else."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kvgraft.projector.dropout import TILE_TOKENS, draw_dropout, draw_seed, num_tiles


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_share_and_size_of_what_is_kept(share: float) -> None:
    kept = draw_dropout(share, seed=1, places=[0], num_tokens=700, num_units=200)[0]
    assert float((kept == 0).float().mean()) == pytest.approx(share, abs=0.005)  # four standard deviations
    assert float(kept.max()) == pytest.approx(1 / (1 - share), rel=1e-4)
    assert len(kept.unique()) == 2
    # Neither a token nor a unit is favoured.
    for axis in (0, 1):
        expected = (share * (1 - share) / kept.shape[axis]) ** 0.5
        assert float((kept == 0).float().mean(axis).std()) == pytest.approx(expected, rel=0.25)


def test_nothing_is_dropped_at_zero() -> None:
    assert torch.equal(draw_dropout(0.0, 1, [0, 1], 5, 7), torch.ones(2, 5, 7))


def test_a_text_may_be_cut_at_tiles() -> None:
    tokens = 2 * TILE_TOKENS + 9
    whole = draw_dropout(0.3, seed=5, places=[7, 40], num_tokens=tokens, num_units=3)[1]
    parts = [
        draw_dropout(0.3, 5, [40 + tile], min(TILE_TOKENS, tokens - tile * TILE_TOKENS), 3)[0] for tile in range(3)
    ]
    assert num_tiles(tokens) == len(parts)
    assert torch.equal(torch.cat(parts), whole)
    # A longer text begins with the same rows.
    assert torch.equal(draw_dropout(0.3, 5, [40], tokens + 50, 3)[0, :tokens], whole)


def test_apples_accelerator_gets_what_the_processor_draws() -> None:
    # Its own random_ refuses whole 64 bits. Fake tensors have a device and no numbers.
    with FakeTensorMode():
        kept = draw_dropout(0.3, 5, [0, 1], TILE_TOKENS + 9, 3, torch.device("mps"), torch.float16)
    assert (kept.device.type, kept.dtype, kept.shape) == ("mps", torch.float16, (2, TILE_TOKENS + 9, 3))


def test_places_and_seeds_differ() -> None:
    first, other_place = draw_dropout(0.5, 5, [0, 1], 64, 32)
    for other in (other_place, draw_dropout(0.5, 6 + 1000, [0], 64, 32)[0]):
        assert float((first == other).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_the_global_seed_settles_the_draw() -> None:
    torch.manual_seed(3)
    one = draw_seed()
    assert draw_seed() != one
    torch.manual_seed(3)
    assert draw_seed() == one
