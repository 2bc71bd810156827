"""What the seeds allow to be said of an arm, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from kvgraft.compare.arms import ComparisonArm
from kvgraft.evaluate.statistics import PairedDifference
from kvgraft.report.results import Record

if TYPE_CHECKING:
    from kvgraft.compare.comparison import ArmStatistics

VerdictKind = Literal[
    "reference",
    "not tested",
    "no difference shown",
    "worse",
    "better",
    "not from the teacher's knowledge",
    "not told from its control",
]


class Verdict(Record):
    """``kind`` for a machine, ``words`` for a reader."""

    kind: VerdictKind
    words: str


def judge(arm: ComparisonArm, against: str, statistics: Mapping[str, ArmStatistics]) -> Verdict:
    """The verdict on ``arm``.

    A difference counts where its p-value, corrected for the number of arms, is below 0.05. A gain counts as the
    teacher's knowledge only where the arm is also shown to be better than its control (KV of another text). Where it is
    not, and the control is shown better too or does at least as well as the arm, the gain is not from the teacher's
    knowledge; otherwise the seeds are too few to tell.
    """
    mine = statistics[arm.name]
    difference = mine.difference
    if difference is None:
        return Verdict(kind="reference", words="what the others are compared with")
    if difference.corrected_p_value is None:
        return Verdict(kind="not tested", words=_untested(difference, against))
    if not difference.shown:
        return Verdict(kind="no difference shown", words=f"no difference to {against} shown ({_p(difference)})")
    if difference.mean > 0:
        return Verdict(kind="worse", words=f"worse than {against} ({_p(difference)})")
    better = f"better than {against} ({_p(difference)})"
    to_control = mine.difference_to_control
    if arm.control is None:
        return Verdict(kind="better", words=better)
    if to_control is None:
        return Verdict(kind="better", words=f"{better}; no control says whether the teacher's knowledge did it")
    if to_control.shown and to_control.mean < 0:
        return Verdict(kind="better", words=f"{better}, and than {arm.control} ({_p(to_control)})")
    control = statistics[arm.control].difference
    control_gains = control is not None and control.shown and control.mean < 0
    if to_control.mean >= 0 or control_gains:
        return Verdict(
            kind="not from the teacher's knowledge",
            words=f"{better}, but not from the teacher's knowledge: {arm.control} does as well ({_p(to_control)})",
        )
    return Verdict(
        kind="not told from its control",
        words=f"{better}, but not shown to be better than {arm.control} ({_p(to_control)}); more seeds may tell",
    )


def _untested(difference: PairedDifference, against: str) -> str:
    seen = f"{difference.mean:+.3f} to {against} seen"
    if len(difference.by_seed) == 1:
        return f"not tested: {seen} with one seed, which says nothing of the spread; no interval is given"
    return f"not tested: {seen}, the same with every seed, as if it were one; no interval is given"


def _p(difference: PairedDifference) -> str:
    return f"p {p_value_text(difference.corrected_p_value, equals='= ')}"


def p_value_text(p_value: float | None, equals: str = "") -> str:
    """A p-value with the digits that tell on which side of 0.05 it is."""
    if p_value is None:
        return "-"
    return "< 0.0001" if p_value < 0.0001 else f"{equals}{p_value:.4f}"
