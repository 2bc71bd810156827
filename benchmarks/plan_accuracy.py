"""How near does `kvgraft plan` come to what `kvgraft train` then takes? Both of one recipe, one after the other.

    OMP_NUM_THREADS=1 python benchmarks/plan_accuracy.py recipes/quickstart.yaml

Plan and run take their times from the processor's clock, so that other processes weigh little; on one thread of an
idle machine that is wall time. Stores and run go to a folder that is removed, so that the KV is captured. The run has
a process of its own, as on the command line.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer

# At the top, so that it holds in the processes that plan and run start, which import this file too.
time.perf_counter = time.process_time

from transformers.utils.logging import disable_progress_bar  # noqa: E402 - the clock comes first

from kvgraft.forecast import make_forecast  # noqa: E402
from kvgraft.recipe import Recipe, load_recipe  # noqa: E402
from kvgraft.report.results import RunResult  # noqa: E402
from kvgraft.run import run  # noqa: E402

MEGABYTE = 1e6
disable_progress_bar()


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe for `kvgraft train`.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change one field: a.b=value.")] = None,
) -> None:
    """Print the table in Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_recipe(recipe, [*(overrides or []), f"store.path={folder}/stores"])
        planned = make_forecast(loaded)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            measured: RunResult = pool.submit(_run, loaded, Path(folder) / "run").result()
        stored = sum(path.stat().st_size for path in Path(folder, "stores").rglob("*") if path.is_file())
    assert measured.peak_memory is not None
    rows = {
        "disk, MB": (planned.store_bytes / MEGABYTE, stored / MEGABYTE),
        "peak memory, MB": (planned.peak_memory.host_bytes / MEGABYTE, measured.peak_memory.host_bytes / MEGABYTE),
        **{f"{phase}, s": (planned.seconds[phase], seconds) for phase, seconds in measured.seconds.items()},
        "all phases, s": (planned.total_seconds, sum(measured.seconds.values())),
    }
    typer.echo("| what | planned | measured | planned over measured |\n| --- | ---: | ---: | ---: |")
    for name, (before, after) in rows.items():
        typer.echo(f"| {name} | {before:,.1f} | {after:,.1f} | {before / after:.2f} |")
    typer.echo(f"\nThe calibration took {planned.calibration_seconds:.1f} s.")


def _run(recipe: Recipe, folder: Path) -> RunResult:
    return run(recipe, folder)


if __name__ == "__main__":
    typer.run(main)
