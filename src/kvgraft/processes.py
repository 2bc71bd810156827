"""The processes of a run: one, or as many as ``accelerate launch`` or ``torchrun`` started."""

from __future__ import annotations

from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce

_Value = TypeVar("_Value")


def on_cpu() -> bool:
    """Whether this machine has no accelerator; several processes then talk through the CPU."""
    return not torch.accelerator.is_available()


def process_state() -> PartialState:
    """This process's rank, how many there are, and its device."""
    return PartialState(cpu=on_cpu())


def is_apples(device: torch.device) -> bool:
    """Whether ``device`` is Apple's accelerator, which lacks some of what processors and CUDA cards compute."""
    return device.type == "mps"


def from_main_process(value: _Value) -> _Value:
    """The main process's ``value``, in every process; each has to call this."""
    held = [value]
    broadcast_object_list(held)
    return held[0]


def from_any_process(said: bool) -> bool:
    """Whether any process says so; each has to call this."""
    state = process_state()
    if state.num_processes == 1:
        return said
    return bool(reduce(torch.tensor(float(said), device=state.device), "sum") > 0)
