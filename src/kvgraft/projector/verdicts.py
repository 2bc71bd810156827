"""How a claim of the founding guide is decided: what compares two arms, and the words for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import BaseModel

from kvgraft.projector.ablation import Ablation, ArmResult, Measure, smoothed, steps_to_reach

Verdict = Literal["reproduced", "not reproduced", "not comparable"]

# A figure is reproduced where ours is within this factor of it, either way.
TOLERANCE = 1.5


class Judgement(BaseModel):
    """One claim of the guide beside what was measured, and why it counts as reproduced or not."""

    claim: str
    guide: str
    measured: str
    verdict: Verdict
    why: str


def within(measured: float, claimed: float) -> bool:
    """Whether a positive figure is within :data:`TOLERANCE` of a claimed one."""
    return claimed / TOLERANCE <= measured <= claimed * TOLERANCE


def faster(first: ArmResult, second: ArmResult) -> list[bool]:
    """For each seed, whether ``first`` gets to the training loss at which ``second`` ends in fewer steps."""
    return [_reach(a.curve, b.curve) < _reach(b.curve, b.curve) for a, b in zip(first.runs, second.runs, strict=True)]


def speed_up(first: ArmResult, second: ArmResult) -> list[float]:
    """For each seed, steps that ``second`` takes to its final training loss over those of ``first`` to the same."""
    pairs = zip(first.runs, second.runs, strict=True)
    return [(_reach(b.curve, b.curve) + 1) / (_reach(a.curve, b.curve) + 1) for a, b in pairs]


def _reach(curve: Sequence[float], goal: Sequence[float]) -> float:
    step = steps_to_reach(curve, smoothed(goal)[-1]) if goal else None
    return float("inf") if step is None else step


def beats(elastic: Sequence[ArmResult], linear: Sequence[ArmResult], field: str) -> list[bool]:
    """For each seed, whether ``field`` of every ``elastic`` is below that of every ``linear``."""

    def chosen(results: Sequence[ArmResult], choose: Callable[[list[float]], float]) -> list[float]:
        rows = zip(*([getattr(run, field) for run in result.runs] for result in results), strict=True)
        return [choose(list(row)) for row in rows]

    return [worst < best for worst, best in zip(chosen(elastic, max), chosen(linear, min), strict=True)]


def verdict_of(holds: bool, comparable: bool = True) -> Verdict:
    """The verdict of a claim that ``holds`` or not, where it can be compared at all."""
    if not comparable:
        return "not comparable"
    return "reproduced" if holds else "not reproduced"


def loss_field(ablation: Ablation) -> str:
    """The loss that decides: on held-out tokens, or in training where random targets leave nothing else to learn."""
    return "final_loss" if ablation.synthetic else "held_out_loss"


def words(field: str) -> str:
    """A loss of :class:`ArmRun` for a sentence."""
    return {"final_loss": "final training loss", "held_out_loss": "held-out loss"}[field]


def losses(result: ArmResult, field: str = "final_loss") -> str:
    """Mean of a loss over seeds, for a sentence."""
    return f"{value_of(result.measure(field)):.3g}"


def value_of(measure: Measure | None) -> float:
    """Mean over seeds; NaN, which no rule accepts, where there is none."""
    return float("nan") if measure is None else measure.mean


def deviation_of(measure: Measure | None) -> float:
    """Deviation between seeds; infinite where there is none."""
    return float("inf") if measure is None or measure.deviation is None else measure.deviation


def ratio(part: float, whole: float) -> float:
    """``part / whole``; nothing is left where both diverged or the whole is zero alike."""
    if part == whole:
        return 1.0
    return part / whole if whole else float("inf")


def times(values: Sequence[float]) -> str:
    """Lowest and highest factor, for a sentence."""
    low, high = (f"{pick(values):.1f}x" for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def of_seeds(flags: Sequence[bool]) -> str:
    """How many seeds, for a sentence."""
    return f"{sum(flags)} of {len(flags)} seeds"
