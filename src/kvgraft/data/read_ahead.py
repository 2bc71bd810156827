"""The next batches, read by a thread while the last one is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar, cast

import torch

Item = TypeVar("Item")
_END = object()


def read_ahead(items: Iterable[Item], depth: int = 1) -> Generator[Item, None, None]:
    """``items`` in their order, of which a thread gets up to ``depth`` while the caller works on the one before.

    The first is got in the caller's own thread, so that what a loader does once, drawing from the global random numbers
    and agreeing with other processes, stays where it was. A thread and not workers: nothing has to be pickled or
    started, and what is read needs no copy from one process to another. An error is raised where its item would have
    come. Closing the generator waits for the thread, so that as many items are got whenever that is done.

    Args:
        items: gone through by one thread at a time.
        depth: items that are read and not yet taken, at most; at least 1.
    """
    iterator = iter(items)
    item: object = next(iterator, _END)
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead", initializer=_on_the_same_device()) as thread:
        waiting: deque[Future[object]] = deque()
        while item is not _END:
            while len(waiting) < depth:
                waiting.append(thread.submit(next, iterator, _END))
            yield cast(Item, item)
            item = waiting.popleft().result()


def _on_the_same_device() -> Callable[[], None] | None:
    # Each thread has a current CUDA device of its own, which starts as the first.
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return partial(torch.cuda.set_device, torch.cuda.current_device()) if initialized else None
