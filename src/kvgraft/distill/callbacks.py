"""What a training run shows, records, survives and reads ahead: the bar, the metrics file, Ctrl-C, and batches."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kvgraft.data.read_ahead import read_ahead
from kvgraft.processes import from_any_process
from kvgraft.progress import Advance
from kvgraft.report.log import append_metrics, read_metrics


class ProgressCallback(TrainerCallback):
    """Moves a bar by one for each step and shows the last held-out loss beside it."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One step done."""
        self._advance(1)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        """Show the held-out loss."""
        self._advance(0, note=f"held-out loss {metrics['eval_loss']:.3f}")


class ReadAheadCallback(TrainerCallback):
    """Has the next step's batches read while a step runs, and nothing in the air where an epoch ends.

    A loader that goes through its end counts its epochs, by which the next one is shuffled: that must not happen while
    the Trainer sets the next one up.
    """

    def __init__(self) -> None:
        self._source: Iterator[dict[str, Any]] | None = None
        self._ahead: Generator[dict[str, Any], None, None] | None = None

    def batches(self, source: Iterator[dict[str, Any]], depth: int) -> Iterator[dict[str, Any]]:
        """Those of ``source``, an epoch's, ``depth`` of them read ahead; the same at every call for the same epoch."""
        if self._ahead is None or self._source is not source:
            self._source, self._ahead = source, read_ahead(source, depth)
        return self._ahead

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wait for what is being read."""
        if self._ahead is not None:
            self._ahead.close()
        self._source = self._ahead = None


class MetricsCallback(TrainerCallback):
    """Appends everything the Trainer logs to ``metrics.jsonl``, one line each, with the arm's name.

    ``seconds`` is the wall time of the training so far; a training that goes on counts on from its checkpoint's.
    """

    def __init__(self, path: Path, arm: str) -> None:
        self._path, self._arm = path, arm
        self._started: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        records = read_metrics(self._path)
        earlier = [record.get("seconds", 0.0) for record in records if record["step"] <= state.global_step]
        self._started = time.perf_counter() - max(earlier, default=0.0)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Write one record."""
        if state.is_world_process_zero:
            seconds = 0.0 if self._started is None else time.perf_counter() - self._started
            append_metrics(self._path, {"arm": self._arm, "step": state.global_step, "seconds": seconds, **logs})


class EvaluateLastCallback(TrainerCallback):
    """Measures the last step too, while the trackers are still open."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for it."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


class InterruptCallback(TrainerCallback):
    """On Ctrl-C or SIGTERM (a job's time is up), finish the step, leave a checkpoint and stop.

    A second Ctrl-C stops at once. A second SIGTERM does not: clusters send it to a launcher, which passes it on, and to
    its processes.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take over the signals."""
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop with a checkpoint if asked to."""
        # Together: a process that stopped alone would leave the others waiting for its gradients.
        if from_any_process(self.interrupted):
            self.interrupted = True
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give the signals back."""
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.interrupted and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.interrupted = True
