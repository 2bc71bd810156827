"""Tensor parallelism of transformers: several processes hold one model, each some of its heads and rows.

All of them run every pass. What each then has in part, some of the KV heads and of the rows of the language-model head,
is gathered here, in every process.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from kvgraft.errors import ModelError
from kvgraft.models.geometry import kv_geometry
from kvgraft.models.latent import shared_width
from kvgraft.processes import process_state

_whole_parameters: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


def tensor_parallel_options(name: str, config: PretrainedConfig) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that share model ``name`` among all processes; none where there is only one.

    Raises:
        ModelError: the processes cannot share its KV heads evenly, or transformers is too old.
    """
    processes = process_state().num_processes
    if processes == 1:
        return {}
    heads = kv_geometry(config).num_kv_heads
    # Latents are in every process, whose heads read them.
    if heads % processes and shared_width(config.get_text_config()) is None:
        raise ModelError(
            f"{name} has {heads} KV heads, which {processes} processes cannot share evenly; start as "
            "many processes as divide them, or leave tensor_parallel out"
        )
    if "tp_plan" not in {field.name for field in fields(DistributedConfig)}:
        raise ModelError("tensor_parallel needs a newer transformers (its DistributedConfig has no tp_plan); update it")
    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def is_tensor_parallel(model: PreTrainedModel) -> bool:
    """Whether several processes hold ``model`` together, so that all have to run each pass."""
    return (getattr(model, "tp_size", None) or 1) > 1


def whole_heads(model: PreTrainedModel, part: Tensor, heads: int) -> Tensor:
    """``[batch, heads, tokens, head_dim]`` of all processes, from this one's ``part`` of the heads."""
    if not is_tensor_parallel(model) or part.shape[1] == heads:
        return part
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, part)
    return torch.cat(parts, dim=1)


def whole_parameter(module: nn.Module, name: str) -> Any:
    """Parameter ``name`` of ``module``, or None; gathered once where each process holds a part of it."""
    parameter = getattr(module, name, None)
    if not isinstance(parameter, DTensor):
        return parameter
    gathered = _whole_parameters.setdefault(module, {})
    if name not in gathered:
        gathered[name] = parameter.full_tensor().detach()
    return gathered[name]
