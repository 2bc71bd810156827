"""Tables of a comparison: the verdicts, what they stand on, and every seed."""

from __future__ import annotations

from statistics import mean

from kvgraft.compare.comparison import ArmComparison, Comparison
from kvgraft.compare.verdicts import VerdictKind, p_value_text
from kvgraft.evaluate.statistics import PairedDifference, Reach
from kvgraft.report.page.data import Phrase, TableFigure, Words
from kvgraft.report.tables import spread_text

VERDICTS: dict[VerdictKind, Phrase] = {
    "reference": Phrase("what the others are compared with"),
    "not tested": Phrase("not tested"),
    "no difference shown": Phrase("no difference shown"),
    "worse": Phrase("worse"),
    "better": Phrase("better"),
    "not from the teacher's knowledge": Phrase("not from the teacher's knowledge"),
    "not told from its control": Phrase("not told from its control"),
}


def comparison_table(comparison: Comparison, command: str) -> TableFigure:
    """The verdict on every arm with its statistics."""
    against = {"against": comparison.against}
    return TableFigure(
        title=Phrase("Every arm against {against}", against),
        note=Phrase(
            "Losses are held-out cross-entropy, mean over the seeds, in brackets the standard deviation between them. "
            "Differences are within a seed; interval and p: paired t-test, p corrected for the number of arms (Holm). "
            "Effect size: mean over deviation of the differences (Hedges). All of it is about this text: seeds say "
            "nothing of others."
        ),
        command=command,
        columns=[
            Phrase("arm"),
            Phrase("verdict"),
            Phrase("held-out loss after"),
            Phrase("difference to {against}", against),
            Phrase("95 % interval"),
            Phrase("effect size"),
            Phrase("p, corrected"),
            Phrase("steps to {against}'s final loss", against),
            Phrase("seconds to {against}'s final loss", against),
        ],
        rows=[_comparison_row(arm) for arm in comparison.arms],
    )


def arm_table(comparison: Comparison, command: str) -> TableFigure:
    """What each arm is, what it changes in the recipe, and the verdict on it in full."""
    rows: list[list[Words]] = [
        [arm.name, arm.meaning, " ".join(arm.overrides), arm.verdict.words] for arm in comparison.arms
    ]
    return TableFigure(title=Phrase("The arms, and the verdicts in full"), command=command, columns=[], rows=rows)


def seed_table(comparison: Comparison, command: str) -> TableFigure:
    """Final loss of every arm and seed, and the lowest on the way."""
    rows: list[list[Words]] = [
        [
            arm.name,
            *(f"{arm.statistics.final.by_seed[seed]:.3f}" for seed in comparison.seeds),
            spread_text(arm.statistics.lowest),
        ]
        for arm in comparison.arms
    ]
    seeds = [Phrase("seed {seeds}", {"seeds": str(seed)}) for seed in comparison.seeds]
    return TableFigure(
        title=Phrase("Held-out loss of each seed"),
        command=command,
        columns=[Phrase("arm"), *seeds, Phrase("lowest on the way")],
        rows=rows,
    )


def share_table(comparison: Comparison, command: str) -> list[TableFigure]:
    """Mean share of each loss part in the gradient; nothing where no share was measured."""
    parts = list(
        dict.fromkeys(part for arm in comparison.arms for run in arm.runs for part in run.result.gradient_shares)
    )
    if not parts:
        return []
    rows: list[list[Words]] = [[arm.name, *(_share(arm, part) for part in parts)] for arm in comparison.arms]
    title = Phrase("Shares of the gradient, mean over training and seeds")
    return [TableFigure(title=title, command=command, columns=[Phrase("arm"), *parts], rows=rows)]


def _comparison_row(arm: ArmComparison) -> list[Words]:
    found = arm.statistics
    return [
        arm.name,
        VERDICTS[arm.verdict.kind],
        spread_text(found.final),
        "-" if found.difference is None else f"{found.difference.mean:+.3f}",
        _interval(found.difference),
        "-"
        if found.difference is None or found.difference.effect_size is None
        else f"{found.difference.effect_size:.1f}",
        p_value_text(None if found.difference is None else found.difference.corrected_p_value),
        _reach(found.steps_to_target),
        _reach(found.seconds_to_target),
    ]


def _interval(found: PairedDifference | None) -> Words:
    if found is None:
        return "-"
    return Phrase("none") if found.interval is None else "[{:+.3f}, {:+.3f}]".format(*found.interval)


def _reach(found: Reach | None) -> Words:
    if found is None:
        return Phrase("not recorded")
    reached = [f"{value:,.0f}" for value in found.by_seed.values() if value is not None]
    if not reached:
        return Phrase("never")
    if found.mean is None:
        never = str(len(found.by_seed) - len(reached))
        return Phrase("{steps}, {count} times never", {"steps": ", ".join(reached), "count": never})
    return f"{found.mean:,.0f}" + ("" if found.interval is None else " [{:,.0f}, {:,.0f}]".format(*found.interval))


def _share(arm: ArmComparison, part: str) -> str:
    shares = [run.result.gradient_shares[part] for run in arm.runs if part in run.result.gradient_shares]
    return f"{mean(shares):.1%}" if shares else "-"
