"""How much of one model's KV can be predicted from another's, by which projector? Real models, held-out texts.

    python benchmarks/projectors.py recipes/fit.yaml --set data.train=FOLDER --output runs/projectors
    python benchmarks/projectors.py recipes/fit.yaml --set data.train=FOLDER --output runs/projectors-back --swap

``--swap`` lets the two models change places. ``--layers 10`` takes ten target layers, spread evenly, instead of all.
A finished fit is not done again; each is a run folder that `kvgraft fit` would write.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Annotated

import typer
from per_head_ridge import per_head_ridge
from rich.console import Console
from rich.logging import RichHandler

from kvgraft.align.layers import map_layers
from kvgraft.fit.data import prepare_fit
from kvgraft.fit.run import fit
from kvgraft.models.geometry import kv_geometry
from kvgraft.models.loading import load_config
from kvgraft.recipe import Recipe, StudentRecipe, load_recipe
from kvgraft.report.fit import FitReport

ONE = ["fit.sources=1", "fit.source_kinds=same", "projector.mlp_ratio=2.0", "fit.steps=600"]
THREE = [
    "fit.sources=3",
    "fit.source_kinds=both",
    "projector.mlp_ratio=0.5",
    "projector.dropout=0.3",
    "fit.learning_rate=2e-3",
    "fit.steps=600",
]
BEST = [*THREE, "projector.mlp_ratio=1.0", "projector.dropout=0.1", "fit.steps=360"]
ONE_CLOSED = ["fit.sources=1", "fit.source_kinds=both", "projector.mlp_ratio=linear", "fit.steps=0"]
THREE_CLOSED = [*ONE_CLOSED, "fit.sources=3"]
VARIANTS: dict[str, list[str]] = {
    "one layer: Elastic Bottleneck 2.0 from least squares": ONE,
    "one layer: Elastic Bottleneck 2.0, the guide's xavier": [
        *ONE,
        "projector.init_method=xavier",
        "projector.skip=false",
    ],
    "one layer: a thin bottleneck for each layer, no dropout": [
        *ONE,
        "projector.mlp_ratio=0.165",
        "projector.dropout=0",
    ],
    "one layer: trunk in one group, ratio 1.0": [*ONE, "projector.sharing=trunk", "projector.mlp_ratio=1.0"],
    "one layer: trunk in one group, ratio 2.0": [*ONE, "projector.sharing=trunk"],
    "one layer: grouped, a quarter of the adapters": [
        *ONE,
        "projector.sharing=grouped",
        "projector.num_groups=QUARTER",
    ],
    "one layer: shared by all layers": [*ONE, "projector.sharing=shared"],
    "one layer, keys and values in: Elastic Bottleneck 1.0": [
        "fit.sources=1",
        "fit.source_kinds=both",
        "projector.mlp_ratio=1.0",
        "fit.steps=600",
    ],
    "one layer, keys and values of the token and the one before": [
        "fit.sources=1",
        "fit.source_kinds=both",
        "fit.context_tokens=1",
        "projector.mlp_ratio=0.5",
        "fit.steps=600",
    ],
    "three layers, keys and values in: Elastic Bottleneck 1.0": BEST,
    "three layers, keys and values in: Elastic Bottleneck 0.5": THREE,
    "three layers, keys and values in: trunk in one group": [*BEST, "projector.sharing=trunk"],
    "three layers, weighted by attention": [*THREE, "fit.objective=attention"],
    "three layers, keys weighed by queries": [*THREE, "fit.metric=queries"],
    "closed form: one layer, keys and values in": ONE_CLOSED,
    "closed form: one layer, and the token before": [*ONE_CLOSED, "fit.context_tokens=1"],
    "closed form: one layer, and three tokens before": [*ONE_CLOSED, "fit.context_tokens=3"],
    "closed form: three layers": THREE_CLOSED,
    "closed form: three layers, and the token before": [*THREE_CLOSED, "fit.context_tokens=1"],
    "closed form: three layers, weighted by attention": [*THREE_CLOSED, "fit.objective=attention"],
}
PER_HEAD = "published closed form: per-head ridge, top {} layers"


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe for `kvgraft fit`.")],
    output: Annotated[Path, typer.Option(help="Folder of the runs.")],
    only: Annotated[list[str] | None, typer.Option(help="Names of variants, or how they start; default all.")] = None,
    swap: Annotated[bool, typer.Option("--swap", help="Let teacher and student change places.")] = False,
    layers: Annotated[int | None, typer.Option(help="Target layers, spread evenly; default all.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change one field in all: a.b=value.")] = None,
) -> None:
    """Run what is missing and print the table in Markdown."""
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)]
    )

    def load(changes: list[str]) -> Recipe:
        loaded = load_recipe(recipe, [*changes, *(overrides or [])])
        loaded = swapped(loaded) if swap else loaded
        return with_layers(loaded, layers)

    quarter = str(max(1, len(with_layers(load([]), layers).alignment.layers) // 4))
    reports = {}
    chosen = {name: changes for name, changes in VARIANTS.items() if _starts_with_any(name, only)}
    for name, changes in chosen.items():
        loaded = load([change.replace("QUARTER", quarter) for change in changes])
        reports[name] = fit(loaded, output / name.replace(" ", "-").replace(":", ""), resume=True)
    rows = [row for name, report in reports.items() for row in report_rows(name, report)]
    per_head = [top_k for top_k in (1, 3) if _starts_with_any(PER_HEAD.format(top_k), only)]
    data = prepare_fit(load(ONE)) if per_head else None
    for top_k in per_head:
        assert data is not None
        started = time.perf_counter()
        keys, values = per_head_ridge(data.train, data.held_out, top_k)
        rows.append(
            [
                PER_HEAD.format(top_k),
                "",
                f"{keys.r2:.3f}",
                f"{values.r2:.3f}",
                "",
                f"{time.perf_counter() - started:.0f} s",
            ]
        )
    header = ["projector", "parameters", "keys R2", "values R2", "attention cosine", "time to fit"]
    typer.echo("\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]))


def _starts_with_any(name: str, starts: list[str] | None) -> bool:
    return not starts or any(name.startswith(start) for start in starts)


def swapped(recipe: Recipe) -> Recipe:
    """Teacher and student in each other's place."""
    assert recipe.student.model is not None
    teacher = recipe.teachers[0]
    other = teacher.model_copy(update={"name": "SmolLM2-135M", "model": recipe.student.model})
    return recipe.model_copy(update={"teachers": [other], "student": StudentRecipe(model=teacher.model)})


def with_layers(recipe: Recipe, count: int | None) -> Recipe:
    """``count`` of the student's layers (default all), spread evenly, each with the teacher layer of the ratio."""
    assert recipe.student.model is not None
    student, teacher = (
        kv_geometry(load_config(name)).num_layers for name in (recipe.student.model, recipe.teachers[0].model)
    )
    pairs = map_layers("ratio", student, teacher)
    if count is not None:
        pairs = [pairs[round((index + 0.5) * len(pairs) / count - 0.5)] for index in range(count)]
    return recipe.model_copy(update={"alignment": recipe.alignment.model_copy(update={"layers": pairs})})


def report_rows(name: str, report: FitReport) -> list[list[str]]:
    """The projector and, on the same sources, least squares."""

    def row(label: str, prefix: str, parameters: str, seconds: float) -> list[str]:
        means = [report.mean_of(prefix + field) for field in ("keys_r2", "values_r2", "attention_cosine")]
        return [label, parameters, *("-" if mean is None else f"{mean:.3f}" for mean in means), f"{seconds:.0f} s"]

    closed = row(f"{name}: least squares alone", "least_squares_", "", report.seconds["least squares"])
    if report.steps == 0:
        return [closed]
    fallen = report.cosine_falls_where_r2_rises
    note = f" (cosine falls where R2 rises: layers {fallen})" if fallen else ""
    return [
        closed,
        row(f"**{name}**{note}", "", f"{report.parameters:,}", report.seconds["train"]),
    ]


if __name__ == "__main__":
    typer.run(main)
