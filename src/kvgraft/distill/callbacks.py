"""What a training run shows, records and survives: the bar, the metrics file, and Ctrl-C."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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


class InterruptCallback(TrainerCallback):
    """On Ctrl-C, finish the step, leave a checkpoint and stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take over the signal."""
        self._previous = signal.signal(signal.SIGINT, self._note)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop with a checkpoint if asked to."""
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give the signal back."""
        signal.signal(signal.SIGINT, self._previous)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
