"""From what a page shows to one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from kvgraft.report.page.charts import MOST_POINTS, arm_styles, curve_chart, heat_map_item, layer_map_item
from kvgraft.report.page.data import (
    CurveFigure,
    HeatMapFigure,
    LayerMapFigure,
    PageData,
    Phrase,
    Words,
)
from kvgraft.report.page.translations import in_chinese

# Numbers in all curves of a page; each takes about 5 bytes of the file.
_MOST_NUMBERS = 600_000
_TEMPLATES = "templates"


def write_page(page: PageData, path: Path) -> None:
    """Save :func:`render_page` as ``path``; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page(page), encoding="utf-8")


def render_page(page: PageData) -> str:
    """One HTML document with its styles, its script and the plotting library inside."""
    environment = Environment(
        loader=PackageLoader("kvgraft.report.page", _TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # In Bokeh's JSON an object is written out where it first comes, and referred to after that.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.filters["words"] = _in_both_languages
    environment.filters["id"] = id
    template = environment.get_template("page.html")
    return template.render(
        page=page,
        phrase=lambda english, **values: _in_both_languages(Phrase(english, values)),
        drawings=_drawings(page),
        styles=_file("page.css"),
        script=_file("page.js"),
        library=Markup("\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)),
        version=version("kvgraft"),
    )


def _in_both_languages(words: Words) -> Markup:
    """Words as HTML: a phrase in English and in Chinese, of which the page shows one; anything else as it is."""
    if isinstance(words, str):
        return escape(words)
    english, chinese = words.english.format(**words.values), in_chinese(words)
    return Markup('<span lang="en">{}</span><span lang="zh">{}</span>').format(english, chinese)


def _file(name: str) -> Markup:
    return Markup(files("kvgraft.report.page").joinpath(_TEMPLATES).joinpath(name).read_text(encoding="utf-8"))


def _drawings(page: PageData) -> dict[int, Any]:
    """What Bokeh draws of each figure, by the figure's ``id()``."""
    figures = [figure for section in page.sections for figure in (*section.figures, *section.more)]
    curves = [figure for figure in figures if isinstance(figure, CurveFigure)]
    styles = arm_styles(page.arms)
    most_points = _points_in_budget(curves)
    drawn: dict[int, Any] = {}
    for figure in figures:
        if isinstance(figure, CurveFigure):
            drawn[id(figure)] = curve_chart(figure, styles, most_points)
        elif isinstance(figure, LayerMapFigure):
            drawn[id(figure)] = layer_map_item(figure)
        elif isinstance(figure, HeatMapFigure):
            drawn[id(figure)] = heat_map_item(figure)
    return drawn


def _points_in_budget(curves: Sequence[CurveFigure]) -> int:
    """Points of each line so that all lines, with their bands, stay within the budget."""
    lines = sum(len({curve.arm for curve in figure.curves}) for figure in curves)
    return max(2, min(MOST_POINTS, _MOST_NUMBERS // max(1, 3 * lines)))
