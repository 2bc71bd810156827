"""Layers, key/value heads, head width and context of a model, from its config alone."""

from __future__ import annotations

from transformers import PretrainedConfig

from kvgraft.errors import ModelError
from kvgraft.kv import KVGeometry


def kv_geometry(config: PretrainedConfig) -> KVGeometry:
    """Layers, key/value heads and head width of a model, from its config alone.

    Raises:
        ModelError: the config does not say, or says another for each layer.
    """
    if not hasattr(config, "get_text_config"):
        raise ModelError(
            f"kv_geometry takes the configuration of a transformers model, model.config; got {type(config).__name__}"
        )
    text = config.get_text_config()
    heads = _same_in_all_layers(text, "num_attention_heads")
    kv_heads = _same_in_all_layers(text, "num_key_value_heads") or _falcon_kv_heads(text) or heads
    hidden, layers = _same_in_all_layers(text, "hidden_size"), _same_in_all_layers(text, "num_hidden_layers")
    head_dim = _same_in_all_layers(text, "head_dim") or (hidden // heads if hidden and heads else None)
    if not (kv_heads and head_dim and layers):
        raise ModelError(
            f"the config of {text.model_type} does not name num_hidden_layers, num_attention_heads and hidden_size, so "
            "it stores no keys and values that we know; use a transformer with an attention in every layer"
        )
    return KVGeometry(layers, kv_heads, head_dim)


def context_of(config: PretrainedConfig) -> int | None:
    """Most tokens that a model reads, where its config says."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context if isinstance(context, int) else None


def _same_in_all_layers(text: PretrainedConfig, name: str) -> int | None:
    """What ``text`` says of all its layers at once; None where it says nothing."""
    try:
        value: int | None = getattr(text, name, None)
    except RuntimeError as error:  # the error of transformers for a setting of single layers, which 5.1 does not have
        raise ModelError(
            f"{text.model_type} cannot be captured: its config gives each layer a {name} of its own; uneven KV is not "
            "covered. Use an architecture whose layers are alike, such as Llama, Qwen, Mistral, Gemma 3, Phi or GPT-2"
        ) from error
    return value


def _falcon_kv_heads(text: PretrainedConfig) -> int | None:
    """One for all heads where Falcon's own setting says so; its new architecture stores its groups expanded."""
    return 1 if text.model_type == "falcon" and text.multi_query and not text.new_decoder_architecture else None
