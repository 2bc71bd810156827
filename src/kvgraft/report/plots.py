"""Pictures of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from statistics import mean
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
# Those that look alike by colour do not by their dashes.
_OTHER_STYLES = tuple(product(("solid", "dashed", "dotted", "dashdot"), _OTHER_COLOURS))
# How many characters of a title fit in an inch, and of a legend's names, beside their marks, in the ten of the curves.
_TITLE_WIDTH, _LEGEND_WIDTH, _MARK_WIDTH = 9.5, 105, 7
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
    draw_arm_curves(curves, title, level=level).savefig(path, dpi=120)


def draw_arm_curves(curves: Mapping[str, Sequence[ArmResult]], title: str, *, level: str) -> Figure:
    """What :func:`save_arm_curves` saves; a panel of what no arm has is left out."""
    names = {name: fill(name, _LEGEND_WIDTH - _MARK_WIDTH) for name in curves}
    columns = max(1, min(len(names), 6, _LEGEND_WIDTH // (max(map(len, names)) + _MARK_WIDTH)))
    lines_of_words = len(curves) // columns + len(title) // int(10 * _TITLE_WIDTH)
    figure = Figure(figsize=(10, 4 + 0.2 * lines_of_words), layout="constrained")
    panels = [(metric, label) for metric, label in PANELS if _measured(curves, metric)] or PANELS[:1]
    for axes, (metric, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, curves, metric, label)
    if level in curves:
        final = mean(arm.last["loss"] for arm in curves[level])
        figure.axes[0].axhline(final, color=ARM_COLOURS.get(level), linewidth=0.8, linestyle=":")
    lines, drawn = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, [names[name] for name in drawn], loc="outside lower center", ncols=columns)
    set_title(figure, title)
    return figure


def set_title(figure: Figure, title: str) -> None:
    """``title`` above ``figure``, its lines broken where they would run over the edge."""
    width = int(_TITLE_WIDTH * figure.get_figwidth())
    figure.suptitle("\n".join(fill(line, width) for line in title.splitlines()))


def _measured(curves: Mapping[str, Sequence[ArmResult]], metric: str) -> bool:
    return any(metric in point.metrics for arms in curves.values() for arm in arms for point in arm.evaluations)


def _draw(axes: Axes, curves: Mapping[str, Sequence[ArmResult]], metric: str, label: str) -> None:
    settled: list[float] = []
    # The second panel lacks some arms; each looks there as it does in the first.
    others = cycle(_OTHER_STYLES)
    styles = {name: ("solid", ARM_COLOURS[name]) if name in ARM_COLOURS else next(others) for name in curves}
    for name, arms in curves.items():
        values: dict[int, list[float]] = {}
        for arm in arms:
            for point in arm.evaluations:
                if metric in point.metrics:
                    values.setdefault(point.step, []).append(point.metrics[metric])
        if values:
            dash, colour = styles[name]
            means = [mean(found) for found in values.values()]
            axes.plot(list(values), means, label=name, color=colour, linestyle=dash, marker=".")
            # Where one seed diverged there is no mean, and numpy's extremes leave no band either.
            lows, highs = ([pick(found) for found in values.values()] for pick in (np.min, np.max))
            axes.fill_between(list(values), lows, highs, color=colour, alpha=0.2, linewidth=0)
            # The first steps fall so far that the rest would be one flat line; of three points none is the rest.
            start = 2 if len(means) > 3 else 0
            settled += [value for line in (lows, highs) for value in line[start:] if math.isfinite(value)]
    if settled:
        margin = 0.05 * (max(settled) - min(settled)) or 0.05
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
