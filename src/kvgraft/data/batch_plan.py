"""Which texts go into which batch of a training, laid down whole before it starts.

A plan follows from lengths and a seed alone: every arm, every process and a resumed training read the same one.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import chain, count, islice

from kvgraft.data.batching import length_buckets

Row = list[int]  # texts that stand one behind the other in one sequence
Batch = list[Row]

# Texts whose lengths differ by so much count as alike, so that an epoch does not group them as the last one did.
_LENGTH_SPREAD = 0.02
# Texts that are packed among themselves: enough to fill rows, few enough that a large data set takes no time.
_PACKED_TOGETHER = 4096


def plan_batches(
    lengths: Sequence[int], token_budget: int, num_batches: int, seed: int, *, packed: bool = False
) -> list[Batch]:
    """The first ``num_batches`` batches of a training, one :func:`plan_epoch` after the other."""
    epochs = (plan_epoch(lengths, token_budget, seed, epoch, packed=packed) for epoch in count())
    return list(islice(chain.from_iterable(epochs), num_batches))


def plan_epoch(
    lengths: Sequence[int], token_budget: int, seed: int, epoch: int = 0, *, packed: bool = False
) -> list[Batch]:
    """Batches that together read every text once.

    Args:
        lengths: tokens of each text.
        token_budget: most tokens of a batch, padding among them. A row longer than it is a batch of its own.
        seed, epoch: draw the order of batches and which texts of like length meet.
        packed: put several texts into a row, as long as the longest text; without it each has a row of its own.
    """
    draw = random.Random(f"{seed} {epoch}")
    alike = [length * (1 + _LENGTH_SPREAD * draw.random()) for length in lengths]
    texts = list(range(len(lengths)))
    draw.shuffle(texts)
    if packed:
        rows = _pack(texts, lengths, alike, max(lengths))
        tokens = [sum(lengths[text] for text in row) for row in rows]
    else:
        rows = [[text] for text in texts]
        tokens = [round(alike[text]) for text in texts]
    batches = [[rows[index] for index in bucket] for bucket in length_buckets(tokens, token_budget)]
    draw.shuffle(batches)
    return batches


def real_token_share(lengths: Sequence[int], batches: Sequence[Batch]) -> float:
    """Share of the tokens of ``batches`` that belong to a text, all rows of a batch being as long as its longest."""
    sizes = [[sum(lengths[text] for text in row) for row in batch] for batch in batches]
    return sum(map(sum, sizes)) / sum(max(rows) * len(rows) for rows in sizes)


def _pack(texts: Sequence[int], lengths: Sequence[int], alike: Sequence[float], capacity: int) -> list[Row]:
    """Rows of at most ``capacity`` tokens: the longest text first, each where it leaves the least room (best fit)."""
    rows: list[Row] = []
    for start in range(0, len(texts), _PACKED_TOGETHER):
        room: list[tuple[int, int]] = []  # tokens left and number of each row, in order
        for text in sorted(texts[start : start + _PACKED_TOGETHER], key=lambda text: -alike[text]):
            place = bisect_left(room, (lengths[text], 0))
            if place == len(room):
                rows.append([])
                left, row = capacity, len(rows) - 1
            else:
                left, row = room.pop(place)
            rows[row].append(text)
            insort(room, (left - lengths[text], row))
    return rows
