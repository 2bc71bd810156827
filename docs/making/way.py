"""Draws docs/way.svg, the picture of the way on the concepts page: ``python docs/making/way.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

FROZEN, TRAINED, KEPT, LOSS = "#e3e7ec", "#cfe8fb", "#fdf1cc", "#f9d9d6"
INK = "#22303c"
WIDTH, HEIGHT = 1.9, 0.9
# Name: centre, words, colour.
BOXES = {
    "text": ((1.1, 2.0), "text", "#ffffff"),
    "teacher": ((3.6, 3.4), "teacher\nreads it once", FROZEN),
    "store": ((6.2, 3.4), "store\nits KV on disk", KEPT),
    "align": ((8.8, 3.4), "alignment\ntokens, layers", FROZEN),
    "student": ((3.6, 0.6), "student", TRAINED),
    "student_kv": ((6.2, 0.6), "the student's\nown KV", TRAINED),
    "adapter": ((8.8, 0.6), "adapter", TRAINED),
    "kv_loss": ((11.4, 2.0), "KV loss", LOSS),
    "cross_entropy": ((3.6, -1.1), "cross-entropy", LOSS),
    "result": ((8.8, -1.1), "evaluation\nreport", "#ffffff"),
}
ARROWS = [
    ("text", "teacher"),
    ("text", "student"),
    ("teacher", "store"),
    ("store", "align"),
    ("align", "kv_loss"),
    ("student", "student_kv"),
    ("student_kv", "adapter"),
    ("adapter", "kv_loss"),
    ("student", "cross_entropy"),
]


def draw(path: Path) -> None:
    """Save the picture; the same bytes each time."""
    matplotlib.rcParams["svg.hashsalt"] = "way"
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    figure = Figure(figsize=(10.4, 5.2), facecolor="#ffffff")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 12.6)
    axes.set_ylim(-1.9, 4.4)
    axes.axis("off")
    for (x, y), words, colour in BOXES.values():
        axes.add_patch(
            FancyBboxPatch(
                (x - WIDTH / 2, y - HEIGHT / 2),
                WIDTH,
                HEIGHT,
                boxstyle="round,pad=0,rounding_size=0.12",
                facecolor=colour,
                edgecolor=INK,
                linewidth=1.1,
            )
        )
        axes.text(x, y, words, ha="center", va="center", fontsize=11, color=INK)
    for start, end in ARROWS:
        _arrow(axes, start, end)
    _arrow(axes, "student", "result", dashed=True)
    # The other direction: the student goes on from the teacher's projected cache.
    _arrow(axes, "store", "student", dashed=True)
    axes.text(5.35, 2.05, "graft: a projector\ngives it the teacher's cache", fontsize=9, color=INK, va="center")
    axes.text(6.2, -0.62, "trained", fontsize=9, color=INK, ha="center")
    figure.savefig(path, metadata={"Date": None})


def _arrow(axes: Axes, start: str, end: str, dashed: bool = False) -> None:
    (x1, y1), (x2, y2) = BOXES[start][0], BOXES[end][0]
    ends = (_edge(x1, y1, x2, y2), _edge(x2, y2, x1, y1))
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.3, "linestyle": "--" if dashed else "-"}
    axes.annotate("", xy=ends[1], xytext=ends[0], arrowprops=style)


def _edge(x: float, y: float, towards_x: float, towards_y: float) -> tuple[float, float]:
    """Where the line from a box's centre towards another point leaves the box."""
    dx, dy = towards_x - x, towards_y - y
    share = min(
        (WIDTH / 2) / abs(dx) if dx else float("inf"),
        (HEIGHT / 2) / abs(dy) if dy else float("inf"),
    )
    return x + dx * share, y + dy * share


if __name__ == "__main__":
    draw(Path("docs/way.svg"))
