"""What a projected cache is worth to a student: one table, in a terminal, in Markdown and in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from kvgraft.report.graft_picture import save_caches
from kvgraft.report.results import Record
from kvgraft.report.tables import markdown_table

_DRAWS = 2000
_LENGTH_PARTS = 3
CONTROL = "the same adapters on the student's own KV"
_HEADER = ("cache at the question's tokens", "nats per answer token", "retention", "95 % interval")


class FirstToken(Record):
    """Seconds until the token after ``tokens`` of the student's, the median of some turns.

    Attributes:
        from_store: by projector: the teacher's KV read, aligned, projected, rotated and put into a cache, and one token
            decoded; projector and store are open already.
        student, teacher: each reads the text itself.
        bytes_per_token: that are read from the store.
    """

    tokens: int
    from_store: dict[str, float]
    student: float
    teacher: float
    bytes_per_token: float


class GraftReport(Record):
    """Negative log-likelihood of the answers from each cache.

    Attributes:
        nats: per answer token, the first of each answer left out.
        sums: the same for each question, summed over its tokens.
        tokens: of each answer.
        question_tokens: of each question.
        parameters: of each measured projector.
        bytes_per_token: of what is read instead of the question.
        bf16: whether it was projected in bfloat16.
        first_token: None where it was not measured.
        seconds: of each phase.
    """

    name: str
    seed: int
    teacher: str
    student: str
    steps: int
    continuation_steps: int
    questions: int
    question_tokens: list[int]
    nats: dict[str, float]
    sums: dict[str, list[float]]
    tokens: list[int]
    parameters: dict[str, int]
    bytes_per_token: dict[str, float]
    bf16: bool = False
    first_token: FirstToken | None = None
    seconds: dict[str, float]

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
        none, own, this = (self._drawn(cache) for cache in ("none", "own", name))
        low, high = np.percentile((none - this) / (none - own), [2.5, 97.5])
        return float(low), float(high)

    def difference(self, name: str, other: str) -> tuple[float, float, float]:
        """Nats per token of ``name`` less those of ``other``, and 95 % of it over draws of the questions."""
        low, high = np.percentile(self._drawn(name) - self._drawn(other), [2.5, 97.5])
        return self.nats[name] - self.nats[other], float(low), float(high)

    def retention_by_length(self, name: str) -> list[tuple[int, int, float]]:
        """Fewest and most question tokens, and the retention, of short, middling and long questions."""
        groups = np.array_split(np.argsort(self.question_tokens, kind="stable"), _LENGTH_PARTS)
        lengths = np.array(self.question_tokens)
        found = []
        for group in groups:
            none, own, this = (np.array(self.sums[cache])[group].sum() for cache in ("none", "own", name))
            found.append((int(lengths[group].min()), int(lengths[group].max()), float((none - this) / (none - own))))
        return found

    def _drawn(self, name: str) -> NDArray[np.float64]:
        return draw_sums(np.array(self.sums[name]), self.tokens)


def draw_sums(sums: NDArray[np.float64], tokens: Sequence[int]) -> NDArray[np.float64]:
    """``sums[questions]`` per token in draws of the questions with replacement, the same draws at every call."""
    draws = np.random.default_rng(0).integers(0, len(tokens), (_DRAWS, len(tokens)))
    drawn: NDArray[np.float64] = sums[draws].sum(1) / np.array(tokens)[draws].sum(1)
    return drawn


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
        f"{gap:.3f}.{' Projected in bfloat16.' if report.bf16 else ''}"
    )


def graft_title(report: GraftReport) -> str:
    """Who reads, who answers, and how many questions."""
    return (
        f"{report.name}: {report.teacher} reads the question, {report.student} goes on with the answer; "
        f"{report.questions} held-out questions"
    )


def graft_table(report: GraftReport) -> Table:
    """For a terminal."""
    table = Table(title=f"{report.name}: {graft_summary(report)}", title_justify="left")
    for index, name in enumerate(_HEADER):
        table.add_column(name, justify="right" if index else "left")
    for row in graft_rows(report):
        table.add_row(*row)
    return table


def comparison_rows(report: GraftReport) -> list[tuple[str, str, str]]:
    """Trained grafts against the student's own cache and against the control that has tuned the student."""
    others = [name for name in ("own", CONTROL) if name in report.nats]
    rows = []
    for name in report.parameters:
        for other in others:
            if name != other:
                nats, low, high = report.difference(name, other)
                rows.append((name, other, f"{nats:+.3f} ({low:+.3f} to {high:+.3f})"))
    return rows


def length_rows(report: GraftReport) -> list[tuple[str, ...]]:
    """Retention of every projector for short, middling and long questions."""
    if len(report.question_tokens) < _LENGTH_PARTS:
        return []
    return [
        (name, *(f"{retention:.3f}" for _, _, retention in report.retention_by_length(name)))
        for name in report.parameters
    ]


def first_token_rows(report: GraftReport) -> list[tuple[str, str, str, str]]:
    """Seconds to the first token, and over what the student and the teacher take to read the text."""
    timed = report.first_token
    if timed is None:
        return []
    ways = {f"{name}, from the store": seconds for name, seconds in timed.from_store.items()}
    ways |= {"the student reads the text": timed.student, f"{report.teacher} reads the text": timed.teacher}
    return [
        (name, f"{seconds:.3f}", f"{seconds / timed.student:.2f}", f"{seconds / timed.teacher:.2f}")
        for name, seconds in ways.items()
    ]


def write_graft(report: GraftReport, folder: Path) -> None:
    """``graft.md`` and ``graft.png``, and ``graft.json`` last: a run that has it is finished."""
    lines = [graft_summary(report), "", *markdown_table(_HEADER, graft_rows(report))]
    lines += ["", "Nats against other caches, 95 % over questions:", ""]
    lines += markdown_table(("cache", "against", "nats"), comparison_rows(report))
    by_length = length_rows(report)
    if by_length:
        spans = report.retention_by_length("own")
        lines += ["", "Retention by the question's tokens:", ""]
        lines += markdown_table(("cache", *(f"{low} to {high}" for low, high, _ in spans)), by_length)
    if report.first_token is not None:
        lines += ["", f"To the first token after {report.first_token.tokens:,} tokens:", ""]
        lines += markdown_table(("way", "seconds", "over the student", "over the teacher"), first_token_rows(report))
    lines += ["", *(f"- {name}: {count:,} parameters" for name, count in report.parameters.items())]
    lines += [f"- {name}: {count:,.0f} bytes a token" for name, count in report.bytes_per_token.items()]
    lines += [f"- {phase}: {seconds:,.0f} s" for phase, seconds in report.seconds.items()]
    (folder / "graft.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    nats = {cache: [loss] for cache, loss in report.nats.items()}
    save_caches(nats, f"{graft_title(report)}, seed {report.seed}", folder / "graft.png")
    (folder / "graft.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
