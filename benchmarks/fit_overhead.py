"""What does fitting cost over the arithmetic of its adapters? Ratios, measured one after the other in one run.

    python benchmarks/fit_overhead.py recipes/fit.yaml --set data.train=FOLDER

Every layer of the student, keys and values. The plain way is a forward and a backward pass of the same adapters over as
many tokens that lie in memory, without data reading, loss bookkeeping, optimizer or checkpoints.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from kvgraft.fit.closed_form import fit_closed_form
from kvgraft.fit.data import KVRows, prepare_fit
from kvgraft.fit.run import build_projector, start_from_closed_form
from kvgraft.fit.train import RegressionModel, train_projector
from kvgraft.recipe import load_recipe


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe for `kvgraft fit`.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change one field: a.b=value.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the fit that is timed.")] = 8,
) -> None:
    """Print the ratios in Markdown."""
    changes = [f"fit.steps={steps}", f"fit.save_every={steps}", f"fit.evaluate_every={steps}"]
    loaded = load_recipe(recipe, [*(overrides or []), *changes])
    data = prepare_fit(loaded)
    teacher, tokens = data.teacher.recipe.name, loaded.fit.tokens_per_step
    sources = [[layer] for _, layer in data.layer_map]
    linear, projector = (build_projector(loaded, data, sources, ratio) for ratio in ("linear", None))

    started = time.perf_counter()
    found = fit_closed_form(linear, teacher, data.train)
    closed_form = (time.perf_counter() - started) / found.tokens
    start_from_closed_form(projector, linear, teacher)
    model = RegressionModel(projector, teacher, held_out=data.held_out.rows(2048))
    plain = _plain_seconds(model, data.train.rows(tokens), steps) / (steps * tokens)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        train_projector(model, loaded.fit, data.train, Path(folder), loaded.seed)
        fitting = (time.perf_counter() - started) / (steps * tokens)
    plain = (plain + _plain_seconds(model, data.train.rows(tokens), steps) / (steps * tokens)) / 2
    rows = [
        ("forward and backward of the adapters alone", plain),
        (f"fitting, all included ({steps} steps, one evaluation, one checkpoint)", fitting),
        (f"least squares in closed form ({found.tokens:,} tokens)", closed_form),
    ]
    typer.echo(f"{len(sources)} layers, keys and values, {projector.count_parameters():,} parameters\n")
    typer.echo("| what | microseconds a token | over the plain way |\n| --- | ---: | ---: |")
    for name, seconds in rows:
        typer.echo(f"| {name} | {seconds * 1e6:,.0f} | {seconds / plain:.2f} |")


def _plain_seconds(model: RegressionModel, rows: KVRows, steps: int) -> float:
    model.train()
    with torch.no_grad():
        sources = model.projector.sources_of_rows(model.teacher, *rows.source[:, None])
    adapters = model.projector.adapters(model.teacher)
    started = time.perf_counter()
    for _ in range(steps):
        for adapter, source in zip(adapters, sources, strict=True):
            adapter(source).sum().backward()
        model.zero_grad()
    return time.perf_counter() - started


if __name__ == "__main__":
    typer.run(main)
