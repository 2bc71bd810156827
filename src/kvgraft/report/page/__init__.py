"""One HTML file that shows a run to people: curves to read values from, tables, alignment, and how to get it again."""

from kvgraft.report.page.data import PageData
from kvgraft.report.page.render import render_page, write_page
from kvgraft.report.page.runs import default_place, page_of_runs

__all__ = ["PageData", "default_place", "page_of_runs", "render_page", "write_page"]
