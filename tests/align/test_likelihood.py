"""Likelihoods moved between tokenizations, against a loop over bytes."""

import random

import numpy as np
import pytest
import torch

from kvgraft.align.likelihood import move_log_likelihood
from kvgraft.errors import AlignmentError


def spans_of(rng: random.Random, text_bytes: int, holes: bool) -> np.ndarray:
    """Random disjoint spans in order, some empty; with ``holes`` some bytes belong to none."""
    cuts = sorted(rng.sample(range(1, text_bytes), rng.randint(1, text_bytes - 1)))
    spans = list(zip([0, *cuts], [*cuts, text_bytes], strict=True))
    if holes:
        spans = [span for span in spans if rng.random() > 0.2]
    for _ in range(rng.randint(0, 2)):
        place = rng.randint(0, len(spans))
        end = spans[place - 1][1] if place else 0
        spans.insert(place, (end, end))
    return np.array(spans or [(0, 0)], dtype=np.int32)


@pytest.mark.parametrize("seed", range(60))
def test_equals_a_loop_over_bytes(seed: int) -> None:
    rng = random.Random(seed)
    text_bytes = rng.randint(2, 30)
    teacher, student = spans_of(rng, text_bytes, holes=seed % 2 == 1), spans_of(rng, text_bytes, holes=False)
    numbers = [float("nan") if rng.random() < 0.1 else -rng.random() for _ in teacher]
    by_byte = [float("nan")] * text_bytes
    for (start, end), number in zip(teacher, numbers, strict=True):
        for byte in range(start, end):
            by_byte[byte] = number / (end - start)
    expected = [sum(by_byte[start:end]) if end > start else float("nan") for start, end in student]
    moved = move_log_likelihood(torch.tensor(numbers), teacher, student)
    torch.testing.assert_close(moved, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=1e-5, equal_nan=True)


def test_another_number_of_tokens_is_refused() -> None:
    with pytest.raises(AlignmentError, match="expected 2 log-likelihoods"):
        move_log_likelihood(torch.zeros(3), [[0, 1], [1, 2]], [[0, 2]])
