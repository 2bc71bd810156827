"""The numbers of every arm in a table: values of one run, or means over seeds with their spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvgraft.evaluate.statistics import spread
from kvgraft.report.page.data import Phrase, TableFigure, Words
from kvgraft.report.page.seeds import SeedMeasurements
from kvgraft.report.results import ArmResult
from kvgraft.report.tables import spread_text

Value = Callable[[ArmResult, ArmResult | None], float | None]


@dataclass(frozen=True)
class Measure:
    """One column: ``value`` takes an arm and the baseline arm of the same seed, if there is one."""

    title: Phrase
    value: Value
    form: str


def _first(name: str) -> Value:
    return lambda arm, baseline: arm.first.get(name)


def _last(name: str) -> Value:
    return lambda arm, baseline: arm.last.get(name)


def _share(part: str) -> Value:
    return lambda arm, baseline: arm.gradient_shares.get(part)


def difference_to_baseline(arm: ArmResult, baseline: ArmResult | None) -> float | None:
    """Final held-out loss less the baseline's of the same seed; None for the baseline itself and without one."""
    return None if baseline is None or arm is baseline else arm.last["loss"] - baseline.last["loss"]


HEADLINE = (
    Measure(Phrase("held-out loss before"), _first("loss"), ".3f"),
    Measure(Phrase("held-out loss after"), _last("loss"), ".3f"),
    Measure(Phrase("against the baseline"), difference_to_baseline, "+.3f"),
    Measure(Phrase("perplexity after"), _last("perplexity"), ",.1f"),
    Measure(Phrase("fall of the KV loss"), lambda arm, baseline: arm.kv_reduction(), ".1%"),
    Measure(Phrase("training time in seconds"), lambda arm, baseline: arm.training_seconds, ",.0f"),
)
DETAILS = (
    Measure(Phrase("held-out bits per byte after"), _last("bits_per_byte"), ".3f"),
    Measure(Phrase("KV loss before"), _first("kv_loss"), ".3f"),
    Measure(Phrase("KV loss after"), _last("kv_loss"), ".3f"),
    Measure(Phrase("logit loss before"), _first("logit_loss"), ".3f"),
    Measure(Phrase("logit loss after"), _last("logit_loss"), ".3f"),
    Measure(Phrase("cross-entropy's share of the gradient"), _share("ce"), ".1%"),
    Measure(Phrase("KV loss's share of the gradient"), _share("kv"), ".1%"),
    Measure(Phrase("logit loss's share of the gradient"), _share("logit"), ".1%"),
    Measure(Phrase("student KV deviation before"), _first("student_kv_deviation"), ".2f"),
    Measure(Phrase("student KV deviation after"), _last("student_kv_deviation"), ".2f"),
    Measure(Phrase("student KV effective rank before"), _first("student_kv_effective_rank"), ".2f"),
    Measure(Phrase("student KV effective rank after"), _last("student_kv_effective_rank"), ".2f"),
    Measure(Phrase("real tokens of those processed"), lambda arm, baseline: arm.real_token_share, ".1%"),
    Measure(Phrase("projector parameters"), lambda arm, baseline: arm.projector_parameters or None, ",.0f"),
)


def headline_table(results: Sequence[SeedMeasurements], command: str) -> TableFigure:
    """What a reader asks first of every arm."""
    columns, rows = _columns(results, HEADLINE)
    columns.append(Phrase("steps to the baseline's final loss"))
    for row, arm in zip(rows, arm_names(results), strict=True):
        row.append(_steps_to_baseline(results, arm))
    return TableFigure(
        title=Phrase("Every arm at the end"),
        note=_spread_note(results),
        command=command,
        columns=columns,
        rows=rows,
    )


def detail_table(results: Sequence[SeedMeasurements], command: str) -> TableFigure:
    """What tells why an arm ended where it did."""
    columns, rows = _columns(results, DETAILS)
    return TableFigure(
        title=Phrase("KV loss, gradients and the student's own KV"),
        note=_spread_note(results),
        command=command,
        columns=columns,
        rows=rows,
    )


def arm_names(results: Sequence[SeedMeasurements]) -> list[str]:
    """Arms of all seeds, in the order in which they first come."""
    return list(dict.fromkeys(arm.arm for result in results for arm in result.arms))


def values_of(results: Sequence[SeedMeasurements], arm: str, value: Value) -> list[float]:
    """``value`` of ``arm`` with every seed that has it."""
    pairs = [(found, result.arm("baseline")) for result in results if (found := result.arm(arm)) is not None]
    values = [value(found, baseline) for found, baseline in pairs]
    return [number for number in values if number is not None]


def values_text(values: Sequence[float], form: str) -> str:
    """:func:`kvgraft.report.tables.spread_text` of ``values``; a dash where there are none."""
    return spread_text(spread(dict(enumerate(values))), form) if values else "-"


def _columns(results: Sequence[SeedMeasurements], measures: Sequence[Measure]) -> tuple[list[Words], list[list[Words]]]:
    """Headings and one row for each arm; measures that no arm has are left out."""
    arms = arm_names(results)
    found = [(measure, [values_of(results, arm, measure.value) for arm in arms]) for measure in measures]
    shown = [(measure, values) for measure, values in found if any(values)]
    rows: list[list[Words]] = []
    for index, arm in enumerate(arms):
        seeds = sum(result.arm(arm) is not None for result in results)
        name: Words = arm
        if seeds < len(results):
            name = Phrase("{arm} ({some} of {all} seeds)", {"arm": arm, "some": str(seeds), "all": str(len(results))})
        rows.append([name, *(values_text(values[index], measure.form) for measure, values in shown)])
    return [Phrase("arm"), *(measure.title for measure, _ in shown)], rows


def _spread_note(results: Sequence[SeedMeasurements]) -> Phrase:
    if len(results) == 1:
        return Phrase(
            "One seed: how far another seed would land is unknown, so small differences between arms prove nothing."
        )
    return Phrase("Mean over seeds; in brackets the standard deviation between them. Differences are within a seed.")


def _steps_to_baseline(results: Sequence[SeedMeasurements], arm: str) -> Words:
    reached = []
    for result in results:
        found, baseline = result.arm(arm), result.arm("baseline")
        if found is not None and baseline is not None:
            reached.append(found.steps_to(baseline.last["loss"]))
    if not reached:
        return "-"
    steps = ", ".join(str(step) for step in reached if step is not None)
    never = sum(step is None for step in reached)
    if never == len(reached):
        return Phrase("never")
    return Phrase("{steps}, {count} times never", {"steps": steps, "count": str(never)}) if never else steps
