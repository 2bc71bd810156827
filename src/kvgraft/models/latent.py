"""Attention that keeps one vector for a token, of which every head makes its keys and values when it reads.

In multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) a token leaves a latent and a rotated key,
both shared by all heads. Those two are its KV here: one head of both, the rotated key first, which stands for the key
and for the value. The heads' own keys and values follow from it and would take 71 times the numbers in DeepSeek-V3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

Attention = Callable[..., Any]


class LatentAttention(Protocol):
    """What is asked of a layer: its map from latents to keys and values of all heads, and their widths."""

    kv_b_proj: nn.Module
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


def shared_width(text: PretrainedConfig) -> int | None:
    """Numbers that one token leaves in a layer of a model with latent attention; None for other models."""
    latent, turning = (getattr(text, name, None) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    return None if latent is None or turning is None else latent + turning


def keeps_latents(module: nn.Module) -> TypeGuard[LatentAttention]:
    """Whether an attention layer makes its heads' keys and values of latents."""
    return hasattr(module, "kv_b_proj") and hasattr(module, "qk_rope_head_dim")


@contextmanager
def noting_latents(attentions: Iterable[nn.Module]) -> Iterator[dict[object, Tensor]]:
    """The latents ``[batch, 1, tokens, kv_lora_rank]`` that each layer of ``attentions`` read last, as layers run."""
    latents: dict[object, Tensor] = {}

    def note(attention: object, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read = inputs[0]
        # Transformers whose caches hold latents give them a dimension for their one head.
        latents[attention] = read if read.dim() == 4 else read[:, None]

    handles = [
        attention.kv_b_proj.register_forward_pre_hook(partial(note, attention))
        for attention in attentions
        if keeps_latents(attention)
    ]
    try:
        yield latents
    finally:
        for handle in handles:
            handle.remove()


def shared_vectors(module: LatentAttention, latents: Tensor, keys: Tensor) -> Tensor:
    """What tokens leave in a layer, ``[batch, 1, tokens, qk_rope_head_dim + kv_lora_rank]``, rotated.

    Args:
        module: the layer.
        latents: ``[batch, 1, tokens, kv_lora_rank]``.
        keys: of its heads; their last ``qk_rope_head_dim`` channels are the rotated key that they share.
    """
    turning = keys[:, :1, :, keys.shape[-1] - module.qk_rope_head_dim :]
    return torch.cat([turning, latents.to(keys.device)], -1)


def heads_of(module: LatentAttention, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values that each head makes of rotated :func:`shared_vectors`: ``[batch, heads, tokens, width]``."""
    turning, latents = _parts(module, vectors)
    widths = [module.qk_nope_head_dim, module.v_head_dim]
    both: Tensor = module.kv_b_proj(latents[:, 0])
    still, values = torch.split(both.reshape(*both.shape[:-1], -1, sum(widths)).transpose(1, 2), widths, -1)
    return torch.cat([still, turning.expand(-1, still.shape[1], -1, -1)], -1), values


def reading_vectors(attention: Attention, vectors: Tensor, keys: Tensor, values: Tensor) -> Attention:
    """``attention`` for whoever has ``vectors`` in place of the heads' ``keys`` and ``values``, and may change them."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        own_keys = keys if key is vectors else heads_of(module, key)[0]
        own_values = values if value is vectors else heads_of(module, value)[1]
        return attention(module, query, own_keys, own_values, *rest, **options)

    return attend


def meeting_vectors(module: nn.Module, query: Tensor) -> Tensor:
    """Queries ``[batch, heads, tokens, width]`` whose products with :func:`shared_vectors` are those with keys.

    They are ``query`` itself in a layer that keeps no latents.
    """
    if not keeps_latents(module):
        return query
    unit = torch.eye(module.kv_lora_rank, device=query.device, dtype=query.dtype)
    keys, _ = heads_of(module, nn.functional.pad(unit, (module.qk_rope_head_dim, 0))[None, None])
    still, turning = torch.split(query, [module.qk_nope_head_dim, module.qk_rope_head_dim], -1)
    return torch.cat([turning, still @ keys[..., : module.qk_nope_head_dim].transpose(2, 3)], -1)


def cache_entry(module: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What transformers' cache holds of a layer's rotated ``keys`` and of its ``values``.

    Of :func:`shared_vectors`, given as keys, it holds latents and rotated keys, in older releases the heads' KV.
    """
    if not keeps_latents(module):
        return keys, values
    if not hasattr(module, "expand_kv"):
        return heads_of(module, keys)
    turning, latents = _parts(module, keys)
    return latents, turning


def _parts(module: LatentAttention, vectors: Tensor) -> tuple[Tensor, Tensor]:
    turning = module.qk_rope_head_dim
    return vectors[..., :turning], vectors[..., turning:]
