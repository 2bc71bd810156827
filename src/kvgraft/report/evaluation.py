"""What ``kvgraft evaluate`` found: tables, JSON, a heat map, and the answers for reading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Generic, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from pydantic import BaseModel, Field, ValidationError
from rich.table import Table

from kvgraft.errors import ReportError
from kvgraft.evaluate.gsm8k import AnswerSample, ProblemScore
from kvgraft.evaluate.similarity import KINDS, LayerSimilarity
from kvgraft.report.plots import set_title
from kvgraft.report.results import Record
from kvgraft.report.tables import number_text

EVALUATION_FOLDER = "evaluation"
SIMILARITY_PICTURE, SAMPLES_FILE = "similarity.png", "samples.jsonl"
# Name of a part, and of its file; the field of an arm that holds it.
_PARTS = {"quality": "quality", "similarity": "similarity", "gsm8k": "problems", "tasks": "tasks"}
# Column of a similarity, and the most it can be where that is known.
_MEASURES = {
    "projector_r2": "R2, projector",
    "projector_cosine": "cosine, projector",
    "least_squares_r2": "R2, least squares",
    "least_squares_cosine": "cosine, least squares",
    "cka": "linear CKA",
}
_RANKS = {"student_effective_rank": "effective rank, student", "teacher_effective_rank": "effective rank, teacher"}


class ArmEvaluation(Record):
    """One saved student. A part that was not asked for is None or empty.

    Attributes:
        quality: held-out metrics.
        similarity: by teacher, keys and values of every compared layer.
        problems: exact match.
        tasks: by task of lm-eval, its metrics.
    """

    arm: str
    quality: dict[str, float] | None = None
    similarity: dict[str, list[LayerSimilarity]] = Field(default_factory=dict)
    problems: ProblemScore | None = None
    tasks: dict[str, dict[str, float]] = Field(default_factory=dict)


class EvaluationReport(Record):
    """All students of a run, and what was asked of them."""

    name: str
    held_out_texts: int
    asked: dict[str, Any]
    arms: list[ArmEvaluation]


Content = TypeVar("Content")
Parsed = TypeVar("Parsed", bound=BaseModel)


class SavedPart(Record, Generic[Content]):
    """One file of an evaluation: of which run, what was asked, and what it gave for each arm."""

    name: str
    asked: dict[str, Any]
    arms: dict[str, Content]


@dataclass(frozen=True)
class SavedEvaluation:
    """What :func:`write_evaluation` left in a folder; a part that it does not hold is None or empty."""

    quality: SavedPart[dict[str, float]] | None
    similarity: SavedPart[dict[str, list[LayerSimilarity]]] | None
    problems: SavedPart[ProblemScore] | None
    tasks: SavedPart[dict[str, dict[str, float]]] | None
    samples: list[AnswerSample]


def read_evaluation(folder: Path) -> SavedEvaluation:
    """Load what :func:`write_evaluation` saved in ``folder``; nothing where there is no such folder.

    Raises:
        ReportError: a file that is not what it writes.
    """
    samples = folder / SAMPLES_FILE
    lines = samples.read_text(encoding="utf-8").split("\n") if samples.is_file() else []
    return SavedEvaluation(
        quality=_read_part(folder, "quality", SavedPart[dict[str, float]]),
        similarity=_read_part(folder, "similarity", SavedPart[dict[str, list[LayerSimilarity]]]),
        problems=_read_part(folder, "gsm8k", SavedPart[ProblemScore]),
        tasks=_read_part(folder, "tasks", SavedPart[dict[str, dict[str, float]]]),
        samples=[_parse(AnswerSample, line, samples) for line in lines if line.strip()],
    )


def _read_part(folder: Path, part: str, kind: type[Parsed]) -> Parsed | None:
    path = folder / f"{part}.json"
    return _parse(kind, path.read_text(encoding="utf-8"), path) if path.is_file() else None


def _parse(kind: type[Parsed], text: str, path: Path) -> Parsed:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "its start"
        raise ReportError(
            f"{path} is not what `kvgraft evaluate` writes: {first['msg']} at {place}; evaluate again or remove it"
        ) from error


def evaluation_tables(report: EvaluationReport) -> list[Table]:
    """One table for each part that was measured."""
    tables = []
    if any(arm.quality for arm in report.arms):
        names = dict.fromkeys(name for arm in report.arms for name in arm.quality or {})
        rows = {name: [number_text((arm.quality or {}).get(name)) for arm in report.arms] for name in names}
        tables.append(_table(report, f"{report.held_out_texts} held-out texts", rows))
    for teacher in dict.fromkeys(teacher for arm in report.arms for teacher in arm.similarity):
        rows = {
            f"{label} of {kind}": [_mean_of(arm.similarity.get(teacher, []), kind, field) for arm in report.arms]
            for kind in KINDS
            for field, label in (_MEASURES | _RANKS).items()
        }
        tables.append(_table(report, f"KV beside {teacher}'s, mean over layers", rows))
    scores = [arm.problems for arm in report.arms]
    if any(scores):
        tables.append(_table(report, f"problems{_asked_how(report)}", _score_rows(scores)))
    metrics = dict.fromkeys((task, name) for arm in report.arms for task in arm.tasks for name in arm.tasks[task])
    if metrics:
        rows = {
            f"{task}: {name}": [number_text(arm.tasks.get(task, {}).get(name)) for arm in report.arms]
            for task, name in metrics
        }
        tables.append(_table(report, "lm-eval", rows))
    return tables


def write_evaluation(report: EvaluationReport, samples: Sequence[AnswerSample], folder: Path) -> None:
    """Write the measured parts into ``folder``; files of parts that were not measured stay as they are.

    ``quality.json``, ``similarity.json`` and ``similarity.png``, ``gsm8k.json`` and ``samples.jsonl``, ``tasks.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part, field in _PARTS.items():
        found = {arm.arm: arm.model_dump(mode="json")[field] for arm in report.arms if getattr(arm, field)}
        if found:
            content = {"name": report.name, "asked": report.asked.get(part, {}), "arms": found}
            (folder / f"{part}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if any(arm.similarity for arm in report.arms):
        save_similarity(report, folder / SIMILARITY_PICTURE)
    if samples:
        lines = [json.dumps(sample.model_dump(), ensure_ascii=False) + "\n" for sample in samples]
        (folder / SAMPLES_FILE).write_text("".join(lines), encoding="utf-8")


def save_similarity(report: EvaluationReport, path: Path) -> None:
    """A heat map for each teacher and of keys and of values: arms and measures down, layers across, as a PNG."""
    draw_similarity(report).savefig(path, dpi=120)


def draw_similarity(report: EvaluationReport) -> Figure:
    """What :func:`save_similarity` saves, as wide as the layers need that every cell and its name can be read."""
    teachers = list(dict.fromkeys(teacher for arm in report.arms for teacher in arm.similarity))
    lines = max(len(_heat_rows(report, teacher, kind)) for teacher in teachers for kind in KINDS)
    layers = max(len(found) for arm in report.arms for found in arm.similarity.values()) // len(KINDS)
    figure = Figure(figsize=(max(13, 6 + 0.8 * layers), 1.6 + 0.3 * lines * len(teachers)), layout="constrained")
    grid = figure.subplots(len(teachers), len(KINDS), squeeze=False)
    for row, teacher in zip(grid, teachers, strict=True):
        for axes, kind in zip(row, KINDS, strict=True):
            picture = _draw_heat_map(axes, report, teacher, kind)
            # A share of a wide picture would be a broad bar.
            figure.colorbar(picture, ax=axes, fraction=0.15 * 13 / figure.get_figwidth(), aspect=30)
    set_title(figure, f"{report.name}: each student's KV beside its teacher's, {report.held_out_texts} held-out texts")
    return figure


def _draw_heat_map(axes: Axes, report: EvaluationReport, teacher: str, kind: str) -> AxesImage:
    rows = _heat_rows(report, teacher, kind)
    layers = next(arm.similarity[teacher] for arm in report.arms if teacher in arm.similarity)
    pairs = [f"{layer.student_layer}\u2190{layer.teacher_layer}" for layer in layers if layer.kind == kind]
    picture = axes.imshow([values for _, values in rows], aspect="auto", vmin=0, vmax=1, cmap="viridis")
    for line, (_, values) in enumerate(rows):
        for column, value in enumerate(values):
            # The map ends at 0, and what is below it should be seen to be; what is no number has no colour at all.
            colour = "white" if value <= 0.6 else "black"
            axes.text(column, line, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
    axes.set_xticks(range(len(pairs)), pairs, fontsize=7)
    axes.set_xlabel("student layer \u2190 teacher layer")
    axes.set_title(f"{kind}, {teacher}", fontsize=9)
    return picture


def _heat_rows(report: EvaluationReport, teacher: str, kind: str) -> list[tuple[str, list[float]]]:
    rows = []
    for field, label in _MEASURES.items():
        for arm in report.arms:
            values = [getattr(layer, field) for layer in arm.similarity.get(teacher, []) if layer.kind == kind]
            if values and None not in values:
                rows.append((f"{label} ({arm.arm})", values))
    return rows


def _table(report: EvaluationReport, title: str, rows: dict[str, list[str]]) -> Table:
    table = Table(title=f"{report.name}: {title}", title_justify="left")
    table.add_column("")
    for arm in report.arms:
        table.add_column(arm.arm, justify="right")
    for label, cells in rows.items():
        table.add_row(label, *cells)
    return table


def _score_rows(scores: Sequence[ProblemScore | None]) -> dict[str, list[str]]:
    def row(cell: Any) -> list[str]:
        return ["-" if score is None else cell(score) for score in scores]

    return {
        "exact match": row(lambda score: f"{score.accuracy:.1%} ({score.correct} of {score.problems})"),
        "95 % interval": row(lambda score: f"{score.interval[0]:.1%} to {score.interval[1]:.1%}"),
        "with a final number": row(lambda score: f"{score.answered}"),
        "empty answers": row(lambda score: f"{score.empty}"),
        "tokens per second": row(lambda score: f"{score.tokens / score.seconds:,.0f}"),
    }


def _asked_how(report: EvaluationReport) -> str:
    asked = report.asked.get("gsm8k", {})
    calculator = ", with the calculator" if asked.get("calculator") else ""
    return f" of {asked.get('data')}, {asked.get('shots')}-shot{calculator}"


def _mean_of(layers: Sequence[LayerSimilarity], kind: str, field: str) -> str:
    values = [getattr(layer, field) for layer in layers if layer.kind == kind]
    return "-" if not values or None in values else f"{mean(values):.3f}"
