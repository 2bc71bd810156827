"""Keys and values of any transformers model, taken where every layer hands them to attention.

While recording, the attention function stands behind one that notes key and value, so that a model computes exactly
what it computes otherwise. Keys are turned back with the cosines and sines that the layer received. Fused projections,
key norms, sliding windows and several thetas need no code of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgraft.errors import ModelError
from kvgraft.kv import KV
from kvgraft.models.decoder import decoder_of
from kvgraft.models.evaluation_mode import evaluation_mode
from kvgraft.models.geometry import kv_geometry
from kvgraft.models.ids import require_ids
from kvgraft.models.interception import intercepted_attention
from kvgraft.models.placement import input_device
from kvgraft.models.rope import Rotation, Turning, find_turning, unrotate
from kvgraft.models.tensor_parallel import whole_heads

# Tokens and distance of the check that un-rotated keys do not depend on where a text stands, and how far keys without
# rotation may be from those of a text with another end: quantisation in 8 bits looks at all tokens at once.
_PROBE_TOKENS, _PROBE_SHIFT, _PROBE_TOLERANCE, _OTHER_END_TOLERANCE = 8, 7, 0.05, 0.02
# How each layer that was checked turns its keys.
_turnings: WeakKeyDictionary[nn.Module, dict[int, Turning]] = WeakKeyDictionary()


class _LastLayerReached(Exception):  # noqa: N818 - control flow, not an error
    pass


class KVRecorder:
    """What one forward pass handed to attention; see :func:`record_kv`."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], rotated: bool) -> None:
        self._model, self._layers, self._rotated = model, tuple(layers), rotated
        self._recorded: dict[int, tuple[Tensor, Tensor]] = {}
        self._rotations: dict[int, Rotation | None] = {}
        self._gradients = torch.is_grad_enabled()

    def begin_pass(self) -> None:
        """Told before the first layer runs: a layer whose gradients are off in a pass with gradients is cut off."""
        self._gradients = torch.is_grad_enabled()

    def read_rotations(self, rotations: dict[int, Rotation | None]) -> None:
        """Where the cosines and sines that each layer received will be found."""
        self._rotations = rotations

    def note(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keys (rotated) and values ``[batch, heads, tokens, head_dim]`` of ``layer``, or one tensor for both."""
        if self._gradients and not torch.is_grad_enabled():
            raise ModelError(
                f"{_name(self._model)} runs under reentrant gradient checkpointing, which cuts captured KV off from "
                "its gradient; enable checkpointing with gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if layer in self._layers:
            self._recorded[layer] = (keys, values)

    @property
    def complete(self) -> bool:
        """Whether every wanted layer has been seen."""
        return len(self._recorded) == len(set(self._layers))

    def rotation(self, layer: int) -> Rotation | None:
        """What turned the keys of ``layer``, or None where they do not turn."""
        return self._rotations.get(layer)

    def kv(self, attention_mask: Tensor, position_ids: Tensor | None = None) -> KV:
        """The recorded KV; ``position_ids`` default to ``0 .. tokens - 1``, as the model's own do.

        Where several processes hold the model, each has to call this and gets all heads.

        Raises:
            ModelError: some layer handed nothing over, or in another shape than the config says; a mask of another
                shape than what was read; or a pass that went on from a cache, whose keys were not all rotated in it.
        """
        self._require_capturable()
        self._require_whole_pass(attention_mask)
        keys = [self._recorded[layer][0] for layer in self._layers]
        # Undone here and not while recording: under gradient checkpointing the layer's forward pass runs twice and
        # must do the same both times.
        if not self._rotated:
            rotations = [self._rotations.get(layer) for layer in self._layers]
            keys = [
                key if rotation is None else unrotate(key, *rotation)
                for key, rotation in zip(keys, rotations, strict=True)
            ]
        mask = attention_mask.bool()
        if position_ids is None:
            position_ids = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        # What stands for key and value alike is turned back for both.
        recorded = (self._recorded[layer] for layer in self._layers)
        values = [key if own is value else value for key, (own, value) in zip(keys, recorded, strict=True)]
        # Layers of one model may lie on several devices.
        keys, values = ([tensor.to(mask.device) for tensor in tensors] for tensors in (keys, values))
        return KV(torch.stack(keys, 1), torch.stack(values, 1), position_ids, mask, self._layers, self._rotated)

    def _require_capturable(self) -> None:
        name = _name(self._model)
        missing = sorted(set(self._layers) - set(self._recorded))
        if missing:
            raise ModelError(
                f"{name} cannot be captured: layers {missing} do not pass keys and values through transformers' "
                "attention interface. Use an architecture that does, such as Llama, Qwen, Mistral, Gemma, Phi or GPT-2"
            )
        geometry = kv_geometry(self._model.config)
        expected = (geometry.num_kv_heads, geometry.head_dim)
        for layer, kinds in self._recorded.items():
            keys, values = (whole_heads(self._model, kind, geometry.num_kv_heads) for kind in kinds)
            self._recorded[layer] = (keys, values)
        for layer, (keys, values) in self._recorded.items():
            shapes = [(tensor.shape[1], tensor.shape[3]) for tensor in (keys, values)]
            if shapes != [expected, expected]:
                raise ModelError(
                    f"{name} cannot be captured: layer {layer} has keys and values of (heads, width) {shapes[0]} and "
                    f"{shapes[1]} where its config says {expected}; compressed or uneven KV is not covered"
                )
        rotary = any("rotary" in type(module).__name__.lower() for module in self._model.modules())
        if rotary and not self._rotated and not self._rotations:
            raise ModelError(
                f"{name} cannot be captured before rotation: it rotates keys but does not hand cosines and sines to "
                "its attention layers; ask for rotated=True"
            )

    def _require_whole_pass(self, attention_mask: Tensor) -> None:
        for layer, (keys, _) in self._recorded.items():
            batch, _, tokens, _ = keys.shape
            if tuple(attention_mask.shape) != (batch, tokens):
                raise ModelError(
                    f"attention_mask must be [{batch}, {tokens}] to go with what {_name(self._model)} attended to in "
                    f"layer {layer}, the last pass in the block; got {list(attention_mask.shape)}"
                )
            rotation = None if self._rotated else self._rotations.get(layer)
            if rotation is not None and rotation.cos.shape[-2] != tokens:
                raise ModelError(
                    f"{_name(self._model)} went on from a cache: {rotation.cos.shape[-2]} of the {tokens} tokens were "
                    "read in the last pass in the block, and keys of the others cannot be turned back; record one pass "
                    "over the whole text without past_key_values, or ask for rotated=True"
                )


@contextmanager
def record_kv(
    model: PreTrainedModel,
    layers: Sequence[int] | None = None,
    rotated: bool = False,
    *,
    stop_early: bool = False,
) -> Iterator[KVRecorder]:
    """Record the KV of one forward pass of ``model`` made inside the block; its outputs stay bit-identical.

    Args:
        model: a causal language model of transformers, training or not, with gradients or without.
        layers: which to record of those that hold KV (:func:`kvgraft.models.geometry.kv_layers`), counted from 0;
            default all.
        rotated: keep keys as attention sees them (post-RoPE).
        stop_early: leave the block without an output once every wanted layer has been seen.

    Raises:
        ModelError: a layer that does not exist, or an architecture whose keys cannot be turned back.
    """
    geometry = kv_geometry(model.config)
    chosen = list(range(geometry.num_layers)) if layers is None else list(layers)
    outside = [layer for layer in chosen if not 0 <= layer < geometry.num_layers]
    if outside or not chosen:
        raise ModelError(f"{_name(model)} has layers 0..{geometry.num_layers - 1}; asked for {outside or 'none'}")
    turnings = _turnings.get(model, {}) if rotated else turnings_of(model, chosen)
    recorder = KVRecorder(model, chosen, rotated)
    with _recording(model, recorder, turnings, stop_early):
        yield recorder


def capture(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: Sequence[int] | None = None,
    rotated: bool = False,
    gradients: bool = False,
) -> KV:
    """KV of ``input_ids [batch, tokens]``: keys (pre-RoPE unless ``rotated``), values, positions and mask.

    No logits are computed, and without gradients nothing after the last wanted layer. Padding may stand on either
    side: positions count real tokens. ``attention_mask [batch, tokens]`` is 1 where a token is real; default all.

    Raises:
        ModelError: as :func:`record_kv`; or ids or a mask that are not as said here.
    """
    require_ids(model, input_ids, attention_mask)
    device = input_device(model)
    input_ids = input_ids.to(device)
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device)
    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    with (
        torch.set_grad_enabled(gradients),
        record_kv(model, layers, rotated, stop_early=not gradients) as recorder,
    ):
        decoder_of(model)(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
    kv = recorder.kv(attention_mask, position_ids)
    _require_positions(model, attention_mask, position_ids)
    return kv


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether ``model`` can be told where its tokens stand; Bart and its kin count every slot as a token."""
    return "position_ids" in inspect.signature(decoder_of(model).forward).parameters


def are_counted(position_ids: Tensor, attention_mask: Tensor) -> bool:
    """Whether real tokens stand where a model takes them to stand that counts every slot, padding included."""
    counted = torch.arange(position_ids.shape[1], device=position_ids.device)
    return not bool(((position_ids != counted) & attention_mask.bool()).any())


def _require_positions(model: PreTrainedModel, attention_mask: Tensor, position_ids: Tensor) -> None:
    """Refuse padding on the left where the model counts its positions itself, padding included."""
    if not takes_positions(model) and not are_counted(position_ids, attention_mask):
        raise ModelError(
            f"{_name(model)} takes no position_ids and counts padding on the left as text; pad on the right"
        )


@contextmanager
def _recording(
    model: PreTrainedModel, recorder: KVRecorder, turnings: Mapping[int, Turning], stop_early: bool
) -> Iterator[None]:
    def note(
        layer: int,
        attention: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        **options: Any,
    ) -> Any:
        recorder.note(layer, key, value)
        if stop_early and recorder.complete:
            raise _LastLayerReached
        return attention(module, query, key, value, *rest, **options)

    begin = decoder_of(model).register_forward_pre_hook(lambda *_: recorder.begin_pass())
    try:
        with intercepted_attention(model, note, turnings) as rotations:
            recorder.read_rotations(rotations)
            yield
    except _LastLayerReached as reached:
        # From Python 3.13 on, its frames would hold the model until garbage is collected.
        reached.__traceback__ = None
    finally:
        begin.remove()


def turnings_of(model: PreTrainedModel, layers: Sequence[int]) -> dict[int, Turning]:
    """How each of ``layers``, and of those asked for before, turns its keys; found once, by trying.

    With rotation: the same tokens at other positions have the same pre-RoPE keys. Norms behind the rotation and schemes
    yet to come do not pass. Without: a token's keys depend on nothing behind it (BERT looks there), and the model's own
    positions start at 0 as ours do (RoBERTa's do not).

    Raises:
        ModelError: layers whose keys would be captured wrongly.
    """
    found = _turnings.setdefault(model, {})
    unknown = sorted(set(layers) - set(found))
    if not unknown:
        return found
    vocabulary, device = model.get_input_embeddings().num_embeddings, input_device(model)
    input_ids = ((1 + torch.arange(_PROBE_TOKENS, device=device)) * 37 % vocabulary)[None]
    positions = torch.arange(_PROBE_TOKENS, device=device)[None]
    half = _PROBE_TOKENS // 2
    other_end = torch.cat([input_ids[:, :half], (input_ids[:, half:] + 1) % vocabulary], 1)
    with evaluation_mode(model):
        keys, recorder = _probe(model, unknown, input_ids, positions)
        rotates = any(recorder.rotation(layer) is not None for layer in unknown)
        second = (input_ids, positions + _PROBE_SHIFT) if rotates else (other_end, None)
        others, other_recorder = _probe(model, unknown, *second)
    turnings: dict[int, Turning | None] = {}
    still_tolerance = _PROBE_TOLERANCE if rotates else _OTHER_END_TOLERANCE
    for index, layer in enumerate(unknown):
        one, other = keys[:, index], others[:, index]
        handed, handed_other = recorder.rotation(layer), other_recorder.rotation(layer)
        if handed is not None and handed_other is not None:
            turnings[layer] = find_turning((one, handed), (other, handed_other), _PROBE_TOLERANCE)
        else:
            difference = (one - other)[..., :half, :].norm() / one[..., :half, :].norm()
            turnings[layer] = None if float(difference) >= still_tolerance else "not"
    wrong = [layer for layer, turning in turnings.items() if turning is None]
    if wrong and rotates:
        raise ModelError(
            f"{_name(model)} cannot be captured before rotation: in layers {wrong} the keys of one text at two "
            "places differ after their rotation is undone, so it rotates in a way that is not covered; "
            "ask for rotated=True"
        )
    if wrong:
        raise ModelError(
            f"{_name(model)} cannot be captured: in layers {wrong} its keys depend on the tokens behind them, or on "
            "positions that it does not count from 0; use a causal language model, such as Llama, Qwen, Mistral, "
            "Gemma, Phi or GPT-2 (one made of BERT needs is_decoder: true in its config)"
        )
    found.update({layer: turning for layer, turning in turnings.items() if turning is not None})
    return found


def forget_turnings(model: PreTrainedModel) -> None:
    """To be called where layers of ``model`` have changed places."""
    _turnings.pop(model, None)


@torch.no_grad()
def _probe(
    model: PreTrainedModel, layers: Sequence[int], input_ids: Tensor, position_ids: Tensor | None
) -> tuple[Tensor, KVRecorder]:
    """Keys after rotation ``[1, layers, heads, tokens, head_dim]``, and what else was recorded."""
    recorder = KVRecorder(model, layers, rotated=True)
    # To the end: the last layer might attend a second time.
    with _recording(model, recorder, turnings={}, stop_early=False):
        decoder_of(model)(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    return recorder.kv(torch.ones_like(input_ids), position_ids).keys.float(), recorder


def _name(model: nn.Module) -> str:
    return type(model).__name__
