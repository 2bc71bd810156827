"""Cosines and sines of a model's own rotary modules, at any positions and for every layer.

Which module turns the keys of which layer, and with what arguments, is learned once per model from a pass over a few
tokens. So two thetas (Gemma 3), partial rotation (GPT-NeoX, Phi) and scaling (YaRN, Llama 3) need no code of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgraft.errors import ModelError
from kvgraft.models.capture import forget_turnings, record_kv, turnings_of
from kvgraft.models.decoder import decoder_of
from kvgraft.models.evaluation_mode import evaluation_mode
from kvgraft.models.geometry import kv_geometry
from kvgraft.models.rope import Rotation, Turning, cosines_and_sines, read_rotation

# Positions of the pass that tells rotary modules apart; not 0, where all of them agree.
_PROBE_POSITIONS = (1, 2, 5, 11)


@dataclass(frozen=True)
class _RotaryCall:
    """One call of a rotary module, as the model made it, and how the layer turns its keys by it."""

    module: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    turning: Turning = "halves"

    def at(self, positions: Tensor) -> Rotation | None:
        """The same call in float32 at ``positions [batch, tokens]``."""

        def replaced(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            # Of the hidden states a rotary module takes dtype and device only.
            return torch.empty(*positions.shape, 0, device=positions.device) if value.is_floating_point() else positions

        arguments = [replaced(value) for value in self.arguments]
        options = {name: replaced(value) for name, value in self.options.items()}
        handed = cosines_and_sines(self.module(*arguments, **options))
        assert handed is not None  # as it was when this call was noted
        return read_rotation(self.turning, *handed)


_calls_of_models: WeakKeyDictionary[nn.Module, list[_RotaryCall | None]] = WeakKeyDictionary()


def rotations_at(model: PreTrainedModel, positions: Tensor) -> list[Rotation | None]:
    """What turns the keys of each layer at ``positions``, for :func:`kvgraft.models.rope.rotate`.

    Args:
        model: a causal language model of transformers; its first use runs it over four tokens.
        positions: ``[batch, tokens]`` int64.

    Returns:
        Per layer the cosines and sines ``[batch, tokens, rotary_dim]`` in float32 on the device of ``positions``,
        scaling included; None where a layer does not rotate (GPT-2). Layers that rotate alike share the same tensors.

    Raises:
        ModelError: keys are rotated in a way that cannot be taken off or put on from outside.
    """
    if model not in _calls_of_models:
        _calls_of_models[model] = _rotary_calls(model)
    calls = _calls_of_models[model]
    rotations = {id(call): call.at(positions) for call in calls if call is not None}
    return [None if call is None else rotations[id(call)] for call in calls]


def forget_rotations(model: PreTrainedModel) -> None:
    """To be called where layers of ``model`` have changed places: what was learned of each is no longer its own."""
    forget_turnings(model)
    _calls_of_models.pop(model, None)


@torch.no_grad()
def _rotary_calls(model: PreTrainedModel) -> list[_RotaryCall | None]:
    """For each layer the rotary call whose result it received."""
    positions = torch.tensor([_PROBE_POSITIONS], device=model.device)
    input_ids = torch.zeros_like(positions)
    with (
        evaluation_mode(model),
        _noting_rotary_calls(model) as noted,
        record_kv(model, stop_early=True) as recorder,
    ):
        decoder_of(model)(input_ids=input_ids, position_ids=positions, use_cache=False)
    # Refuses a model that rotates without handing cosines and sines to its layers.
    recorder.kv(torch.ones_like(input_ids), positions)

    calls: list[_RotaryCall | None] = []
    shared: dict[tuple[int, Turning], _RotaryCall] = {}
    layers = range(kv_geometry(model.config).num_layers)
    turnings = turnings_of(model, layers)
    for layer in layers:
        received, turning = recorder.rotation(layer), turnings[layer]
        if received is None:
            calls.append(None)
            continue
        made = [index for index, (_, handed) in enumerate(noted) if _same(read_rotation(turning, *handed), received)]
        if not made:
            raise ModelError(
                f"{type(model).__name__} cannot take a grafted cache: the cosines and sines of layer {layer} come from "
                "no rotary module that we can call at other positions"
            )
        call, _ = noted[made[0]]
        calls.append(shared.setdefault((made[0], turning), replace(call, turning=turning)))
    return calls


@contextmanager
def _noting_rotary_calls(model: nn.Module) -> Iterator[list[tuple[_RotaryCall, tuple[Tensor, Tensor]]]]:
    noted: list[tuple[_RotaryCall, tuple[Tensor, Tensor]]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        handed = cosines_and_sines(output)
        if handed is not None:
            noted.append((_RotaryCall(module, arguments, options), handed))

    rotary = [module for module in model.modules() if "rotary" in type(module).__name__.lower()]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in rotary]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def _same(first: Rotation | None, second: Rotation) -> bool:
    # By value and not by identity: a model spread over devices hands its layers copies.
    return first is not None and all(
        torch.equal(one.cpu(), other.cpu()) for one, other in ((first.cos, second.cos), (first.sin, second.sin))
    )
