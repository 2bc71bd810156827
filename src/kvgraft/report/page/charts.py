"""Figures as Bokeh draws them in the reader's browser.

Words stay out of the drawings: titles, names and read values are HTML, which can be translated, read aloud and
selected. What page.js has to find has a name: ``line INDEX`` and ``band INDEX`` of an arm, and ``ruler``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.embed import json_item
from bokeh.events import MouseLeave, MouseMove, Tap
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    CustomJS,
    HoverTool,
    LinearColorMapper,
    NoOverlap,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.models.annotations import ColorBar, Span
from bokeh.palettes import Viridis256
from bokeh.plotting import figure

from kvgraft.report.page.curves import Line, arm_lines, settled_range, whole_range
from kvgraft.report.page.data import CurveFigure, HeatMapFigure, LayerMapFigure

HEIGHT = 320
MOST_POINTS = 1000
# Middle tones, so that one set is seen on white and on black; the first is the baseline's.
_TONES = ("#7d848c", "#0f86c9", "#d9641a", "#12996f", "#a86fd1", "#c08a00", "#d2548d", "#3f9c35", "#8a6d4b", "#5b74e0")
# Up to so many columns of a heat map have their names side by side.
_COLUMNS_NAMED_ACROSS = 8
_DASHES = ("solid", "dashed", "dotted", "dotdash")
# The arms of a recipe have the tones that they have in curves.png, whichever of them a page shows.
_OWN_TONES = {"kv": 0, "shared_objective": 1, "logits": 2, "mismatched": 4, "kv_logits": 5}


@dataclass(frozen=True)
class ArmStyle:
    """How an arm looks in every chart of a page."""

    arm: str
    colour: str
    dash: str


@dataclass(frozen=True)
class CurveChart:
    """A chart of curves: what Bokeh draws, and the two ranges of its vertical axis that a reader chooses from."""

    item: Mapping[str, Any]
    arms: list[ArmStyle]
    settled: tuple[float, float]
    whole: tuple[float, float]
    last_step: int
    pooled: bool
    seeds: int


def arm_styles(arms: Sequence[str]) -> dict[str, ArmStyle]:
    """A colour and a dash for each arm, all different up to 36 arms; the baseline is grey."""
    own = {arm: _OWN_TONES[arm] for arm in arms if arm in _OWN_TONES}
    others = [arm for arm in arms if arm != "baseline" and arm not in own]
    free = [index for index in range(len(arms)) if index not in own.values()]
    tones = _TONES[1:]
    styles = {
        arm: ArmStyle(arm, tones[index % len(tones)], _DASHES[index // len(tones) % len(_DASHES)])
        for arm, index in [*own.items(), *zip(others, free, strict=False)]
    }
    return styles | {arm: ArmStyle(arm, _TONES[0], "solid") for arm in arms if arm == "baseline"}


def curve_chart(shown: CurveFigure, styles: dict[str, ArmStyle], most_points: int = MOST_POINTS) -> CurveChart:
    """Lines, bands and a vertical ruler; hovering and tapping call ``kvgraftPage`` of page.js."""
    lines = arm_lines(shown.curves, most_points)
    settled, whole = ((0.0, 1.0), (0.0, 1.0)) if shown.share else (settled_range(lines), whole_range(lines))
    plot = _plot(
        y_range=Range1d(start=settled[0], end=settled[1]), tools="xpan,box_zoom,reset,save", toolbar_location="above"
    )
    if shown.share:
        plot.yaxis.formatter = NumeralTickFormatter(format="0 %")
    sources: dict[bytes, ColumnDataSource] = {}
    for index, line in enumerate(lines):
        # Arms that were measured at the same steps share one column of steps.
        source = sources.setdefault(line.steps.tobytes(), ColumnDataSource({"step": line.steps.astype(np.int32)}))
        _draw_line(plot, source, index, line, styles[line.arm])
    plot.add_layout(Span(dimension="height", location=0, line_width=1, visible=False, name="ruler"))
    for event, name in ((MouseMove, "hover"), (Tap, "hover"), (MouseLeave, "leave")):
        plot.js_on_event(event, CustomJS(code=f"window.kvgraftPage.{name}(cb_obj)"))
    return CurveChart(
        item=json_item(plot),
        arms=[styles[line.arm] for line in lines],
        settled=settled,
        whole=whole,
        last_step=max(int(line.steps[-1]) for line in lines),
        pooled=any(len({*curve.steps}) > most_points for curve in shown.curves),
        seeds=max(len(line.seeds) for line in lines),
    )


def layer_map_item(shown: LayerMapFigure) -> Mapping[str, Any]:
    """Student layers below, teacher layers above, a line for each pair; both stacks as wide as the drawing."""
    students = [student for student, _ in shown.pairs]
    teachers = [teacher for _, teacher in shown.pairs]
    below, above = _spread(students), _spread(teachers)
    plot = _plot(
        x_range=Range1d(start=-0.05, end=1.05),
        y_range=Range1d(start=-0.35, end=1.35),
        tools="",
        toolbar_location=None,
        height=190,
    )
    plot.axis.visible = False
    plot.grid.visible = False
    source = ColumnDataSource(
        {
            "below": below,
            "above": above,
            "student": students,
            "teacher": teachers,
            "zero": [0] * len(below),
            "one": [1] * len(above),
        }
    )
    pairs = plot.segment(
        "below", "zero", "above", "one", source=source, line_width=2, line_color=_TONES[1], line_alpha=0.6
    )
    for x, y, layer, offset in (("below", "zero", "student", 18), ("above", "one", "teacher", -18)):
        plot.scatter(x, y, source=source, size=10, color=_TONES[1])
        plot.text(
            x,
            y,
            layer,
            source=source,
            y_offset=offset,
            text_align="center",
            text_baseline="middle",
            text_font_size="12px",
        )
    plot.add_tools(HoverTool(renderers=[pairs], tooltips="@student ← @teacher", line_policy="interp"))
    return json_item(plot)


def heat_map_item(shown: HeatMapFigure) -> Mapping[str, Any]:
    """A rectangle for each measured value, its number on hovering."""
    cells = [
        (column, row, value)
        for row, values in zip(shown.rows, shown.values, strict=True)
        for column, value in zip(shown.columns, values, strict=True)
        if value is not None
    ]
    columns, rows, values = (list(part) for part in zip(*cells, strict=True)) if cells else ([], [], [])
    low, high = shown.span or (min(values, default=0), max(values, default=1))
    colours = LinearColorMapper(palette=Viridis256, low=low, high=high)
    plot = _plot(
        x_range=list(shown.columns),
        y_range=list(reversed(shown.rows)),
        tools="",
        toolbar_location=None,
        height=130 + 34 * len(shown.rows),
    )
    plot.grid.visible = False
    # A model of today has dozens of layers, and a phone is narrow: what has no room is read by pointing at a cell.
    plot.axis.major_label_policy = NoOverlap()
    if len(shown.columns) > _COLUMNS_NAMED_ACROSS:
        plot.xaxis.major_label_orientation = "vertical"
    source = ColumnDataSource({"column": columns, "row": rows, "value": values})
    plot.rect(
        "column", "row", 1, 1, source=source, line_color=None, fill_color={"field": "value", "transform": colours}
    )
    plot.add_tools(HoverTool(tooltips=[("", "@row, @column: @value{0.000}")]))
    plot.add_layout(
        ColorBar(color_mapper=colours, ticker=BasicTicker(desired_num_ticks=5), height=8, background_fill_alpha=0),
        "below",
    )
    return json_item(plot)


def _plot(**settings: Any) -> Any:
    plot = figure(
        sizing_mode="stretch_width",
        height=settings.pop("height", HEIGHT),
        # A chart that takes drags and wheels as its own stops a reader who only wants to scroll past.
        active_drag=None,
        active_scroll=None,
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        output_backend="canvas",
        **settings,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.axis.minor_tick_line_color = None
    plot.axis.axis_line_width = 1
    return plot


def _draw_line(plot: Any, source: ColumnDataSource, index: int, line: Line, style: ArmStyle) -> None:
    if line.low is not None and line.high is not None:
        source.data[f"low {index}"] = line.low.astype(np.float32)
        source.data[f"high {index}"] = line.high.astype(np.float32)
        plot.varea(
            "step",
            f"low {index}",
            f"high {index}",
            source=source,
            fill_color=style.colour,
            fill_alpha=0.18,
            name=f"band {index}",
        )
    source.data[f"mean {index}"] = line.mean.astype(np.float32)
    look: dict[str, Any] = {"line_color": style.colour, "line_width": 2, "name": f"line {index}"}
    if len(line.steps) > 1:
        plot.line("step", f"mean {index}", source=source, line_dash=style.dash, **look)
    else:
        # A line through one point is nothing to see.
        plot.scatter("step", f"mean {index}", source=source, size=8, fill_color=style.colour, **look)


def _spread(layers: Sequence[int]) -> list[float]:
    """Places of layers between 0 and 1, in proportion."""
    low, high = min(layers), max(layers)
    return [(layer - low) / (high - low) if high > low else 0.5 for layer in layers]
