"""Going on from the checkpoints that the Trainer leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from kvgraft.errors import ResultError

CHECKPOINTS_FOLDER = "checkpoints"


def last_checkpoint(folder: Path) -> tuple[str | None, int]:
    """The last checkpoint in ``folder`` that was written to its end, and its step; None and 0 where there is none."""
    whole = [(int(path.name.rsplit("-", 1)[1]), str(path)) for path in folder.glob("checkpoint-*") if _is_whole(path)]
    step, path = max(whole, default=(0, None))
    return path, step


def train_from(trainer: Trainer, checkpoint: str | None, done: int) -> None:
    """Train on from ``checkpoint``, after ``done`` steps; or from the start where it is None."""
    if checkpoint is not None and done >= trainer.args.max_steps:
        # Stopped between its last step and its end: the Trainer would take one step more.
        trainer._load_from_checkpoint(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)


@contextmanager
def saving_into(folder: Path) -> Iterator[None]:
    """Name ``folder`` and the room in it where weights cannot be written: torch's own error on a full disk has neither.

    Raises:
        ResultError: they cannot; earlier checkpoints stay usable.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # No memory and lost processes are kinds of their own; what torch cannot write is a plain one.
        is_of_writing = not isinstance(error, RuntimeError) or type(error) is RuntimeError
        if not folder.is_dir() or not is_of_writing:
            raise
        raise ResultError(
            f"cannot write weights into {folder}, where {shutil.disk_usage(folder).free:,} bytes are free ({error}). "
            "Make room there and run the same command with --resume: it goes on from the last whole checkpoint"
        ) from error


class CheckpointingTrainer(Trainer):
    """The Trainer, saying in words where a checkpoint cannot be written."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with saving_into(Path(self.args.output_dir)):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Each process writes its own, and the state, by which a checkpoint is known to be whole, has to come after all.
        try:
            self.accelerator.wait_for_everyone()
        except RuntimeError as error:
            # It would be taken for a full disk.
            raise ResultError(
                f"another process of this training ended while {output_dir} was written ({error}). Run the same "
                "command with --resume: it goes on from the last whole checkpoint"
            ) from error


def _is_whole(checkpoint: Path) -> bool:
    # The Trainer writes its state last; a kill or a full disk leaves a folder without it, or a part of it.
    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes()), dict)
    except (OSError, ValueError):
        return False
