"""Which layers of a teacher and the student go together: table and picture."""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from kvgraft.align.evidence import LayerEvidence
from kvgraft.report.results import RunResult


def layer_tables(result: RunResult) -> list[Table]:
    """For each teacher whose layers were found by evidence: the map, its scores, and the best of each row."""
    tables = []
    for teacher in result.teachers:
        if teacher.layer_evidence is None:
            continue
        method = teacher.layer_evidence.method
        table = Table(title=f"layers of {teacher.name} by {method}", title_justify="left")
        for column in ("student layer", "teacher layer", "score", "highest score", "of teacher layer"):
            table.add_column(column, justify="right")
        for row in _rows(teacher.layer_evidence):
            table.add_row(*row)
        tables.append(table)
    return tables


def layers_markdown(result: RunResult) -> str:
    """:func:`layer_tables` in Markdown."""
    lines = []
    for teacher in result.teachers:
        if teacher.layer_evidence is not None:
            lines += ["", f"Layers of {teacher.name} by {teacher.layer_evidence.method}:", ""]
            lines += [
                "| student layer | teacher layer | score | highest score | of teacher layer |",
                "|" + " ---: |" * 5,
            ]
            lines += ["| " + " | ".join(row) + " |" for row in _rows(teacher.layer_evidence)]
    return "".join(f"{line}\n" for line in lines)


def save_layer_maps(result: RunResult, folder: Path) -> None:
    """A heat map ``layers-<teacher>.png`` for each teacher whose layers were found by evidence."""
    for teacher in result.teachers:
        if teacher.layer_evidence is not None:
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", teacher.name)
            _save_heat_map(teacher.name, teacher.layer_evidence, folder / f"layers-{name}.png")


def _save_heat_map(teacher: str, evidence: LayerEvidence, path: Path) -> None:
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(evidence.scores, origin="lower", aspect="auto", vmin=0, vmax=1, cmap="viridis")
    students, teachers = zip(*evidence.layer_map, strict=True)
    axes.scatter(teachers, students, s=24, facecolors="none", edgecolors="white")
    axes.set_title(f"{evidence.method} over {evidence.tokens:,} tokens (rings: the map)", fontsize=9)
    axes.set_xlabel(f"layer of {teacher}")
    axes.set_ylabel("layer of the student")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(picture, ax=axes)
    figure.savefig(path, dpi=120)


def _rows(evidence: LayerEvidence) -> list[list[str]]:
    rows = []
    for student, teacher in evidence.layer_map:
        scores = evidence.scores[student]
        best = max(range(len(scores)), key=scores.__getitem__)
        rows.append([str(student), str(teacher), f"{scores[teacher]:.3f}", f"{scores[best]:.3f}", str(best)])
    return rows
