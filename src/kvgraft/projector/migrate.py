"""From the old linear-only projector to the Elastic Bottleneck, without losing what it had learned."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvgraft.errors import ProjectorError
from kvgraft.kv import all_finite
from kvgraft.projector.adapters import Activation
from kvgraft.projector.projector import KVDimensionProjector

# Keys first. Weight ``[student width, teacher width]``, bias ``[student width]`` or None.
LinearMap = tuple[Tensor, Tensor | None]
LinearMaps = dict[str, dict[str, LinearMap]]

_NAME = re.compile(r"^(?:.*?\.)??(?P<kind>key|value|k|v)_adapters\.(?P<teacher>.+)\.(?P<part>weight|bias)$")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_KINDS = {"k": "key", "key": "key", "v": "value", "value": "value"}
_NO_WEIGHT = torch.empty(0)


def migrate_linear_checkpoint(
    checkpoint: str | Path | Mapping[str, Tensor] | LinearMaps,
    teacher_configs: Mapping[str, Mapping[str, int]],
    *,
    mlp_ratio: float | Literal["auto"] = 1.0,
    dropout: float = 0.1,
    per_layer: bool = False,
    layer_norm: bool = True,
    activation: Activation = "silu",
) -> KVDimensionProjector:
    """A projector with ``skip=True`` that at step 0 gives exactly what the old linear maps gave.

    Args:
        checkpoint: one of
            a path to a ``.safetensors`` file, or to a state dict that ``torch.save`` wrote (``.pt``, ``.pth``,
            ``.bin``; read with ``weights_only=True``, which runs no code);
            a state dict ``{"key_adapters.<teacher>.weight": tensor, "value_adapters.<teacher>.bias": ...}`` (any
            prefix before it, and ``k_adapters`` or ``v_adapters`` for short);
            ``{teacher: {"key": (weight, bias), "value": (weight, bias)}}``.
            Weights are ``[student width, teacher width]`` as in ``nn.Linear``; a bias may be missing or None.
        teacher_configs: as for :class:`KVDimensionProjector`, for exactly the teachers of the checkpoint. A name
            whose characters were replaced by ``_`` in the checkpoint (modules cannot hold dots) is found.
        mlp_ratio, dropout, per_layer, layer_norm, activation: of the new bottleneck. With ``per_layer`` every layer
            starts from the teacher's one map.

    Raises:
        ProjectorError: a file that is damaged or holds more than tensors, missing or extra teachers, or widths
            that do not fit.
    """
    maps = _match_teachers(read_linear_maps(checkpoint), list(teacher_configs))
    student_widths = {weight.shape[0] for teacher in maps.values() for weight, _ in teacher.values()}
    if len(student_widths) != 1:
        raise ProjectorError(f"the maps of the old checkpoint lead to several widths: {sorted(student_widths)}")
    projector = KVDimensionProjector(
        teacher_configs,
        student_widths.pop(),
        mlp_ratio,
        dropout,
        per_layer=per_layer,
        layer_norm=layer_norm,
        activation=activation,
        skip=True,
    )
    for name, linear_maps in maps.items():
        for adapter, kind in zip(projector.adapters(name), ("key", "value"), strict=True):
            weight, bias = linear_maps[kind]
            if weight.shape[1] != adapter.in_dim:
                raise ProjectorError(
                    f"the old {kind} map of teacher {name!r} takes width {weight.shape[1]}, its teacher_configs says "
                    f"{adapter.in_dim}; set d_model (or kv_dim) to {weight.shape[1]}"
                )
            bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
            layers = adapter.num_layers
            adapter.load_linear(weight.expand(layers, *weight.shape), bias.expand(layers, *bias.shape))
    return projector


def read_linear_maps(checkpoint: str | Path | Mapping[str, Tensor] | LinearMaps) -> LinearMaps:
    """The maps of an old checkpoint as ``{teacher: {"key": (weight, bias), "value": (weight, bias)}}``.

    Accepts what :func:`migrate_linear_checkpoint` accepts.
    """
    if isinstance(checkpoint, str | Path):
        checkpoint = _read_file(Path(checkpoint))
    maps: LinearMaps = {}
    for name, entry in checkpoint.items():
        if isinstance(entry, Mapping):
            maps[name] = dict(entry)
        else:
            _add_tensor(maps, name, entry)
    for teacher, kinds in maps.items():
        _require_complete(teacher, kinds)
    if not maps:
        raise ProjectorError("the old checkpoint is empty: expected key_adapters.<teacher>.weight and its like")
    return maps


def _add_tensor(maps: LinearMaps, name: str, tensor: Tensor) -> None:
    match = _NAME.match(name)
    if match is None:
        raise ProjectorError(
            f"{name!r} is no weight of an old linear projector; expected names such as key_adapters.<teacher>.weight, "
            "value_adapters.<teacher>.bias. Leave other entries out."
        )
    kinds = maps.setdefault(match["teacher"], {})
    kind, part = _KINDS[match["kind"]], match["part"]
    weight, bias = kinds.get(kind, (_NO_WEIGHT, None))
    # Two prefixes (the weights and their moving average, say) are two projectors: which is wanted is not ours to guess.
    if (part == "weight" and weight is not _NO_WEIGHT) or (part == "bias" and bias is not None):
        raise ProjectorError(
            f"the old checkpoint has more than one {kind} {part} for teacher {match['teacher']!r}: {name!r} and one of "
            "another prefix or spelling. Leave in those of one projector."
        )
    kinds[kind] = (tensor, bias) if part == "weight" else (weight, tensor)


def _require_complete(teacher: str, kinds: Mapping[str, LinearMap]) -> None:
    for kind in ("key", "value"):
        weight, bias = kinds.get(kind, (_NO_WEIGHT, None))
        if weight.dim() != 2:
            raise ProjectorError(
                f"the old checkpoint has no {kind} weight [student width, teacher width] for teacher {teacher!r}; "
                f"it has {sorted(kinds)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ProjectorError(
                f"the old {kind} bias of teacher {teacher!r} must be [{weight.shape[0]}] to go with its weight; "
                f"got {list(bias.shape)}"
            )
        for part, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and not (tensor.is_floating_point() and all_finite(tensor.float())):
                found = "NaN or infinity" if tensor.is_floating_point() else tensor.dtype
                raise ProjectorError(
                    f"the old {kind} {part} of teacher {teacher!r} must hold finite floating-point numbers; got "
                    f"{found}. Give a checkpoint from before it diverged or was quantised."
                )


def _match_teachers(maps: LinearMaps, names: list[str]) -> LinearMaps:
    source = {name: name for name in names if name in maps}
    left = [old for old in maps if old not in source]
    for name in names:
        found = [old for old in left if name not in source and plain_name(old) == plain_name(name)]
        if len(found) == 1:
            source[name] = found[0]
            left.remove(found[0])
    if len(source) != len(names) or left:
        raise ProjectorError(
            f"the old checkpoint holds teachers {sorted(maps)}, teacher_configs names {sorted(names)}; "
            "give teacher_configs for exactly those of the checkpoint"
        )
    return {name: maps[source[name]] for name in names}


def plain_name(name: str) -> str:
    """A teacher name as a module could hold it: everything but letters and digits is ``_``."""
    return re.sub(r"[^0-9A-Za-z]", "_", name)


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ProjectorError(f"no old checkpoint at {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ProjectorError(f"{path} is damaged or not a safetensors file: {error}") from error
    if path.suffix in _TORCH_SUFFIXES:
        return _read_state_dict(path)
    raise ProjectorError(
        f"{path} has the suffix {path.suffix!r}; an old checkpoint is a .safetensors file, or a state dict that "
        f"torch.save wrote: {', '.join(_TORCH_SUFFIXES)}"
    )


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    advice = "Save the tensors alone where you trust it: torch.save(projector.state_dict(), 'old.pt')."
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    # Only the name of its error: torch.load reads tensors with an unpickler of its own that runs nothing.
    except pickle.UnpicklingError as error:
        raise ProjectorError(
            f"{path} is no state dict of tensors alone, and reading anything else can run code, so kvgraft does not. "
            f"{advice} {_what_was_refused(error)}"
        ) from error
    except Exception as error:  # whatever a reader of foreign files makes of a damaged one
        raise ProjectorError(f"{path} is damaged or was not written by torch.save: {_first_line(error)}") from error
    if not isinstance(loaded, Mapping):
        raise ProjectorError(f"{path} holds a {type(loaded).__name__} and no state dict. {advice}")
    others = [str(name) for name, entry in loaded.items() if not (isinstance(name, str) and isinstance(entry, Tensor))]
    if others:
        raise ProjectorError(f"{path} holds entries that are no named tensors: {', '.join(others[:5])}. {advice}")
    return dict(loaded)


def _what_was_refused(error: Exception) -> str:
    """What ``torch.load`` did not take, without its advice, in terminal colors, on how to load it anyway."""
    return _first_line(error.__context__ or error).partition(". ")[0]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
