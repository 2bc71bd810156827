"""Is one arm better than another? Numbers of several seeds, paired by seed, with intervals that hold at three seeds.

All arms of a seed start from the same weights and see the same batches, so a seed's luck is common to them: what is
tested is the difference within each seed, by the paired t-test. A percentile bootstrap of so few differences is too
narrow (Hesterberg 2015, doi:10.1080/00031305.2015.1089789); the tests show how often it and BCa call identical arms
different. The t-test assumes normal differences. Those of two arms that are alike are at least symmetric, and there it
errs to the careful side when tails are long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import special

LEVEL = 0.05
# Of the numbers that are compared: differences below it come from the order of additions.
_ROUNDING = 1e-9


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Record):
    """One number for each seed, with mean and standard deviation; one seed has no deviation."""

    by_seed: dict[int, float]
    mean: float
    deviation: float | None


class PairedDifference(_Record):
    """One arm minus another, seed by seed.

    Attributes:
        interval: of the mean difference, at 95 %, not corrected for the number of arms.
        effect_size: mean over standard deviation of the differences, with Hedges' correction; from three seeds on.
        p_value: two-sided, of the paired t-test.
        corrected_p_value: after Holm's correction for all the differences that are judged together.

    What one seed, or seeds that change nothing, cannot tell is None.
    """

    by_seed: dict[int, float]
    mean: float
    interval: tuple[float, float] | None
    effect_size: float | None
    p_value: float | None
    corrected_p_value: float | None = None

    @property
    def shown(self) -> bool:
        """Whether there is a difference at the 5 % level, all the others that are judged with it considered."""
        return self.corrected_p_value is not None and self.corrected_p_value < LEVEL


class Reach(_Record):
    """What it took each seed to reach a target (steps, or seconds); None where it never did.

    ``mean`` and ``interval`` are there only where every seed reached it. A target is passed somewhere between two
    evaluations: values are those of the later one, and the interval begins where the earlier one would have it begin.
    """

    by_seed: dict[int, float | None]
    mean: float | None
    interval: tuple[float, float] | None


def spread(values: Mapping[int, float]) -> Spread:
    """Mean and standard deviation of ``values`` by seed."""
    numbers = list(values.values())
    # The deviation of numbers of which one is infinite is no number, and no reason for a warning.
    with np.errstate(invalid="ignore"):
        deviation = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return Spread(by_seed=dict(values), mean=float(np.mean(numbers)), deviation=deviation)


def paired_difference(arm: Mapping[int, float], other: Mapping[int, float]) -> PairedDifference:
    """``arm`` minus ``other``, each a number by seed, over the seeds of both; not corrected yet.

    Raises:
        ValueError: they are not of the same seeds.
    """
    if set(arm) != set(other) or not arm:
        raise ValueError(f"a paired difference needs the same seeds on both sides; got {list(arm)} and {list(other)}")
    by_seed = {seed: value - other[seed] for seed, value in arm.items()}
    differences = np.array(list(by_seed.values()))
    mean, count = float(differences.mean()), len(differences)
    same = _ROUNDING * max(abs(value) for value in (*arm.values(), *other.values()))
    deviation = float(differences.std(ddof=1)) if count > 1 else 0.0
    # Differences that agree to rounding are one measurement repeated, not several.
    if deviation <= same:
        alike = count > 1 and abs(mean) <= same
        p_value = 1.0 if alike else None
        return PairedDifference(by_seed=by_seed, mean=mean, interval=None, effect_size=None, p_value=p_value)
    half = _half_width(differences)
    return PairedDifference(
        by_seed=by_seed,
        mean=mean,
        interval=(mean - half, mean + half),
        effect_size=mean / deviation * _hedges_correction(count - 1) if count > 2 else None,
        p_value=2 * float(special.stdtr(count - 1, -abs(mean) / (deviation / math.sqrt(count)))),
    )


def _hedges_correction(degrees_of_freedom: int) -> float:
    """Takes out what few samples add to a standardised difference (Hedges 1981); it leaves nothing of one degree."""
    half = degrees_of_freedom / 2
    return math.exp(math.lgamma(half) - math.lgamma(half - 0.5)) / math.sqrt(half)


def corrected(differences: Mapping[str, PairedDifference]) -> dict[str, PairedDifference]:
    """``differences`` with Holm's correction (Holm 1979) for all of them that have a p-value."""
    tested = {name: found.p_value for name, found in differences.items() if found.p_value is not None}
    by_name = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {
        name: found.model_copy(update={"corrected_p_value": by_name.get(name)}) for name, found in differences.items()
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down p-values: below 0.05 for any only once in twenty where nothing differs at all."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def reach(crossings: Mapping[int, tuple[float, float] | None]) -> Reach:
    """What it took to reach a target, from the last point before it and the first at it, by seed."""
    by_seed = {seed: None if crossing is None else crossing[1] for seed, crossing in crossings.items()}
    found = [crossing for crossing in crossings.values() if crossing is not None]
    if not found or len(found) < len(crossings):
        return Reach(by_seed=by_seed, mean=None, interval=None)
    before, at = (np.array(side) for side in zip(*found, strict=True))
    interval = (max(0.0, float(before.mean() - _half_width(before))), float(at.mean() + _half_width(at)))
    return Reach(by_seed=by_seed, mean=float(at.mean()), interval=interval if len(found) > 1 else None)


def _half_width(values: np.ndarray) -> float:
    """Half the width of the mean's t-interval; 0 for one value."""
    count = len(values)
    if count < 2:
        return 0.0
    return float(special.stdtrit(count - 1, 1 - LEVEL / 2) * values.std(ddof=1) / math.sqrt(count))
