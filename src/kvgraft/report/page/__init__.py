"""One HTML file that shows runs or a comparison to people: curves, tables, alignment, and how to get it again."""

from kvgraft.report.page.comparison import page_of_comparison
from kvgraft.report.page.data import PageData
from kvgraft.report.page.folders import default_place, page_of_folders
from kvgraft.report.page.render import render_page, write_page
from kvgraft.report.page.runs import page_of_runs

__all__ = [
    "PageData",
    "default_place",
    "page_of_comparison",
    "page_of_folders",
    "page_of_runs",
    "render_page",
    "write_page",
]
