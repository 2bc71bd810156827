"""What a projected cache is worth to a student: one table, in a terminal, in Markdown and in JSON."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.table import Table

_DRAWS = 2000
_HEADER = ("cache at the question's tokens", "nats per answer token", "retention", "95 % interval")


class GraftReport(BaseModel):
    """Negative log-likelihood of the answers from each cache.

    Attributes:
        nats: per answer token, the first of each answer left out.
        sums: the same for each question, summed over its tokens.
        tokens: of each answer.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    seed: int
    teacher: str
    student: str
    steps: int
    questions: int
    nats: dict[str, float]
    sums: dict[str, list[float]]
    tokens: list[int]

    @classmethod
    def read(cls, path: Path) -> GraftReport:
        """Load what :func:`write_graft` saved."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))

    def retention(self, name: str) -> float:
        """Share of the gap between no question and the student's own cache that this cache closes."""
        return (self.nats["none"] - self.nats[name]) / (self.nats["none"] - self.nats["own"])

    def transfer(self, name: str) -> float:
        """Nats by which the right question's cache beats another question's."""
        return self.nats[f"{name}, another question"] - self.nats[name]

    def retention_interval(self, name: str) -> tuple[float, float]:
        """95 % of the retention over draws of the questions with replacement."""
        generator = np.random.default_rng(0)
        draws = generator.integers(0, len(self.tokens), (_DRAWS, len(self.tokens)))
        none, own, this = (np.array(self.sums[cache])[draws].sum(1) for cache in ("none", "own", name))
        low, high = np.percentile((none - this) / (none - own), [2.5, 97.5])
        return float(low), float(high)


def graft_rows(report: GraftReport) -> list[tuple[str, str, str, str]]:
    """Every cache, the lowest loss first."""
    rows = []
    for name in sorted(report.nats, key=lambda name: report.nats[name]):
        low, high = report.retention_interval(name)
        rows.append((name, f"{report.nats[name]:.3f}", f"{report.retention(name):.3f}", f"{low:.2f} to {high:.2f}"))
    return rows


def graft_summary(report: GraftReport) -> str:
    """What was measured, and what came across, in words."""
    transfers = [name for name in report.nats if f"{name}, another question" in report.nats]
    moved = "; ".join(f"{name} {report.transfer(name):.3f}" for name in transfers)
    gap = report.nats["another question, own"] - report.nats["own"]
    return (
        f"{report.teacher} reads the question, {report.student} goes on with the answer; {report.questions} held-out "
        f"questions. Transfer, the right question's cache against another's, in nats: {moved}; the student's own "
        f"{gap:.3f}."
    )


def graft_table(report: GraftReport) -> Table:
    """For a terminal."""
    table = Table(title=f"{report.name}: {graft_summary(report)}", title_justify="left")
    for index, name in enumerate(_HEADER):
        table.add_column(name, justify="right" if index else "left")
    for row in graft_rows(report):
        table.add_row(*row)
    return table


def write_graft(report: GraftReport, folder: Path) -> None:
    """``graft.md``, and ``graft.json`` last: a run that has it is finished."""
    lines = [graft_summary(report), "", "| " + " | ".join(_HEADER) + " |", "| --- | ---: | ---: | ---: |"]
    lines += ["| " + " | ".join(row) + " |" for row in graft_rows(report)]
    (folder / "graft.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "graft.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
