"""Pictures of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvgraft.report.results import ArmResult, RunResult

# The same arm has the same colour in every picture; tones that stay apart for colour-blind readers.
ARM_COLOURS = {
    "baseline": "#555555",
    "kv": "#0072b2",
    "mismatched": "#e69f00",
    "shared_objective": "#d55e00",
    "logits": "#009e73",
    "kv_logits": "#cc79a7",
}
_OTHER_COLOURS = ("#56b4e9", "#8c6d1f", "#6a3d9a", "#1b3a5c", "#b2560d", "#5b8c5a")
PANELS = (("loss", "held-out cross-entropy (nats per token)"), ("kv_loss", "held-out KV loss (1 = the target's mean)"))


def save_curves(results: Sequence[RunResult], path: Path) -> None:
    """Held-out loss of every arm, and KV loss of those that have one, over steps, as a PNG.

    With several runs (one recipe, several seeds) lines are means and bands reach from the lowest to the highest.
    """
    curves = {
        name: [arm for result in results if (arm := result.arm(name)) is not None]
        for name in dict.fromkeys(arm.arm for result in results for arm in result.arms)
    }
    seeds = ", ".join(str(result.seed) for result in results)
    save_arm_curves(curves, f"{results[0].name} (seed {seeds})", path, level="baseline")


def save_arm_curves(curves: Mapping[str, Sequence[ArmResult]], title: str, path: Path, *, level: str) -> None:
    """As :func:`save_curves`, from each arm's trainings; a dotted line marks where those of arm ``level`` ended."""
    figure = Figure(figsize=(10, 4 + 0.2 * (len(curves) // 6)), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        _draw(axes, curves, metric, label)
    if level in curves:
        final = mean(arm.last["loss"] for arm in curves[level])
        figure.axes[0].axhline(final, color=ARM_COLOURS.get(level), linewidth=0.8, linestyle=":")
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=min(len(names), 6))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, curves: Mapping[str, Sequence[ArmResult]], metric: str, label: str) -> None:
    settled: list[float] = []
    # The second panel lacks some arms; each keeps the colour that it has in the first.
    others = iter(cycle(_OTHER_COLOURS))
    colours = {name: ARM_COLOURS.get(name) or next(others) for name in curves}
    for name, arms in curves.items():
        values: dict[int, list[float]] = {}
        for arm in arms:
            for point in arm.evaluations:
                if metric in point.metrics:
                    values.setdefault(point.step, []).append(point.metrics[metric])
        if values:
            means = [mean(found) for found in values.values()]
            axes.plot(list(values), means, label=name, color=colours[name], marker=".")
            lows, highs = ([pick(found) for found in values.values()] for pick in (min, max))
            axes.fill_between(list(values), lows, highs, color=colours[name], alpha=0.2, linewidth=0)
            # The first steps fall so far that the rest would be one flat line.
            settled += [value for value in means[2:] or means[1:] if math.isfinite(value)]
    if settled:
        margin = 0.05 * (max(settled) - min(settled)) or 0.05
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
