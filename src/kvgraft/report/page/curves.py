"""From curves of single seeds to what is drawn: a mean and a band for each arm, in as many points as can be seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvgraft.report.page.data import Curve

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """What is drawn of one arm, all ``[points]``.

    ``mean`` is over the ``seeds``; ``low`` and ``high`` are the lowest and highest of them. Where steps were pooled the
    mean is over the steps too, and low and high still reach to the extremes. ``low`` and ``high`` are None where there
    is one seed and every step is a point of its own.
    """

    arm: str
    seeds: tuple[int, ...]
    steps: NDArray[np.int64]
    mean: Floats
    low: Floats | None
    high: Floats | None


def arm_lines(curves: Sequence[Curve], most_points: int) -> list[Line]:
    """One line for each arm, in the order in which arms first come, of at most ``most_points`` points each."""
    return [
        _line(arm, [curve for curve in curves if curve.arm == arm], most_points)
        for arm in dict.fromkeys(curve.arm for curve in curves)
    ]


def settled_range(lines: Sequence[Line]) -> tuple[float, float]:
    """Lowest and highest of all lines without their beginning, where losses fall so far that the rest looks flat."""
    parts = []
    for line in lines:
        start = max(2, len(line.steps) // 10) if len(line.steps) > 3 else 0
        parts += [values[start:] for values in (line.mean, line.low, line.high) if values is not None]
    return _with_margin(parts)


def whole_range(lines: Sequence[Line]) -> tuple[float, float]:
    """Lowest and highest of all lines."""
    return _with_margin([values for line in lines for values in (line.mean, line.low, line.high) if values is not None])


def _with_margin(parts: Sequence[Floats]) -> tuple[float, float]:
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def _line(arm: str, curves: Sequence[Curve], most_points: int) -> Line:
    steps = np.concatenate([curve.steps for curve in curves])
    values = np.concatenate([curve.values for curve in curves])
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    distinct = np.unique(steps)
    per_point = -(-len(distinct) // most_points)
    # The last step of each point stands for those pooled in it.
    ends = distinct[np.minimum(np.arange(per_point - 1, len(distinct) + per_point - 1, per_point), len(distinct) - 1)]
    starts = np.searchsorted(steps, np.concatenate([[steps[0]], ends[:-1] + 1]))
    counts = np.diff(np.append(starts, len(steps)))
    mean = np.add.reduceat(values, starts) / counts
    seeds = tuple(sorted({curve.seed for curve in curves}))
    if len(seeds) == 1 and per_point == 1:
        return Line(arm, seeds, ends, mean, None, None)
    return Line(arm, seeds, ends, mean, np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts))
