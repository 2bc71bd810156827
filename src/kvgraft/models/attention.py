"""What a model's attention makes of its KV: how much it reads each token, and what it gives with other KV in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgraft.errors import ModelError
from kvgraft.kv import KV
from kvgraft.models.capture import turnings_of
from kvgraft.models.decoder import decoder_of
from kvgraft.models.geometry import kv_geometry
from kvgraft.models.interception import intercepted_attention
from kvgraft.models.latent import meeting_vectors
from kvgraft.models.rope import Rotation, rotate, unrotate

# Places of a text whose keys tell how queries meet keys.
_KEY_PLACES = 16


@dataclass(frozen=True)
class Reading:
    """How one text is read, layer by layer.

    Attributes:
        received: ``[layers, tokens]``, the attention that all queries of all heads give to each token, on average.
        query_moments: ``[layers, num_kv_heads, head_dim, head_dim]``, the mean of ``q q^T`` over the queries that
            read a key, each turned as that key sees it: by its distance. The squared error of a score that an error
            ``e`` of a pre-RoPE key makes is on average ``e^T (q q^T) e``.
    """

    received: Tensor
    query_moments: Tensor


@torch.no_grad()
def attention_output_cosine(
    model: PreTrainedModel, input_ids: Tensor, candidates: Mapping[str, KV]
) -> dict[str, Tensor]:
    """How close each layer's attention output stays when other KV stands in place of the model's own.

    Each layer gets the model's own input, so that layers are judged one by one.

    Args:
        model: a causal language model.
        input_ids: ``[1, tokens]``, one text.
        candidates: KV of the model's own heads, pre-RoPE keys, in some of its layers. Where the mask is false the
            model keeps its own.

    Returns:
        for each candidate, the cosine between the output with it and the output with the model's own KV, heads
        joined, ``[layers of the candidate, tokens]``.
    """
    for name, kv in candidates.items():
        _require_own_heads(model, name, kv)
    found: dict[str, dict[int, Tensor]] = {name: {} for name in candidates}

    def compare(
        layer: int,
        attention: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        **options: Any,
    ) -> Any:
        own = attention(module, query, key, value, *rest, **options)
        for name, kv in candidates.items():
            if layer not in kv.layers:
                continue
            keys, values = _in_place(kv, layer, key, value, rotations.get(layer))
            other = attention(module, query, keys, values, *rest, **options)
            found[name][layer] = nn.functional.cosine_similarity(
                own[0][0].flatten(1).float(), other[0][0].flatten(1).float(), dim=-1
            )
        return own

    turnings = turnings_of(model, sorted({layer for kv in candidates.values() for layer in kv.layers}))
    with intercepted_attention(model, compare, turnings) as rotations:
        decoder_of(model)(input_ids=input_ids.to(model.device), use_cache=False)
    return {name: torch.stack([found[name][layer] for layer in kv.layers]) for name, kv in candidates.items()}


@torch.no_grad()
def read_attention(model: PreTrainedModel, input_ids: Tensor) -> Reading:
    """How ``model`` reads ``input_ids [1, tokens]``, over all its layers.

    Attention is taken as full and causal: a sliding window is not cut.
    """
    received: dict[int, Tensor] = {}
    moments: dict[int, Tensor] = {}

    def note(
        layer: int,
        attention: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        *rest: Any,
        **options: Any,
    ) -> Any:
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        meeting = meeting_vectors(module, query)
        received[layer] = _received(meeting[0].float(), key[0].float(), scale)
        moments[layer] = _query_moments(meeting, key.shape[1], rotations.get(layer))
        return attention(module, query, key, *rest, **options)

    layers = range(kv_geometry(model.config).num_layers)
    with intercepted_attention(model, note, turnings_of(model, layers)) as rotations:
        decoder_of(model)(input_ids=input_ids.to(model.device), use_cache=False)
    return Reading(
        torch.stack([received[layer] for layer in layers]).cpu(),
        torch.stack([moments[layer] for layer in layers]).cpu(),
    )


def _received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean attention to each token, ``[tokens]``, from ``query [heads, tokens, dim]`` and ``key [kv_heads, ...]``."""
    key = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
    scores = query @ key.transpose(1, 2) * scale
    tokens = scores.shape[-1]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1).sum(1).mean(0)


def _query_moments(query: Tensor, num_kv_heads: int, rotation: Rotation | None) -> Tensor:
    """Mean ``q q^T [num_kv_heads, head_dim, head_dim]`` of ``query [1, heads, tokens, head_dim]``, rotated.

    Keys at some places of the text stand for all: every query from there on reads them, turned back by their rotation.
    """
    tokens = query.shape[2]
    step = -(-tokens // _KEY_PLACES)
    readers = torch.arange(tokens, 0, -step, device=query.device) * (query.shape[1] // num_kv_heads)
    # The queries between two places, [num_kv_heads, places, queries, head_dim].
    padded = nn.functional.pad(query[0].float(), (0, 0, 0, -tokens % step))
    queries = padded.reshape(num_kv_heads, -1, len(readers), step, query.shape[3]).transpose(1, 2).flatten(2, 3)
    sums = (queries.transpose(2, 3) @ queries).flip(1).cumsum(1).flip(1)
    moments = sums / readers[:, None, None]
    if rotation is not None:
        cos, sin = (part[:, ::step].float() for part in (rotation.cos, rotation.sin))
        # Their mean is turned in place of them, along both of its sides.
        for _ in range(2):
            moments = unrotate(moments.permute(0, 3, 1, 2), cos, sin, rotation.neighbours).transpose(1, 2)
    return moments.mean(1)


def _in_place(kv: KV, layer: int, key: Tensor, value: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
    """Keys (rotated) and values of ``layer`` with those of ``kv`` where its mask is true."""
    index = kv.layers.index(layer)
    keys, values = (part[:, index].to(key.device, key.dtype) for part in (kv.keys, kv.values))
    if rotation is not None:
        keys = rotate(keys, *rotation)
    chosen = kv.mask.to(key.device)[:, None, :, None]
    return torch.where(chosen, keys, key), torch.where(chosen, values, value)


def _require_own_heads(model: PreTrainedModel, name: str, kv: KV) -> None:
    own, given = kv_geometry(model.config), kv.geometry
    if (given.num_kv_heads, given.head_dim) != (own.num_kv_heads, own.head_dim) or kv.rotated:
        raise ModelError(
            f"KV {name!r} has {given.num_kv_heads} heads of {given.head_dim}{', rotated' if kv.rotated else ''}; "
            f"{type(model).__name__} reads pre-RoPE keys of {own.num_kv_heads} heads of {own.head_dim}"
        )
