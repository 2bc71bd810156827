"""Is one arm of a recipe better than another? Every arm over several seeds, with the spread between seeds.

    python benchmarks/arms_over_seeds.py recipes/gsm8k.yaml --set data.train=FOLDER --output runs/gsm8k

Each seed is a run of its own in OUTPUT/seed-N; a finished one is not done again, and an interrupted one goes on. Give
single seeds to several processes to use more cores, then all of them for the table.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from kvgraft.recipe import load_recipe
from kvgraft.report.plots import save_curves
from kvgraft.report.results import ArmResult, RunResult
from kvgraft.run import RESULT_FILE, run


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe with a baseline arm.")],
    output: Annotated[Path, typer.Option(help="Folder of the runs.")],
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change one field: a.b=value.")] = None,
) -> None:
    """Run what is missing and print the table in Markdown."""
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True), show_path=False)]
    )
    results = []
    for seed in seeds.split(","):
        folder = output / f"seed-{seed}"
        if (folder / RESULT_FILE).is_file():
            results.append(RunResult.read(folder / RESULT_FILE))
        else:
            results.append(run(load_recipe(recipe, [*(overrides or []), f"seed={seed}"]), folder, resume=True))
    save_curves(results, output / "curves.png")
    typer.echo(table(results))


def table(results: list[RunResult]) -> str:
    """One row for each arm: mean over seeds with the standard deviation between them, and the paired difference."""
    lines = [
        f"{results[0].name}: seeds {', '.join(str(result.seed) for result in results)}; "
        f"{results[0].train_texts} training texts, {results[0].held_out_texts} held out; "
        "mean (standard deviation between seeds)",
        "",
        "| arm | held-out loss at the end | lowest on the way | against the baseline, paired | each seed | "
        "steps to the baseline's final loss | held-out KV loss, end | KV's share of the gradient |",
        "| --- | ---: | ---: | ---: | --- | --- | ---: | ---: |",
    ]
    for name in dict.fromkeys(arm.arm for result in results for arm in result.arms):
        pairs = [(arm, _baseline(result)) for result in results if (arm := result.arm(name)) is not None]
        arms = [arm for arm, _ in pairs]
        differences = [arm.last["loss"] - baseline.last["loss"] for arm, baseline in pairs]
        steps = [arm.steps_to(baseline.last["loss"]) for arm, baseline in pairs]
        reached = ", ".join("never" if step is None else f"{step}" for step in steps)
        cells = [
            name if len(arms) == len(results) else f"{name} ({len(arms)} of the seeds)",
            _spread(arms, lambda arm: arm.last["loss"]),
            _spread(arms, lambda arm: min(point.metrics["loss"] for point in arm.evaluations)),
            _mean_and_deviation(differences, "+.3f"),
            ", ".join(f"{difference:+.3f}" for difference in differences),
            f"{reached} of {arms[0].steps}",
            _spread(arms, lambda arm: arm.last["kv_loss"]) if "kv_loss" in arms[0].last else "-",
            _spread(arms, lambda arm: arm.gradient_shares["kv"]) if arms[0].gradient_shares else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _baseline(result: RunResult) -> ArmResult:
    arm = result.arm("baseline")
    if arm is None:
        raise typer.BadParameter(f"the run of seed {result.seed} has no baseline arm to compare with; add it to arms")
    return arm


def _spread(arms: list[ArmResult], number: Callable[[ArmResult], float]) -> str:
    return _mean_and_deviation([number(arm) for arm in arms], ".3f")


def _mean_and_deviation(values: list[float], form: str) -> str:
    deviation = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


if __name__ == "__main__":
    typer.run(main)
