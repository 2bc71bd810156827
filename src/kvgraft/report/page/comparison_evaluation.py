"""What ``kvgraft evaluate`` found in the runs of a comparison: exact match and bits per byte, by arm and seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvgraft.report.evaluation import EVALUATION_FOLDER, read_evaluation
from kvgraft.report.page.commands import evaluate_command
from kvgraft.report.page.data import Phrase, TableFigure, Words
from kvgraft.report.page.evaluation import problems_command
from kvgraft.report.page.measures import values_text
from kvgraft.report.run_folder import RunFolder

# How many answers were written together changes nothing in them.
_WITHOUT_EFFECT = "batch_size"


@dataclass(frozen=True)
class _Measured:
    """One number of one run, how it is written, and the command that measures it."""

    arm: str
    seed: int
    value: float
    text: str
    command: str


def evaluation_tables(cells: Mapping[tuple[str, int], RunFolder]) -> list[TableFigure]:
    """Tables of what lies in the ``evaluation`` folders of ``cells``, by the comparison's arm and seed.

    Runs that were asked other problems, or asked otherwise, do not compare: each way of asking has a table of its own.

    Raises:
        ReportError: a file there that `kvgraft evaluate` did not write.
    """
    matches: dict[str, list[_Measured]] = {}
    titles: dict[str, Phrase] = {}
    bits: list[_Measured] = []
    for (arm, seed), cell in cells.items():
        evaluation = read_evaluation(cell.path / EVALUATION_FOLDER)
        if evaluation.problems is not None:
            asked, command = evaluation.problems.asked, problems_command(cell, evaluation.problems.asked)
            for score in evaluation.problems.arms.values():
                key = json.dumps({**asked, "problems": score.problems, _WITHOUT_EFFECT: None}, sort_keys=True)
                titles[key] = _exact_match_title(asked, score.problems)
                text = f"{score.accuracy:.1%} ({score.correct}/{score.problems})"
                matches.setdefault(key, []).append(_Measured(arm, seed, score.accuracy, text, command))
        for metrics in evaluation.quality.arms.values() if evaluation.quality is not None else ():
            if "bits_per_byte" in metrics:
                value, command = metrics["bits_per_byte"], evaluate_command(cell.path, "--only", "quality")
                bits.append(_Measured(arm, seed, value, f"{value:.3f}", command))
    tables = [_table(titles[key], found, ".1%") for key, found in matches.items()]
    return [*tables, *([_table(Phrase("Bits per byte of held-out text"), bits, ".3f")] if bits else [])]


def _exact_match_title(asked: Mapping[str, Any], problems: int) -> Phrase:
    values = {"problems": f"{problems:,}", "data": str(asked.get("data")), "shots": str(asked.get("shots"))}
    if asked.get("calculator"):
        return Phrase(
            "Exact match on {problems} problems of {data}, {shots} solved ones before each, with the calculator", values
        )
    return Phrase("Exact match on {problems} problems of {data}, {shots} solved ones before each", values)


def _table(title: Phrase, measured: Iterable[_Measured], form: str) -> TableFigure:
    """A row for each arm, a column for each seed, and the mean over the seeds that were measured."""
    found = {(one.arm, one.seed): one for one in measured}
    seeds = sorted({seed for _, seed in found})
    rows: list[list[Words]] = []
    for arm in dict.fromkeys(arm for arm, _ in found):
        own = [found[arm, seed] for seed in seeds if (arm, seed) in found]
        cells = [found[arm, seed].text if (arm, seed) in found else "-" for seed in seeds]
        rows.append([arm, *cells, values_text([one.value for one in own], form)])
    return TableFigure(
        title=title,
        note=Phrase("Of the runs that were evaluated; mean, and in brackets the standard deviation between seeds."),
        command="\n".join(one.command for one in found.values()),
        columns=[
            Phrase("arm"),
            *(Phrase("seed {seeds}", {"seeds": str(seed)}) for seed in seeds),
            Phrase("mean"),
        ],
        rows=rows,
    )
