"""The guide's sizing beside what it really takes, for a terminal."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from kvgraft.guide_plan import MILLION, GuidePlan, ModelSizing, Sizes
from kvgraft.report.tables import size_text

SIZE_ROWS = (
    "widths",
    "mlp_ratio",
    "weights of an adapter",
    "the guide says",
    "with biases and norm",
    "projector (K and V)",
    "its memory, float32",
    "training it (AdamW)",
    "teacher's KV a token",
)


def guide_plan_tables(plan: GuidePlan) -> list[RenderableType]:
    """The three schemes as printed, each real model under both readings of d_model, and what the guide got wrong."""
    models = [_model(model, plan) for model in plan.models]
    return [_schemes(plan), *models, *(f"- {note}" for note in plan.notes)]


def _schemes(plan: GuidePlan) -> Table:
    table = Table(title="the guide's schemes, as printed", title_justify="left")
    table.add_column("scheme")
    for scheme in plan.schemes:
        table.add_column(scheme.title, justify="right")
    table.add_row("teacher", *(scheme.teacher for scheme in plan.schemes))
    table.add_row("layers", *(str(scheme.num_layers) for scheme in plan.schemes))
    table.add_row("dropout", *(str(scheme.dropout) for scheme in plan.schemes))
    table.add_row("init_method", *(scheme.init_method for scheme in plan.schemes))
    _add_sizes(table, [_size_cells(scheme.sizes, scheme.guide_parameters) for scheme in plan.schemes])
    return table


def _model(model: ModelSizing, plan: GuidePlan) -> Table:
    title = f"{model.teacher} ({model.parameters / 1e9:.2f}B, {model.num_layers} layers) to {plan.student}"
    table = Table(title=title, title_justify="left", caption=" ".join(model.reasons), caption_justify="left")
    table.add_column("d_model read as")
    for reading in model.readings:
        table.add_column(reading.reading, justify="right")
    # The guide's figures are of its own reading.
    figures = [model.guide_parameters, None]
    pairs = zip(model.readings, figures, strict=True)
    _add_sizes(table, [_size_cells(reading.sizes, figure) for reading, figure in pairs])
    table.add_row('mlp_ratio="auto"', *(str(reading.auto_mlp_ratio) for reading in model.readings))
    table.add_row("dropout", *[str(model.dropout)] * len(model.readings))
    return table


def _add_sizes(table: Table, columns: list[list[str]]) -> None:
    for label, *cells in zip(SIZE_ROWS, *columns, strict=True):
        table.add_row(label, *cells)


def _size_cells(sizes: Sizes, guide_parameters: int | None) -> list[str]:
    """One cell for each of :data:`SIZE_ROWS`."""
    return [
        f"{sizes.in_dim} -> {sizes.out_dim}",
        str(sizes.mlp_ratio),
        f"{sizes.adapter_weights / MILLION:.1f}M",
        "-" if guide_parameters is None else f"{guide_parameters / MILLION:.0f}M",
        f"{sizes.adapter_parameters:,}",
        f"{sizes.projector_parameters:,}",
        size_text(sizes.parameter_memory_bytes),
        size_text(sizes.training_memory_bytes),
        f"{sizes.kv_bytes_per_token:,} bytes",
    ]
