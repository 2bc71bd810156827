"""Reading ahead: the same items in the same order, read while the caller works."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvgraft.data.read_ahead import read_ahead


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_items_come_in_their_order(count: int, depth: int) -> None:
    assert list(read_ahead(range(count), depth)) == list(range(count))


@pytest.mark.parametrize("depth", [1, 3])
def test_so_many_are_read_while_the_caller_works_and_no_more(depth: int) -> None:
    read: list[str] = []
    ahead = threading.Semaphore(0)

    def items() -> Iterator[int]:
        for item in range(10):
            read.append(threading.current_thread().name)
            ahead.release()
            yield item

    batches = read_ahead(items(), depth)
    assert next(batches) == 0
    for _ in range(1 + depth):
        assert ahead.acquire(timeout=30)
    # The first where the caller is, as a loader that draws random numbers needs it.
    assert read[0] == threading.current_thread().name
    assert all(name.startswith("read-ahead") for name in read[1:])
    assert not ahead.acquire(timeout=0.05)
    batches.close()
    assert len(read) == 1 + depth
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


def test_an_error_comes_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise OSError("no such shard")

    batches = read_ahead(items(), 2)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="no such shard"):
        next(batches)


def test_the_thread_computes_alone_and_other_threads_keep_their_helpers() -> None:
    def helpers() -> Iterator[int]:
        while True:
            yield torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = read_ahead(helpers())
        # The first is got by the caller.
        assert [next(found), next(found)] == [3, 1]
        with ThreadPoolExecutor(1) as born_later:
            assert born_later.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
        found.close()
    finally:
        torch.set_num_threads(before)
