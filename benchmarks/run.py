"""Every benchmark of speed and size in one run: tables, and one of all aims; figures and the machine in JSON.

python benchmarks/run.py --output benchmarks.json [--only capture]
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import capture_speed
import store_speed
import torch
import transformers
import typer
from aims import aims_table

logger = logging.getLogger(__name__)


def script(name: str, *arguments: str) -> dict[str, object]:
    """Run a benchmark beside this one that prints its table; memory is measured best in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
    return {"table": subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()}


# GSM8K is fetched from the hub unless this names a folder that has it.
GSM8K = os.environ.get("GSM8K", "gsm8k")

# Enough for the steps that are timed: the teachers' KV of each text is captured before.
FEW_TEXTS = ["recipes/quickstart.yaml", "--set", "data.train_samples=64", "--set", "data.held_out_samples=8"]

# By name what measures it: a dict whose ``table`` is Markdown. Add a line for a new benchmark.
BENCHMARKS: dict[str, Callable[[], dict[str, object]]] = {
    "capture": capture_speed.measure,
    "store": store_speed.measure,
    "batches": partial(script, "batching.py", "recipes/gsm8k.yaml", "--set", f"data.train={GSM8K}"),
    "caching": store_speed.measure_caching,
    "fused loss": partial(script, "fused_loss.py", "--no-growth", "--repeats", "2"),
    "training step": partial(script, "training_step.py", *FEW_TEXTS),
    "whole run": partial(script, "whole_run.py", "recipes/quickstart.yaml", "--texts", "16"),
    "growth": partial(script, "growth.py"),
    "logit distillation": partial(script, "logit_distillation.py", "--tokens", "1024"),
}


def main(
    output: Annotated[Path, typer.Option(help="The JSON file.")] = Path("benchmarks.json"),
    only: Annotated[list[str] | None, typer.Option(help="A benchmark's name; may be repeated.")] = None,
) -> None:
    """Run the benchmarks one after the other."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    unknown = set(only or []) - set(BENCHMARKS)
    if unknown:
        raise typer.BadParameter(f"no benchmark {sorted(unknown)}; there are {', '.join(BENCHMARKS)}")
    results: dict[str, object] = {"machine": describe_machine()}
    tables: dict[str, str] = {}
    for name in only or BENCHMARKS:
        started = time.perf_counter()
        load = os.getloadavg()[0]
        try:
            found = BENCHMARKS[name]()
        except subprocess.CalledProcessError as error:
            # It said itself what went wrong; the others can be measured all the same.
            found = {"table": f"failed: {error}"}
        seconds = time.perf_counter() - started
        tables[name] = str(found["table"])
        results[name] = {**found, "took_seconds": seconds, "load_before": load}
        results["aims"] = aims_table(tables)
        typer.echo(f"## {name}\n\n{tables[name]}\n")
        output.write_text(json.dumps(results, indent=2))
    if results["aims"]:
        typer.echo(f"## In one table\n\n{results['aims']}\n")
    logger.info("written to %s", output)


def describe_machine() -> dict[str, object]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return {
        "processor": ", ".join(sorted(names)) or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matrix_gflops": _matrix_gflops(),
        "copy_gigabytes_per_second": _copy_rate(),
    }


def _matrix_gflops(size: int = 1024, repeats: int = 5) -> float:
    one, other = torch.randn(2, size, size)
    return 2 * size**3 / 1e9 / min(_seconds(lambda: one @ other) for _ in range(repeats))


def _copy_rate(megabytes: int = 256, repeats: int = 5) -> float:
    source = torch.zeros(megabytes * 1_000_000, dtype=torch.uint8)
    target = torch.empty_like(source)
    return megabytes / 1e3 / min(_seconds(lambda: target.copy_(source)) for _ in range(repeats))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    typer.run(main)
