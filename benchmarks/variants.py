"""What does each setting of the KV loss and of the adapters give? The same weights and batches for every setting.

    python benchmarks/variants.py recipes/gsm8k.yaml --set data.train=FOLDER --set training.steps=120 --output runs/v

Prints held-out losses and their difference to cross-entropy alone. One seed: it tells what is worth trying, not what is
better. A finished run is not done again, and refused where it was made with other settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvgraft.recipe import load_recipe
from kvgraft.report.results import RunResult
from kvgraft.run import run

VARIANTS: dict[str, list[str]] = {
    "cross-entropy alone": ["arms=[baseline]"],
    "as the recipe": [],
    "weight 1": ["kv_loss.weight=1"],
    "weight 3": ["kv_loss.weight=3"],
    "weight 30": ["kv_loss.weight=30"],
    "weight falling to zero": ["kv_loss.schedule=linear_decay"],
    "linear adapters": ["projector.mlp_ratio=linear"],
    "Elastic Bottleneck without the linear skip": ["projector.skip=false"],
    "one adapter for all layers": ["projector.sharing=shared"],
    "adapters at the guide's rate 1e-3": ["training.projector_learning_rate=1e-3"],
    "keys alone": ["kv_loss.values_weight=0"],
    "values alone": ["kv_loss.keys_weight=0"],
    "values alone, linear adapters": ["kv_loss.keys_weight=0", "projector.mlp_ratio=linear"],
    "the top layers": ["alignment.layers=last"],
    "tokens that end before": ["alignment.tokens=causal"],
    "mean over tokens": ["alignment.tokens=mean"],
    "L1": ["kv_loss.form=l1"],
    "smooth L1": ["kv_loss.form=smooth_l1"],
    "cosine": ["kv_loss.form=cosine"],
}


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe with a kv arm.")],
    output: Annotated[Path, typer.Option(help="Folder of the runs.")],
    only: Annotated[list[str] | None, typer.Option(help="Names of variants; default all.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change one field in all: a.b=value.")] = None,
) -> None:
    """Run what is missing and print the table in Markdown."""
    results = {}
    for name in only or VARIANTS:
        loaded = load_recipe(recipe, ["arms=[kv]", *(overrides or []), *VARIANTS[name]])
        results[name] = run(loaded, output / name.replace(" ", "-"), resume=True)
    typer.echo(table(results))


def table(results: dict[str, RunResult]) -> str:
    """One row for each variant."""
    steps = [point.step for point in next(iter(results.values())).arms[0].evaluations[1:]]
    baseline = results.get("cross-entropy alone")
    lines = [
        "| variant | " + " | ".join(f"step {step}" for step in steps) + " | against cross-entropy alone | KV's share |",
        "| --- |" + " ---: |" * (len(steps) + 2),
    ]
    for name, result in results.items():
        arm = result.arms[0]
        difference = f"{arm.last['loss'] - baseline.arms[0].last['loss']:+.3f}" if baseline else "-"
        share = f"{arm.gradient_shares['kv']:.0%}" if arm.gradient_shares else "-"
        losses = [f"{point.metrics['loss']:.3f}" for point in arm.evaluations[1:]]
        lines.append("| " + " | ".join([name, *losses, difference, share]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
