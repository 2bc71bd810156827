"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvgraft.report.results import RunResult

# The same arm has the same colour in every picture; tones that stay apart for colour-blind readers.
ARM_COLOURS = {"baseline": "#555555", "kv": "#0072b2", "mismatched": "#e69f00", "shared_objective": "#d55e00"}


def save_curves(result: RunResult, path: Path) -> None:
    """Held-out loss of every arm, and KV loss of those that have one, over steps, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, kv_axes = figure.subplots(1, 2)
    _draw(loss_axes, result, "loss", "held-out cross-entropy (nats per token)")
    _draw(kv_axes, result, "kv_loss", "held-out KV loss (1 = the target's mean)")
    baseline = result.arm("baseline")
    if baseline is not None:
        loss_axes.axhline(baseline.last["loss"], color=ARM_COLOURS["baseline"], linewidth=0.8, linestyle=":")
    # The first steps fall so far that the rest would be one flat line.
    settled = [point.metrics["loss"] for arm in result.arms for point in arm.evaluations[1:]]
    if settled:
        margin = 0.05 * (max(settled) - min(settled)) or 0.05
        loss_axes.set_ylim(min(settled) - margin, max(settled) + margin)
    figure.suptitle(f"{result.name} (seed {result.seed})")
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, result: RunResult, metric: str, label: str) -> None:
    for arm in result.arms:
        points = [(point.step, point.metrics[metric]) for point in arm.evaluations if metric in point.metrics]
        if points:
            axes.plot(*zip(*points, strict=True), label=arm.arm, color=ARM_COLOURS.get(arm.arm), marker=".")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
