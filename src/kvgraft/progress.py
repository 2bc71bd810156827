"""One way to show long work: what is running, how fast, and how long it will still take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from kvgraft.processes import process_state


class Advance:
    """Handle of a running bar: call it with the units done, and optionally a note to show beside them."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress, self._task = progress, task

    def __call__(self, units: int, note: str | None = None) -> None:
        fields = {} if note is None else {"note": note}
        self._progress.update(self._task, advance=units, **fields)  # type: ignore[arg-type]


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "")


@contextmanager
def progress_bar(description: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
    """A bar on standard error for ``total`` units of work, of which ``done`` were done before.

    Where standard error is no terminal, one line is printed at the end instead.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        _SpeedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not process_state().is_main_process) as progress:
        task = progress.add_task(description, total=total, completed=done, unit=unit, note="")
        yield Advance(progress, task)
