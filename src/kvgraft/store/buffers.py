"""Memory that is used again, since a system takes about as long to give new memory as writing into it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# A buffer is not taken for less than this share of it, so that short texts do not wait in the memory of long ones.
_LEAST_SHARE = 0.5


class Buffers:
    """Memory of tensors that are done with, for the next ones. One thread takes, another may give back."""

    def __init__(self) -> None:
        self._free: list[torch.UntypedStorage] = []

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the processor, its numbers whatever was there."""
        needed = math.prod(shape) * dtype.itemsize
        for index, storage in enumerate(self._free):
            if _LEAST_SHARE * storage.nbytes() <= needed <= storage.nbytes():
                del self._free[index]
                break
        else:
            # As many as are in use at once, and of the lengths that come now.
            del self._free[:1]
            storage = torch.empty(needed, dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=torch.uint8).set_(storage)[:needed].view(dtype).view(tuple(shape))

    def give_back(self, tensor: Tensor) -> None:
        """Let the memory of ``tensor``, which was taken here and which nobody uses any more, be taken again."""
        self._free.append(tensor.untyped_storage())
