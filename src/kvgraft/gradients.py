"""Gradients that were computed in a forward pass and kept: what its backward pass makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# What torch's own compiled backward passes ask before they reuse a buffer; a torch without it copies.
_graph_is_kept: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def times_arriving(kept: Iterable[Tensor | None], arriving: Tensor) -> list[Tensor | None]:
    """``kept`` gradients times ``arriving``, a scalar; for use in a backward pass.

    In place, so that no gradient stands in memory twice, unless the graph is kept (``retain_graph``) and another pass
    may ask for them again.
    """
    multiply = Tensor.mul if _graph_is_kept() else Tensor.mul_
    return [None if gradient is None else multiply(gradient, arriving) for gradient in kept]
