"""What a reader types to get a figure again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvgraft.report.results import RECIPE_FILE
from kvgraft.report.run_folder import RunFolder


def report_command(folders: Iterable[Path]) -> str:
    """Shows what is in ``folders``."""
    return shlex.join(["kvgraft", "report", *map(str, folders)])


def again_command(runs: Sequence[RunFolder]) -> str:
    """The commands that do ``runs`` again, each in a folder beside its own, and show them."""
    copies = [Path(f"{run.path}-again") for run in runs]
    trained = [
        shlex.join(["kvgraft", "train", str(run.path / RECIPE_FILE), "--output", str(copy)])
        for run, copy in zip(runs, copies, strict=True)
    ]
    return "\n".join([*trained, report_command(copies)])


def evaluate_command(folder: Path, *options: str) -> str:
    """Measures the run in ``folder``."""
    return shlex.join(["kvgraft", "evaluate", str(folder), *options])
