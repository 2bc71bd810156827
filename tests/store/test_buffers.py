"""Memory of samples that were written is used again, and never while it is in use."""

import torch

from kvgraft.store.buffers import Buffers


def test_what_was_given_back_is_taken_again() -> None:
    buffers = Buffers()
    first, second = (buffers.take((2, 3), torch.float16) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    buffers.give_back(first)
    third = buffers.take((1, 3), torch.float32)
    assert third.data_ptr() == first.data_ptr()
    assert third.shape == (1, 3)
    assert third.dtype == torch.float32
    assert third.is_contiguous()
    assert buffers.take((2, 3), torch.float16).data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_views_give_back_what_they_are_of() -> None:
    buffers = Buffers()
    taken = buffers.take((4, 5), torch.float32)
    buffers.give_back(taken.flatten())
    assert buffers.take((4, 5), torch.float32).data_ptr() == taken.data_ptr()


def test_short_ones_do_not_take_the_memory_of_long_ones_and_long_ones_fit() -> None:
    buffers = Buffers()
    taken = buffers.take((100,), torch.float32)
    buffers.give_back(taken)
    assert buffers.take((49,), torch.float32).untyped_storage().nbytes() == 196
    buffers.give_back(taken)
    assert buffers.take((101,), torch.float32).untyped_storage().nbytes() == 404


def test_it_holds_no_more_than_was_in_use_at_once() -> None:
    buffers = Buffers()
    for length in range(100, 10_000, 100):
        buffers.give_back(buffers.take((length,), torch.float32))
    assert len(buffers._free) == 1
