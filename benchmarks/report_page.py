"""How large is the page of a large comparison, and how long does it take to write and to open?

    python benchmarks/report_page.py [--arms 20] [--seeds 5] [--steps 1000]

The runs are made up: noisy curves that fall, every step logged and every tenth evaluated. The page is opened in
headless Chromium (`make browser`), over the address of the section with the curves. Times are the browser's own, from
the start of the navigation, each time in a browser that was started for it.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import psutil
import typer
from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from kvgraft.compare.comparison import build_comparison
from kvgraft.compare.matrix import Cell, plan_matrix
from kvgraft.recipe import Recipe
from kvgraft.report.comparison import write_comparison
from kvgraft.report.environment import describe_environment
from kvgraft.report.page import page_of_folders, write_page
from kvgraft.report.results import ArmResult, Evaluation, RunResult, TeacherResult

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
EVALUATE_EVERY = 10
RECIPE = {"name": "made-up", "teachers": [{"name": "teacher", "model": "some/teacher"}], "student": {"new": {}}}
# Notes when each chart was drawn, in ms since the navigation began.
WATCH = """
new MutationObserver(changes => { for (const { target } of changes) target.drawnAt = performance.now(); }).observe(
  document, { subtree: true, attributeFilter: ["data-drawn"] });
"""
LOADED = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
# When the last of the charts in the window was drawn; null while one is not.
DRAWN = """
const shown = [...document.querySelectorAll("figure.chart")].filter(figure => {
  const box = figure.getBoundingClientRect();
  return box.height && box.bottom > 0 && box.top < innerHeight;
});
return shown.length && shown.every(figure => figure.drawnAt) ? Math.max(...shown.map(figure => figure.drawnAt)) : null;
"""


@dataclass(frozen=True)
class Opening:
    """Seconds until the load event and until all charts in the window were drawn, and the page's processor time."""

    loaded: float
    drawn: float
    processor: float


def main(
    arms: Annotated[int, typer.Option(help="Arms, cross-entropy alone and the control among them.", min=3)] = 20,
    seeds: Annotated[int, typer.Option(help="Runs of each arm.")] = 5,
    steps: Annotated[int, typer.Option(help="Of each run, all of them logged.")] = 1000,
    rounds: Annotated[int, typer.Option(help="Times that the page is opened.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Where to keep the page.")] = None,
) -> None:
    """Make the comparison up, write its page, open it, and print a table."""
    if not (Path(CHROMIUM).is_file() and Path(DRIVER).is_file()):
        raise typer.BadParameter(f"no {CHROMIUM} and {DRIVER} to open the page in: `make browser` installs them")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "comparison"
        make_comparison(folder, arms, seeds, steps)
        page = output or Path(place) / "report.html"
        started, processor = time.perf_counter(), time.process_time()
        write_page(page_of_folders([folder], with_strips=False), page)
        written, processor = time.perf_counter() - started, time.process_time() - processor
        opened = [open_page(page, Path(place) / f"profile-{number}") for number in range(rounds)]
        rows = [
            ("size of the file, MB", f"{page.stat().st_size / 1e6:.2f}"),
            ("written, s (of the processor)", f"{written:.1f} ({processor:.1f})"),
            ("opened, until the load event, s", _median_and_range([times.loaded for times in opened])),
            ("until the curves in the window are drawn, s", _median_and_range([times.drawn for times in opened])),
            ("processor time of the page until then, s", _median_and_range([times.processor for times in opened])),
        ]
    typer.echo(f"{arms} arms x {seeds} seeds x {steps:,} steps; median of {rounds} openings (lowest to highest)\n")
    typer.echo("| what | measured |\n| --- | ---: |")
    for what, measured in rows:
        typer.echo(f"| {what} | {measured} |")


def make_comparison(folder: Path, arms: int, seeds: int, steps: int) -> None:
    """What `kvgraft compare` leaves, run folders included."""
    folder.mkdir(parents=True)
    recipe = folder / "made.yaml"
    recipe.write_text(Recipe.model_validate(RECIPE).to_yaml(), encoding="utf-8")
    # The comparison adds cross-entropy alone and the control.
    own = [f"dropout-{number}:kv projector.dropout={number / 100}" for number in range(1, arms - 1)]
    matrix = plan_matrix(recipe, arms=own, seeds=range(seeds), folder=folder)
    places = {arm.name: number for number, arm in enumerate(matrix.arms)}
    results = {(cell.arm.name, cell.seed): _make_run(cell, places[cell.arm.name], steps) for cell in matrix.cells}
    write_comparison(build_comparison(matrix, results), folder)


def open_page(page: Path, profile: Path) -> Opening:
    """Open ``page`` in a browser of its own and wait for its charts."""
    options = Options()
    options.binary_location = CHROMIUM
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    service = Service(DRIVER)
    browser = Chrome(options=options, service=service)
    try:
        browser.set_page_load_timeout(300)
        browser.set_script_timeout(300)
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        browser.get(f"{page.resolve().as_uri()}#curves")
        drawn = WebDriverWait(browser, 300).until(lambda _: browser.execute_script(DRAWN))
        return Opening(browser.execute_script(LOADED) / 1e3, drawn / 1e3, _processor_seconds(service))
    finally:
        browser.quit()


def _processor_seconds(service: Service) -> float:
    """Of the busiest of the browser's pages, its own start included."""
    processes = psutil.Process(service.process.pid).children(recursive=True)
    times = [process.cpu_times() for process in processes if "--type=renderer" in process.cmdline()]
    return max(found.user + found.system for found in times)


def _make_run(cell: Cell, place: int, steps: int) -> RunResult:
    cell.folder.mkdir(parents=True)
    (cell.folder / "recipe.yaml").write_text(cell.recipe.to_yaml(), encoding="utf-8")
    with_kv = cell.arm.trains_as != "baseline"
    generator = np.random.default_rng((place, cell.seed))
    losses = 3 + place / 50 + 5 * np.exp(-np.arange(steps + 1) / (steps / 5)) + generator.normal(0, 0.1, steps + 1)
    noise = generator.random((steps + 1, 2))
    with (cell.folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            loss, share = losses[step], noise[step, 1]
            record = {
                "arm": cell.arm.trains_as,
                "step": step,
                "loss": loss,
                "ce_loss": loss,
                "grad_norm": noise[step, 0],
            }
            if with_kv:
                record |= {"kv_loss": loss / 8, "gradient_share/ce": 1 - share, "gradient_share/kv": share}
            file.write(json.dumps(record) + "\n")
    evaluations = []
    for step in range(0, steps + 1, EVALUATE_EVERY):
        loss = losses[step]
        metrics = {
            "loss": loss,
            "student_kv_deviation": noise[step, 0],
            "student_kv_effective_rank": 9 * noise[step, 1],
        }
        if with_kv:
            metrics |= {"kv_loss": loss / 8, "keys_r2/teacher": 1 - loss / 9, "values_r2/teacher": 1 - loss / 8}
        evaluations.append(Evaluation(step=step, metrics=metrics))
    result = RunResult(
        name=cell.recipe.name,
        date="2026-01-01",
        seed=cell.seed,
        student="made up",
        student_parameters=1_000_000,
        train_texts=1000,
        train_tokens=100_000,
        held_out_texts=100,
        truncated_train_texts=0,
        teachers=[
            TeacherResult(
                name="teacher",
                model="some/teacher",
                layer_map=[(layer, layer) for layer in range(28)],
                tokens=100_000,
                captured_tokens=100_000,
                tokens_per_second=1000.0,
                store_bytes=1_000_000_000,
                bytes_per_token=10_000.0,
                truncated_texts=0,
                alignment_coverage=0.99,
                alignment_dropped={"special": 100, "no_match": 100},
            )
        ],
        arms=[ArmResult(arm=cell.arm.trains_as, steps=steps, seconds=100.0, evaluations=evaluations)],
        environment=describe_environment(),
    )
    result.write(cell.folder / "result.json")
    return result


def _median_and_range(seconds: list[float]) -> str:
    return f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    typer.run(main)
