"""A few layers at a time, so that what is made of them on the way stays in a processor's caches."""

from __future__ import annotations

import math
from collections.abc import Sequence


def layer_runs(shape: Sequence[int], most: int) -> list[slice]:
    """The layers of numbers of ``shape [layers, ...]`` in runs of at most ``most`` numbers, or of one layer."""
    layers = shape[0]
    at_once = max(1, most // max(1, math.prod(shape[1:])))
    return [slice(start, min(start + at_once, layers)) for start in range(0, layers, at_once)]
