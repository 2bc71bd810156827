"""What a fitted projector is worth: tables, pictures and JSON."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pydantic import Field
from rich.table import Table

from kvgraft.report.plots import set_title
from kvgraft.report.results import Record
from kvgraft.report.tables import dropped_text, number_text

if TYPE_CHECKING:
    from kvgraft.fit.scan import Scan


class LayerFit(Record):
    """One target layer: what it reads, and how well it is met on held-out text, beside least squares."""

    layer: int
    sources: list[int]
    keys_r2: float
    values_r2: float
    least_squares_keys_r2: float
    least_squares_values_r2: float
    attention_cosine: float | None
    least_squares_attention_cosine: float | None


class FewerLayers(Record):
    """Least squares from fewer source layers on held-out text, mean over the target layers."""

    keys_r2: float
    values_r2: float


class FitReport(Record):
    """Everything that ``kvgraft fit`` measured. ``suggested_layers`` are pairs of (student layer, teacher layer)."""

    name: str
    seed: int
    teacher: str
    student: str
    direction: str
    steps: int
    tokens: int
    held_out_texts: int
    alignment_coverage: float
    alignment_mean_span: float | None = None
    alignment_dropped: dict[str, int] = Field(default_factory=dict)
    parameters: int
    sharing: str
    parameters_by_sharing: dict[str, int] = Field(default_factory=dict)
    layers: list[LayerFit]
    fewer_layers: dict[str, FewerLayers] = Field(default_factory=dict)
    suggested_layers: list[tuple[int, int]]
    seconds: dict[str, float]

    @classmethod
    def read(cls, path: Path) -> FitReport:
        """Load what :func:`write_fit` saved."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))

    @property
    def has_diverged(self) -> bool:
        """Whether some layer is predicted by no numbers."""
        return not all(math.isfinite(layer.keys_r2 + layer.values_r2) for layer in self.layers)

    def mean_of(self, field: str) -> float | None:
        """Mean over layers of a field of :class:`LayerFit`; None where it was not measured."""
        values = [getattr(layer, field) for layer in self.layers]
        return None if any(value is None for value in values) else mean(values)

    @property
    def cosine_falls_where_r2_rises(self) -> list[int]:
        """Layers whose attention output got worse than with least squares although keys and values got better."""
        return [
            layer.layer
            for layer in self.layers
            if layer.attention_cosine is not None
            and layer.least_squares_attention_cosine is not None
            and layer.attention_cosine < layer.least_squares_attention_cosine
            and layer.keys_r2 + layer.values_r2 > layer.least_squares_keys_r2 + layer.least_squares_values_r2
        ]


_COLUMNS: list[tuple[str, Callable[[LayerFit], str]]] = [
    ("layer", lambda layer: str(layer.layer)),
    ("reads", lambda layer: ", ".join(str(source) for source in layer.sources)),
    ("keys R2", lambda layer: f"{layer.keys_r2:.3f}"),
    ("least squares", lambda layer: f"{layer.least_squares_keys_r2:.3f}"),
    ("values R2", lambda layer: f"{layer.values_r2:.3f}"),
    ("least squares", lambda layer: f"{layer.least_squares_values_r2:.3f}"),
    ("attention cosine", lambda layer: number_text(layer.attention_cosine)),
    ("least squares", lambda layer: number_text(layer.least_squares_attention_cosine)),
]


def fit_rows(report: FitReport) -> list[list[str]]:
    """One row for each layer, and the mean of all."""
    rows = [[cell(layer) for _, cell in _COLUMNS] for layer in report.layers]
    fields = (
        "keys_r2",
        "least_squares_keys_r2",
        "values_r2",
        "least_squares_values_r2",
        "attention_cosine",
        "least_squares_attention_cosine",
    )
    return [*rows, ["mean", "", *(number_text(report.mean_of(field)) for field in fields)]]


def fit_table(report: FitReport) -> Table:
    """Held-out quality of each layer, for a terminal."""
    table = Table(title=f"{report.name}: {summary(report)}", title_justify="left")
    for name, _ in _COLUMNS:
        table.add_column(name, justify="right")
    for row in fit_rows(report):
        table.add_row(*row)
    return table


def summary(report: FitReport) -> str:
    """What was fitted on what, in one line."""
    return (
        f"{report.teacher} and {report.student}, {report.direction}, {report.sharing}, {report.parameters:,} "
        f"parameters, {report.tokens:,} tokens, {report.steps} steps, {report.held_out_texts} held-out texts"
    )


def fit_markdown(report: FitReport) -> str:
    """The table, the layer map that the scan suggests, and what each phase took."""
    lines = [summary(report), "", "| " + " | ".join(name for name, _ in _COLUMNS) + " |"]
    lines += ["|" + " ---: |" * len(_COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in fit_rows(report)]
    if report.fewer_layers:
        means = "; ".join(
            f"{name} {found.keys_r2:.3f}, {found.values_r2:.3f}" for name, found in report.fewer_layers.items()
        )
        lines += ["", f"From fewer layers, R2 of keys and of values, mean over layers: {means}."]
    if report.parameters_by_sharing:
        counts = ", ".join(f"{name} {count:,}" for name, count in report.parameters_by_sharing.items())
        lines += ["", f"Parameters by `projector.sharing`: {counts}."]
    fallen = report.cosine_falls_where_r2_rises
    if fallen:
        lines += ["", f"Attention output is further off than with least squares although R2 rose in layers {fallen}."]
    if report.alignment_mean_span is not None:
        lines += [
            "",
            f"Student tokens aligned: {report.alignment_coverage:.2%}, {report.alignment_mean_span:.2f} teacher tokens "
            f"to each; without one: {dropped_text(report.alignment_dropped)}.",
        ]
    lines += [
        "",
        "Layer map that the scan suggests, for a recipe:",
        "",
        "```yaml",
        suggested_layers_yaml(report),
        "```",
    ]
    lines += ["", *(f"- {phase}: {seconds:,.1f} s" for phase, seconds in report.seconds.items())]
    return "\n".join(lines) + "\n"


def suggested_layers_yaml(report: FitReport) -> str:
    """The ``alignment`` section of a recipe with the layer map that the scan suggests."""
    pairs = yaml.safe_dump(
        [list(pair) for pair in report.suggested_layers], default_flow_style=True, width=10_000
    ).strip()
    return f"alignment:\n  layers: {pairs}"


def write_fit(report: FitReport, scan: Scan, folder: Path) -> None:
    """Tables and pictures into ``folder``; ``fit.json`` last, since a fit that has it is finished."""
    (folder / "fit.md").write_text(fit_markdown(report), encoding="utf-8")
    _save_heat_map(report, scan, folder / "layers.png")
    _save_layers(report, folder / "fit.png")
    (folder / "fit.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _save_heat_map(report: FitReport, scan: Scan, path: Path) -> None:
    """What each source layer predicts of each target layer; the chosen ones are ringed."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, r2, kind in zip(figure.subplots(1, 2), (scan.keys_r2, scan.values_r2), ("keys", "values"), strict=True):
        picture = axes.imshow(r2.numpy(), origin="lower", aspect="auto", vmin=0, vmax=1, cmap="viridis")
        for target, layers in enumerate(scan.chosen):
            axes.scatter(layers, [target] * len(layers), s=18, facecolors="none", edgecolors="white")
        axes.set_title(f"R2 of {kind} (rings: what each layer is best predicted from)", fontsize=9)
        axes.set_xlabel("layer that is read")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("layer that is predicted")
        axes.set_yticks(range(len(report.layers)), [str(layer.layer) for layer in report.layers], fontsize=6)
        figure.colorbar(picture, ax=axes)
    set_title(figure, f"{report.teacher} and {report.student}, {report.direction}")
    figure.savefig(path, dpi=120)


def _save_layers(report: FitReport, path: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = [("keys R2", "keys_r2"), ("values R2", "values_r2"), ("attention output cosine", "attention_cosine")]
    shown = [(title, field) for title, field in panels if report.mean_of(field) is not None]
    layers = [layer.layer for layer in report.layers]
    for axes, (title, field) in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        for prefix, label in (("", f"projector ({report.sharing})"), ("least_squares_", "least squares")):
            axes.plot(layers, [getattr(layer, prefix + field) for layer in report.layers], marker=".", label=label)
        axes.set_title(title)
        axes.set_xlabel("layer that is predicted")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    set_title(
        figure, f"{report.teacher} and {report.student}, {report.direction}, {report.held_out_texts} held-out texts"
    )
    figure.savefig(path, dpi=120)
