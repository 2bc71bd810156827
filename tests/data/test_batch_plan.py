"""A training's batches: all texts, within the budget, almost without padding, the same for a seed."""

import random
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvgraft.data.batch_plan import plan_batches, plan_epoch, real_token_share

# Spread as the problems of GSM8K are under a tokenizer of 2,048 entries: 50 to 512 tokens, 180 on average.
LENGTHS = [min(512, round(random.Random(text).lognormvariate(5.1, 0.4))) for text in range(600)]


def texts_of(batches: list[list[list[int]]]) -> list[int]:
    return list(chain.from_iterable(chain.from_iterable(batches)))


@pytest.mark.parametrize("packed", [False, True])
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=50), budget=st.integers(1, 200))
def test_an_epoch_reads_every_text_once_within_the_budget(packed: bool, lengths: list[int], budget: int) -> None:
    batches = plan_epoch(lengths, budget, seed=0, packed=packed)
    assert sorted(texts_of(batches)) == list(range(len(lengths)))
    for batch in batches:
        rows = [sum(lengths[text] for text in row) for row in batch]
        assert max(rows) <= max(lengths)
        assert len(rows) == 1 or max(rows) * len(rows) <= budget
        assert packed or all(len(row) == 1 for row in batch)


@pytest.mark.parametrize("packed", [False, True])
def test_at_most_three_percent_of_the_tokens_are_padding(packed: bool) -> None:
    arrival = [[[text] for text in range(start, start + 8)] for start in range(0, 600, 8)]
    assert real_token_share(LENGTHS, arrival) < 0.7
    assert real_token_share(LENGTHS, plan_epoch(LENGTHS, 8 * 180, seed=0, packed=packed)) > 0.97


def test_packed_rows_are_filled() -> None:
    rows = list(chain.from_iterable(plan_epoch(LENGTHS, 8 * 180, seed=0, packed=True)))
    assert sum(LENGTHS) / (len(rows) * max(LENGTHS)) > 0.95


@pytest.mark.parametrize("packed", [False, True])
def test_a_seed_gives_one_plan_whose_epochs_differ(packed: bool) -> None:
    epochs = [plan_epoch(LENGTHS, 1440, 3, epoch, packed=packed) for epoch in (0, 1)]
    batches = plan_batches(LENGTHS, 1440, 120, 3, packed=packed)
    assert batches == [*epochs[0], *epochs[1]][:120]
    assert batches == plan_batches(LENGTHS, 1440, 120, 3, packed=packed)
    assert batches != plan_batches(LENGTHS, 1440, 120, 4, packed=packed)
    groups = [{frozenset(texts_of([batch])) for batch in epoch} for epoch in epochs]
    # Another grouping, and not only another order.
    assert len(groups[0] & groups[1]) < 0.5 * len(groups[0])


def test_real_token_share_counts_the_padding_of_every_row() -> None:
    assert real_token_share([4, 2, 3], [[[0], [1]], [[2]]]) == pytest.approx(9 / 11)
    assert real_token_share([4, 2, 3], [[[0], [1, 2]]]) == pytest.approx(9 / 10)
