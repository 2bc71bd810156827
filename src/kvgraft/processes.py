"""The processes of a run: one, or as many as ``accelerate launch`` or ``torchrun`` started."""

from __future__ import annotations

import torch
from accelerate import PartialState


def on_cpu() -> bool:
    """Whether this machine has no accelerator; several processes then talk through the CPU."""
    return not torch.accelerator.is_available()


def process_state() -> PartialState:
    """This process's rank, how many there are, and its device."""
    return PartialState(cpu=on_cpu())
