"""Rotary positions put on and taken off keys, with the cosines and sines that the model itself used."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

# How a layer turns its keys with the cosines and sines that it is handed:
# - halves: channel ``i`` with channel ``i + rotary_dim / 2`` (Llama);
# - halves_back: the same, the other way round (NanoChat);
# - one_half: the first, where those of one half are handed over (GPT-OSS);
# - neighbours: channel ``2 i`` with channel ``2 i + 1`` (Cohere, Llama 4);
# - neighbours_of_halves: the same, where cosines and sines are laid out for halves (GLM, Helium, Ernie 4.5);
# - not: it does not, though it is handed some (SmolLM3's every fourth layer).
Turning = Literal["halves", "halves_back", "one_half", "neighbours", "neighbours_of_halves", "not"]
TURNINGS: tuple[Turning, ...] = get_args(Turning)


class Rotation(NamedTuple):
    """Cosines and sines ``[batch, tokens, rotary_dim]``, one for each channel that turns.

    ``neighbours`` says that channels ``2 i`` and ``2 i + 1`` turn together, and not ``i`` and ``i + rotary_dim / 2``.
    """

    cos: Tensor
    sin: Tensor
    neighbours: bool = False


def cosines_and_sines(handed: Any) -> tuple[Tensor, Tensor] | None:
    """Both of what a rotary module makes and layers are handed; None where that is something else.

    Complex numbers ``[batch, tokens, head_dim / 2]`` (Llama 4) are told as one cosine and sine for each channel.
    """
    if isinstance(handed, Tensor) and handed.is_complex():
        return handed.real.repeat_interleave(2, -1), handed.imag.repeat_interleave(2, -1)
    if isinstance(handed, tuple | list) and len(handed) == 2:
        return handed[0], handed[1]
    return None


def read_rotation(turning: Turning, cos: Tensor, sin: Tensor) -> Rotation | None:
    """The cosines and sines that a layer is handed, as :func:`rotate` takes them; None where it does not turn."""
    if turning == "not":
        return None
    if turning == "halves_back":
        return Rotation(cos, -sin)
    if turning == "one_half":
        return Rotation(torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    if turning == "neighbours_of_halves":
        cos, sin = (part[..., : part.shape[-1] // 2].repeat_interleave(2, -1) for part in (cos, sin))
        return Rotation(cos, sin, neighbours=True)
    return Rotation(cos, sin, neighbours=turning == "neighbours")


def find_turning(one: tuple[Tensor, Rotation], other: tuple[Tensor, Rotation], tolerance: float) -> Turning | None:
    """How keys turn, told from those of one text at two places: undone, they are the same; None where they never are.

    Args:
        one: keys ``[batch, heads, tokens, head_dim]`` after rotation, and what their layer was handed.
        other: the same at other positions.
        tolerance: norm of the difference over that of the keys which still counts as the same.
    """
    errors: dict[Turning, float] = {}
    for turning in TURNINGS:
        undone = []
        for keys, handed in (one, other):
            rotation = read_rotation(turning, handed.cos, handed.sin)
            if rotation is None or rotation.cos.shape[-1] in range(2, keys.shape[-1] + 1, 2):
                undone.append(keys if rotation is None else unrotate(keys, *rotation))
        if len(undone) == 2:
            errors[turning] = float((undone[0] - undone[1]).norm() / undone[0].norm())
    # The nearest and not the first: where few channels turn, a wrong way may be near enough too. NaN is no sign of
    # turning otherwise; whoever takes the keys says where it is.
    nearest = min(errors, key=lambda turning: errors[turning])
    return None if errors[nearest] >= tolerance else nearest


def rotate(keys: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> Tensor:
    """Post-RoPE keys from pre-RoPE ``keys [batch, heads, tokens, head_dim]``.

    The others are those of :class:`Rotation`; where ``rotary_dim`` is less than ``head_dim`` only the first channels
    turn (partial rotation).
    """
    cos, sin = cos[:, None], sin[:, None]
    turning, still = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    return torch.cat([turning * cos + _quarter_turn(turning, neighbours) * sin, still], -1)


def unrotate(keys: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> Tensor:
    """The inverse of :func:`rotate`, exact up to rounding, also where ``cos`` and ``sin`` carry a scale (YaRN)."""
    cos, sin = cos[:, None].to(keys.device), sin[:, None].to(keys.device)
    scale = cos.square() + sin.square()
    turning, still = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    turned = (turning * cos - _quarter_turn(turning, neighbours) * sin) / scale
    return torch.cat([turned.to(keys.dtype), still], -1)


def _quarter_turn(tensor: Tensor, neighbours: bool) -> Tensor:
    if neighbours:
        return torch.stack([-tensor[..., 1::2], tensor[..., ::2]], -1).flatten(-2)
    first, second = tensor.chunk(2, -1)
    return torch.cat([-second, first], -1)
