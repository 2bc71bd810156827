"""What is a cache worth that the published closed form projects? Beside it our least squares, on the same questions.

    python benchmarks/graft_per_head.py recipes/graft.yaml --set data.train=FOLDER --set graft.texts=30

The per-head maps of ``per_head_ridge.py`` become a linear projector that reads every teacher layer, and go the way of
any other: the student's first tokens stay its own, and answers are judged as `kvgraft graft` does.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import torch
import typer
from per_head_ridge import HeadMaps, per_head_ridge
from rich.console import Console
from rich.logging import RichHandler

from kvgraft.fit.closed_form import fit_closed_form
from kvgraft.fit.data import FitData, prepare_fit, require_all_layers
from kvgraft.fit.run import build_projector
from kvgraft.graft.grafter import Grafter
from kvgraft.graft.questions import Questions
from kvgraft.graft.worth import Measured, cache_worth
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import Recipe, load_recipe


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe for `kvgraft graft`.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change one field: a.b=value.")] = None,
    top_k: Annotated[list[int] | None, typer.Option(help="Source layers of a head; default 1 and 3.")] = None,
) -> None:
    """Print the table in Markdown."""
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)]
    )
    loaded = load_recipe(recipe, overrides or [])
    data = prepare_fit(loaded)
    require_all_layers(data)
    mapped = build_projector(loaded, data, [[layer] for _, layer in data.layer_map], "linear")
    fit_closed_form(mapped, data.teacher.recipe.name, data.train)
    projectors = {"least squares, the mapped layer": mapped}
    for count in top_k or [1, 3]:
        projectors[f"per-head ridge, top {count}"] = per_head_projector(loaded, data, count)
    questions = Questions(data.held_out, data.held_out_examples, loaded.graft.texts)
    heads, first = data.student.geometry.num_kv_heads, loaded.graft.own_first_tokens
    measured = [
        Measured(name, Grafter(projector.eval(), data.teacher.recipe.name, heads, first), questions)
        for name, projector in projectors.items()
    ]
    statistics = data.train.student_store.statistics()
    mean = statistics.mean[:, 0], statistics.mean[:, 1]
    found = {
        name: loss.mean for name, loss in cache_worth(data.student.load(), questions, measured, mean, first).items()
    }
    none, own = found["none"], found["own"]
    typer.echo("| cache at the question's tokens | nats | retention | with another question's cache |")
    typer.echo("| --- | ---: | ---: | ---: |")
    for name in projectors:
        nats, other = found[name], found[f"{name}, another question"]
        shares = [(none - loss) / (none - own) for loss in (nats, other)]
        typer.echo(f"| {name} | {nats:.3f} | {shares[0]:.3f} | {other:.3f} ({shares[1]:.3f}) |")
    typer.echo(f"| the student's own | {own:.3f} | 1 | |\n| none | {none:.3f} | 0 | |")


def per_head_projector(recipe: Recipe, data: FitData, top_k: int) -> KVDimensionProjector:
    """The published closed form as a projector."""
    name = data.teacher.recipe.name
    alike = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"source_kinds": "same"})})
    every_layer = list(range(data.train.num_source_layers))
    projector = build_projector(alike, data, [every_layer] * len(data.layer_map), "linear")
    standards = projector.standard("input", name), projector.standard("output", name)
    assert standards[0] is not None
    assert standards[1] is not None
    for kind, maps in enumerate(per_head_ridge(data.train, data.held_out, top_k)):
        (mean, deviation), (own_mean, own_deviation) = ([part[kind] for part in standard] for standard in standards)
        projector.adapters(name)[kind].load_linear(*_in_units(maps, mean, deviation, own_mean, own_deviation))
    return projector


def _in_units(
    maps: HeadMaps,
    mean: torch.Tensor,
    deviation: torch.Tensor,
    own_mean: torch.Tensor,
    own_deviation: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of ``maps`` between a projector's standardised input and output."""
    scale = (deviation / maps.deviation).flatten().double()
    shift = ((mean - maps.mean) / maps.deviation).flatten().double()
    spread = own_deviation.double()[:, None]
    weight = (maps.weights * scale[:, None]).mT / spread[..., None]
    bias = (torch.einsum("lio,i->lo", maps.weights, shift) + maps.target_mean - own_mean) / spread
    return weight.float(), bias.float()


if __name__ == "__main__":
    typer.run(main)
