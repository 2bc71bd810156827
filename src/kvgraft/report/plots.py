"""Pictures of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvgraft.report.results import RunResult

# The same arm has the same colour in every picture; tones that stay apart for colour-blind readers.
ARM_COLOURS = {"baseline": "#555555", "kv": "#0072b2", "mismatched": "#e69f00", "shared_objective": "#d55e00"}
PANELS = (("loss", "held-out cross-entropy (nats per token)"), ("kv_loss", "held-out KV loss (1 = the target's mean)"))


def save_curves(results: Sequence[RunResult], path: Path) -> None:
    """Held-out loss of every arm, and KV loss of those that have one, over steps, as a PNG.

    With several runs (one recipe, several seeds) lines are means and bands reach from the lowest to the highest.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        _draw(axes, results, metric, label)
    baselines = [arm.last["loss"] for result in results if (arm := result.arm("baseline"))]
    if baselines:
        figure.axes[0].axhline(mean(baselines), color=ARM_COLOURS["baseline"], linewidth=0.8, linestyle=":")
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(names))
    seeds = ", ".join(str(result.seed) for result in results)
    figure.suptitle(f"{results[0].name} (seed {seeds})")
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, results: Sequence[RunResult], metric: str, label: str) -> None:
    settled: list[float] = []
    for name in (arm.arm for arm in results[0].arms):
        values: dict[int, list[float]] = {}
        for result in results:
            for point in arm.evaluations if (arm := result.arm(name)) else []:
                if metric in point.metrics:
                    values.setdefault(point.step, []).append(point.metrics[metric])
        if values:
            means = [mean(found) for found in values.values()]
            axes.plot(list(values), means, label=name, color=ARM_COLOURS.get(name), marker=".")
            lows, highs = ([pick(found) for found in values.values()] for pick in (min, max))
            axes.fill_between(list(values), lows, highs, color=ARM_COLOURS.get(name), alpha=0.2, linewidth=0)
            # The first steps fall so far that the rest would be one flat line.
            settled += means[2:] or means[1:]
    if settled:
        margin = 0.05 * (max(settled) - min(settled)) or 0.05
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
