"""Where a training's numbers go beside ``metrics.jsonl``: TensorBoard, and whatever else transformers reports to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

TENSORBOARD = "tensorboard"
TENSORBOARD_FOLDER = "tensorboard"


def tracker_problems(names: Sequence[str]) -> list[str]:
    """What keeps ``training.report_to: names`` from working, one sentence each."""
    available = get_available_reporting_integrations()
    problems = []
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            problems.append(
                f"training.report_to: there is no tracker {name!r}; known: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        elif name not in available:
            problems.append(
                f"training.report_to: {name} is not installed; install its package, or leave it out "
                "(--set training.report_to=[])"
            )
    return problems


def others_than_tensorboard(names: Sequence[str]) -> list[str]:
    """The trackers that the Trainer makes itself, from its own ``report_to``."""
    return [name for name in names if name != TENSORBOARD]


def tracker_callbacks(names: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """What the Trainer needs beside ``report_to`` so that each arm has a run of its own in every tracker.

    Args:
        names: the recipe's ``training.report_to``.
        folder: of the arm; TensorBoard's files go into ``tensorboard`` in it.
    """
    callbacks: list[TrainerCallback] = []
    if TENSORBOARD in names:
        tensorboard = TensorBoardCallback()
        # The Trainer's own writes what is logged before training into ./runs, and the rest beside the checkpoints.
        tensorboard.logging_dir = str(folder / TENSORBOARD_FOLDER)
        callbacks.append(tensorboard)
    if "wandb" in names:
        callbacks.append(_FinishWandb())
    return callbacks


class _FinishWandb(TrainerCallback):
    """wandb keeps one run open for a whole process, and the next arm would go on in it."""

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the arm's run."""
        import wandb

        if state.is_world_process_zero:
            wandb.finish()
