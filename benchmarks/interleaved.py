"""Time several ways of doing one thing so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median


def interleaved_medians(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    before_each: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each way over ``repeats`` rounds; a round runs all of them, every other one backwards.

    Args:
        ways: what to time, by name.
        repeats: rounds; one more before them is not counted.
        before_each: called before each way, outside its time.
        clock: seconds; ``time.process_time`` counts what all threads of this process computed, and not what it waited.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            if before_each is not None:
                before_each()
            started = clock()
            ways[name]()
            if turn:
                seconds[name].append(clock() - started)
    return {name: median(found) for name, found in seconds.items()}
