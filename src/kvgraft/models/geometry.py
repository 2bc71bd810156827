"""Layers, key/value heads, head width and context of a model, from its config alone."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from transformers import PretrainedConfig

from kvgraft.align.layers import even_depths
from kvgraft.errors import ModelError
from kvgraft.kv import KVGeometry
from kvgraft.models.latent import shared_width

# Layers that keep no key and value for each token, as `layer_types` of configs name them, in older transformers too.
_WITHOUT_KV = {"linear_attention", "conv", "mamba", "mamba2", "recurrent", "mlp", "moe"}


def kv_geometry(config: PretrainedConfig) -> KVGeometry:
    """Layers that hold KV, key/value heads and head width of a model, from its config alone.

    Raises:
        ModelError: the config does not say, or no layer holds KV.
    """
    layers, (kv_heads, head_dim) = _layers_alike(config)
    return KVGeometry(len(layers), kv_heads, head_dim)


def kv_layers(config: PretrainedConfig) -> tuple[int, ...]:
    """The places in a model of its layers that hold KV; everywhere else layers are counted among these alone.

    They are all of them, but for layers with a recurrence or a convolution in place of attention (Qwen3.5, LFM2,
    Granite 4), those that read the KV of a layer before them (Gemma 3n), and those whose heads are not as most are (in
    Gemma 4 those without a window).

    Raises:
        ModelError: as :func:`kv_geometry`.
    """
    layers, _ = _layers_alike(config)
    return layers


def relative_depths(config: PretrainedConfig) -> list[Fraction]:
    """Where each layer that holds KV stands among all layers of its model: 0 is the first of them and 1 the last.

    Raises:
        ModelError: as :func:`kv_geometry`.
    """
    depths = even_depths(depth_of(config))
    return [depths[place] for place in kv_layers(config)]


def depth_of(config: PretrainedConfig) -> int:
    """All layers of a model, those without KV too.

    Raises:
        ModelError: the config does not say.
    """
    if not hasattr(config, "get_text_config"):
        raise ModelError(
            f"kv_geometry takes the configuration of a transformers model, model.config; got {type(config).__name__}"
        )
    text = config.get_text_config()
    depth: int | None = getattr(text, "num_hidden_layers", None)
    if not depth:
        raise _unknown(text)
    return depth


def context_of(config: PretrainedConfig) -> int | None:
    """Most tokens that a model reads, where its config says."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context if isinstance(context, int) else None


def _layers_alike(config: PretrainedConfig) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The layers that hold KV of their own in the shape that most do, and its heads and their width."""
    depth, text = depth_of(config), config.get_text_config()
    # transformers 5.1 has no settings of single layers, and tells by a number which layers share.
    uneven = getattr(text, "is_heterogeneous", False)
    shapes = [_kv_shape(own) for own in text.per_layer_config] if uneven else [_kv_shape(text)] * depth
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or [""] * depth
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    sharing = getattr(text, "kv_sharing_modes", None) or [None] * (depth - shared) + ["reuse"] * shared
    holding = [layer for layer in range(depth) if kinds[layer] not in _WITHOUT_KV and sharing[layer] != "reuse"]
    if not holding:
        raise _unknown(text)
    commonest, _ = Counter(shapes[layer] for layer in holding).most_common(1)[0]
    return tuple(layer for layer in holding if shapes[layer] == commonest), commonest


def _kv_shape(text: PretrainedConfig) -> tuple[int, int]:
    shared = shared_width(text)
    if shared is not None:
        return 1, shared
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or _falcon_kv_heads(text) or heads
    head_dim = getattr(text, "head_dim", None) or (hidden // heads if hidden and heads else None)
    if not (kv_heads and head_dim):
        raise _unknown(text)
    return kv_heads, head_dim


def _unknown(text: PretrainedConfig) -> ModelError:
    return ModelError(
        f"the config of {text.model_type} names no layer with num_attention_heads and hidden_size, so that it stores "
        "no keys and values that we know; use a transformer with attention"
    )


def _falcon_kv_heads(text: PretrainedConfig) -> int | None:
    """One for all heads where Falcon's own setting says so; its new architecture stores its groups expanded."""
    return 1 if text.model_type == "falcon" and text.multi_query and not text.new_decoder_architecture else None
