"""The matrix products of a piece of work once more, with nothing between them: what a machine can do at its shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# By operation the place of its first matrix; the second follows.
_FIRST_MATRIX = {
    torch.ops.aten.mm: 0,
    torch.ops.aten.bmm: 0,
    torch.ops.aten.addmm: 1,
    torch.ops.aten.addmm_: 1,
    torch.ops.aten.baddbmm: 1,
    torch.ops.aten.baddbmm_: 1,
}


@dataclass(frozen=True)
class _Layout:
    """How a matrix, or several, lies in memory."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor) -> _Layout:
        return _Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def random(self) -> Tensor:
        numbers = 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        return torch.randn(numbers, dtype=self.dtype, device=self.device).as_strided(self.size, self.stride)


class MatrixProducts:
    """Those that ``work`` calls, forward and backward; calling this does them all again, on random numbers.

    Products inside of attention are not among them. Equal ones find their numbers in the caches more often than those
    of ``work`` do, so that this is a limit and nothing that could be reached.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        work()  # Some things are found out in a first time.
        noting = _Noting()
        with noting:
            work()
        self.operations = sum(
            2 * left.size[-1] * torch.Size((*left.size[:-1], right.size[-1])).numel() * count
            for (left, right), count in noting.found.items()
        )
        self._ready = []
        for (one, other), count in noting.found.items():
            left, right = one.random(), other.random()
            self._ready.append((left, right, left @ right, count))

    def __call__(self) -> None:
        for left, right, product, count in self._ready:
            for _ in range(count):
                torch.matmul(left, right, out=product)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[_Layout, _Layout]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        first = _FIRST_MATRIX.get(func.overloadpacket)
        if first is not None:
            self.found[_Layout.of(args[first]), _Layout.of(args[first + 1])] += 1
        return func(*args, **(kwargs or {}))
