"""What a projected cache is worth to a student, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from textwrap import fill

from matplotlib.figure import Figure

from kvgraft.report.plots import set_title

# Zeros are further off than all others and would press them together; they stand in the table.
_LEFT_OUT = "zeros"
_NAME_WIDTH = 36


def save_caches(nats: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """``graft.png`` of ``nats[cache]``, per answer token and one for each seed."""
    draw_caches(nats, title).savefig(path, dpi=120)


def draw_caches(nats: Mapping[str, Sequence[float]], title: str) -> Figure:
    """What :func:`save_caches` saves: a line for each cache, the lowest loss above, beside another question's cache.

    Points are means over the seeds; whiskers reach from the lowest to the highest.
    """
    another = {name: f"{name}, another question" for name in nats} | {"own": "another question, own"}
    shuffled = {name: f"{name}, tokens shuffled" for name in nats}
    rows = [name for name in nats if name not in {*another.values(), *shuffled.values(), _LEFT_OUT}]
    rows.sort(key=lambda name: mean(nats[name]), reverse=True)
    names = [fill(name, _NAME_WIDTH) for name in rows]
    figure = Figure(figsize=(10, 1.8 + 0.2 * sum(1 + len(name.splitlines()) for name in names)), layout="constrained")
    axes = figure.subplots()
    kinds = (
        ("its tokens shuffled", "#555555", "x", [shuffled[name] for name in rows]),
        ("another question's", "#e69f00", "o", [another[name] for name in rows]),
        ("the cache itself", "#0072b2", "o", rows),
    )
    for row, name in enumerate(rows):
        if another[name] in nats:
            axes.plot([mean(nats[name]), mean(nats[another[name]])], [row, row], color="#bbbbbb", zorder=1)
    for label, colour, mark, caches in kinds:
        found = [(row, nats[cache]) for row, cache in enumerate(caches) if cache in nats]
        heights = [mean(values) for _, values in found]
        spread = [
            [height - min(values) for height, (_, values) in zip(heights, found, strict=True)],
            [max(values) - height for height, (_, values) in zip(heights, found, strict=True)],
        ]
        places = [row for row, _ in found]
        axes.errorbar(heights, places, xerr=spread, label=label, color=colour, marker=mark, linestyle="", capsize=3)
    for name in ("none", "own"):
        axes.axvline(mean(nats[name]), color="#999999", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_xlabel("nats per answer token, lower is better (dotted: no question, and the student's own cache)")
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside lower center", ncols=len(kinds))
    set_title(figure, title)
    return figure
