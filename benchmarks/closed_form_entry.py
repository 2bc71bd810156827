"""How should the least-squares map enter the Elastic Bottleneck? The same sources, tokens and steps for every way.

    python benchmarks/closed_form_entry.py recipes/fit.yaml --set data.train=FOLDER

- beside: a linear skip; the bottleneck with its norm starts at zero output. What `init_method="least_squares"` does.
- inside: factored into the bottleneck, SiLU(x) - SiLU(-x) = x, which takes mlp_ratio 2.0 and no norm.
- beside, no norm: the skip, with a bottleneck without norm.
- not at all: the guide's xavier start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from kvgraft.fit.closed_form import fit_closed_form
from kvgraft.fit.data import FitData, TokenBatches, prepare_fit
from kvgraft.fit.measure import measure_fits
from kvgraft.fit.run import build_projector, start_from_closed_form
from kvgraft.fit.train import RegressionModel
from kvgraft.projector.adapters import ElasticBottleneck
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import Recipe, load_recipe

WAYS: dict[str, list[str]] = {
    "beside": [],
    "inside": ["projector.layer_norm=false", "projector.skip=false", "projector.init_method=xavier"],
    "beside, no norm": ["projector.layer_norm=false"],
    "not at all": ["projector.skip=false", "projector.init_method=xavier"],
}


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe for `kvgraft fit`.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change one field: a.b=value.")] = None,
    layers: Annotated[str, typer.Option(help="Pairs of (student, teacher) layers.")] = "[[4, 2], [15, 9], [26, 15]]",
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 200,
) -> None:
    """Print the table in Markdown."""
    common = [*(overrides or []), f"alignment.layers={layers}", f"fit.steps={steps}", "projector.mlp_ratio=2.0"]
    typer.echo(
        "| the linear map enters | parameters | keys R2 at step 0 | values R2 | keys R2 after training | values R2 |"
    )
    typer.echo("| --- | ---: | ---: | ---: | ---: | ---: |")
    for way, changes in WAYS.items():
        loaded = load_recipe(recipe, [*common, *changes])
        data = prepare_fit(loaded)
        projector = started(loaded, data, way)
        before = _means(projector, data)
        train(loaded, data, projector)
        cells = [f"{value:.3f}" for value in (*before, *_means(projector, data))]
        typer.echo(f"| {way} | {projector.count_parameters():,} | " + " | ".join(cells) + " |")


def started(recipe: Recipe, data: FitData, way: str) -> KVDimensionProjector:
    """The projector of the recipe with the closed form in it, as ``way`` says."""
    sources, name = [[teacher] for _, teacher in data.layer_map], data.teacher.recipe.name
    linear, projector = (build_projector(recipe, data, sources, ratio) for ratio in ("linear", None))
    fit_closed_form(linear, name, data.train)
    if way == "inside":
        for adapter, fitted in zip(projector.adapters(name), linear.adapters(name), strict=True):
            factor_into(adapter, fitted)
    else:
        start_from_closed_form(projector, linear, name)
    return projector


@torch.no_grad()
def factor_into(adapter: ElasticBottleneck, linear: ElasticBottleneck) -> None:
    """Make a bottleneck of twice the input's width, without norm, give what ``linear`` gives."""
    assert adapter.up is not None
    assert adapter.down is not None
    assert linear.skip is not None
    identity = torch.eye(adapter.in_dim)
    adapter.up.weight.copy_(torch.cat([identity, -identity]).expand_as(adapter.up.weight))
    adapter.down.weight.copy_(torch.cat([linear.skip.weight, -linear.skip.weight], -1))
    adapter.down.bias.copy_(linear.skip.bias)


def train(recipe: Recipe, data: FitData, projector: KVDimensionProjector) -> None:
    """Plain AdamW with one cycle, as `kvgraft fit` trains."""
    model, settings = RegressionModel(projector, data.teacher.recipe.name), recipe.fit
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    batches = TokenBatches(data.train, settings.tokens_per_step, recipe.seed)
    for _, rows in zip(range(settings.steps), batches, strict=False):
        loss = model(rows.source, rows.target)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _means(projector: KVDimensionProjector, data: FitData) -> tuple[float, float]:
    fit = measure_fits({"it": projector}, data.teacher.recipe.name, data.held_out)["it"]
    return sum(fit.keys_r2) / len(fit.keys_r2), sum(fit.values_r2) / len(fit.values_r2)


if __name__ == "__main__":
    typer.run(main)
