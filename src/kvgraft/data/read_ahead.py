"""The next batches, read by a thread while the last one is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
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
    with _beside_the_caller() as thread:
        waiting: deque[Future[object]] = deque()
        while item is not _END:
            while len(waiting) < depth:
                waiting.append(thread.submit(next, iterator, _END))
            yield cast(Item, item)
            item = waiting.popleft().result()


def _beside_the_caller() -> ThreadPoolExecutor:
    """A thread on the caller's CUDA device or, where there is none, one that leaves the cores to the caller.

    torch shares what a thread computes among helpers, as many as there are cores and others for each thread. Those of
    two threads at once wait for each other in busy loops.
    """
    # Each thread has a current CUDA device of its own, which starts as the first.
    on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    begin = partial(torch.cuda.set_device, torch.cuda.current_device()) if on_cuda else _compute_alone
    thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead", initializer=begin)
    thread.submit(int).result()
    # What a thread sets holds for itself and for threads to come.
    torch.set_num_threads(torch.get_num_threads())
    return thread


def _compute_alone() -> None:
    # Asked first, or torch gives a new thread the number of all others when it computes something.
    torch.get_num_threads()
    torch.set_num_threads(1)
