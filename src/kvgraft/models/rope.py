"""Rotary positions put on and taken off keys, with the cosines and sines that the model itself used."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Post-RoPE keys from pre-RoPE ``keys [batch, heads, tokens, head_dim]``.

    ``cos`` and ``sin`` are ``[batch, tokens, rotary_dim]`` as transformers hands them to attention; where
    ``rotary_dim`` is less than ``head_dim`` only the first channels turn (partial rotation).
    """
    cos, sin = cos[:, None], sin[:, None]
    turning, still = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    return torch.cat([turning * cos + _rotate_half(turning) * sin, still], -1)


def unrotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of :func:`rotate`, exact up to rounding, also where ``cos`` and ``sin`` carry a scale (YaRN)."""
    cos, sin = cos[:, None].to(keys.device), sin[:, None].to(keys.device)
    scale = cos.square() + sin.square()
    turning, still = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    turned = (turning * cos - _rotate_half(turning) * sin) / scale
    return torch.cat([turned.to(keys.dtype), still], -1)


def _rotate_half(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2, -1)
    return torch.cat([-second, first], -1)
