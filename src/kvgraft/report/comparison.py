"""What a comparison leaves for people: tables for a terminal and a file, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from kvgraft.compare.comparison import ArmComparison, Comparison
from kvgraft.compare.verdicts import VerdictKind, p_value_text
from kvgraft.evaluate.statistics import PairedDifference, Reach
from kvgraft.report.plots import save_arm_curves
from kvgraft.report.tables import markdown_table, spread_text

COMPARISON_FILE = "comparison.json"
Column = tuple[str, Callable[[ArmComparison], str]]
_STYLES: dict[VerdictKind, str] = {"better": "green", "worse": "red", "reference": "dim"}


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """``comparison.json``, ``comparison.md`` and ``curves.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(comparison_markdown(comparison), encoding="utf-8")
    save_arm_curves(
        {arm.name: [run.result for run in arm.runs] for arm in comparison.arms},
        f"{comparison.name} (seed {_seeds(comparison)})",
        folder / "curves.png",
        level=comparison.against,
    )
    comparison.write(folder / COMPARISON_FILE)


def comparison_tables(comparison: Comparison) -> list[Table]:
    """What the verdicts stand on, and the verdicts, whose words would leave the numbers no room beside them."""
    numbers = Table(title=_title(comparison), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    verdicts = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = _headline_columns(comparison)
    longest = max(len(arm.name) for arm in comparison.arms)
    for table in (numbers, verdicts):
        table.add_column("arm", overflow="fold", min_width=min(longest, 16))
    for label, _ in columns:
        numbers.add_column(label, justify="right", overflow="fold")
    verdicts.add_column("verdict", overflow="fold")
    for arm in comparison.arms:
        numbers.add_row(arm.name, *(cell(arm) for _, cell in columns))
        verdicts.add_row(arm.name, Text(arm.verdict.words, style=_STYLES.get(arm.verdict.kind, "yellow")))
    numbers.caption = _legend(comparison)
    return [numbers, verdicts]


def comparison_markdown(comparison: Comparison) -> str:
    """The verdicts, every seed, what it cost, and the commands."""
    headline: list[Column] = [*_headline_columns(comparison), ("verdict", lambda arm: arm.verdict.words)]
    lines = [
        _title(comparison),
        "",
        *_table(comparison.arms, headline),
        "",
        _legend(comparison),
        "",
        *_table(comparison.arms, _detail_columns(comparison)),
        "",
        *(f"- {arm.name}: {arm.meaning}" for arm in comparison.arms),
        *(f"- {note}" for note in comparison.notes),
        f"- The teacher's KV took {comparison.capture_seconds:,.0f} s, once for all arms; it is in no arm's seconds.",
        "",
        "```",
        comparison.command,
        "```",
        "",
        "Each run by itself:",
        "",
        "```",
        *(run.command for arm in comparison.arms for run in arm.runs),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _headline_columns(comparison: Comparison) -> list[Column]:
    target = f"{comparison.against}'s final loss"
    return [
        ("held-out loss, end", lambda arm: spread_text(arm.statistics.final)),
        (f"against {comparison.against}, paired", lambda arm: _difference(arm.statistics.difference)),
        ("95 % interval", lambda arm: _interval(arm.statistics.difference)),
        ("effect size", lambda arm: _effect_size(arm.statistics.difference)),
        ("p, corrected", lambda arm: _p_value(arm.statistics.difference)),
        (f"steps to {target}", lambda arm: _reach(arm.statistics.steps_to_target)),
    ]


def _detail_columns(comparison: Comparison) -> list[Column]:
    return [
        ("loss of each seed", lambda arm: _each(arm.statistics.final.by_seed, ".3f")),
        ("difference of each seed", lambda arm: _each_difference(arm.statistics.difference)),
        ("lowest on the way", lambda arm: spread_text(arm.statistics.lowest)),
        (f"seconds to {comparison.against}'s final loss", lambda arm: _reach(arm.statistics.seconds_to_target)),
        ("steps", lambda arm: str(arm.runs[0].result.steps)),
        ("seconds in all", lambda arm: f"{mean(run.result.training_seconds for run in arm.runs):,.0f}"),
        ("held-out KV loss, end", lambda arm: _mean_of([run.result.last.get("kv_loss") for run in arm.runs], ".3f")),
        ("shares of the gradient", _shares),
        ("adapter parameters", lambda arm: f"{arm.runs[0].result.projector_parameters:,}"),
    ]


def _table(arms: Sequence[ArmComparison], columns: Sequence[Column]) -> list[str]:
    rows = [[arm.name, *(cell(arm) for _, cell in columns)] for arm in arms]
    return markdown_table(["arm", *(label for label, _ in columns)], rows)


def _title(comparison: Comparison) -> str:
    return (
        f"{comparison.name}: seeds {_seeds(comparison)}; {comparison.train_texts:,} training texts, "
        f"{comparison.held_out_texts:,} held out; mean (standard deviation between seeds)"
    )


def _seeds(comparison: Comparison) -> str:
    return ", ".join(map(str, comparison.seeds))


def _legend(comparison: Comparison) -> str:
    return (
        f"Differences are to {comparison.against} with the same seed, which starts from the same weights and sees the "
        "same batches. Interval and p-value: paired t-test; p is corrected for the number of arms (Holm). Effect size: "
        "mean over deviation of the differences, corrected for few seeds (Hedges). Steps are those of the first "
        "evaluation at the target; their interval begins at the evaluation before. All of it is about this text and "
        "these held-out texts: seeds say nothing of others."
    )


def _difference(found: PairedDifference | None) -> str:
    return "-" if found is None else f"{found.mean:+.3f}"


def _interval(found: PairedDifference | None) -> str:
    if found is None:
        return "-"
    return "none" if found.interval is None else "{:+.3f} to {:+.3f}".format(*found.interval)


def _effect_size(found: PairedDifference | None) -> str:
    return "-" if found is None or found.effect_size is None else f"{found.effect_size:.1f}"


def _p_value(found: PairedDifference | None) -> str:
    return p_value_text(None if found is None else found.corrected_p_value)


def _reach(found: Reach | None) -> str:
    if found is None:
        return "not recorded"
    reached = [value for value in found.by_seed.values() if value is not None]
    if not reached:
        return "never"
    if found.mean is None:
        return f"{len(reached)} of {len(found.by_seed)} seeds: {', '.join(f'{value:,.0f}' for value in reached)}"
    interval = "" if found.interval is None else " ({:,.0f} to {:,.0f})".format(*found.interval)
    return f"{found.mean:,.0f}{interval}"


def _each(values: dict[int, float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values.values())


def _each_difference(found: PairedDifference | None) -> str:
    return "-" if found is None else _each(found.by_seed, "+.3f")


def _shares(arm: ArmComparison) -> str:
    parts = dict.fromkeys(part for run in arm.runs for part in run.result.gradient_shares)
    found = [f"{part} {_mean_of([run.result.gradient_shares.get(part) for run in arm.runs], '.0%')}" for part in parts]
    return ", ".join(found) or "-"


def _mean_of(values: Sequence[float | None], form: str) -> str:
    found = [value for value in values if value is not None]
    return f"{mean(found):{form}}" if found else "-"
