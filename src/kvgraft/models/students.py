"""New students: a model of a few config fields, with random weights that a seed decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvgraft.errors import ModelError


def student_config(fields: Mapping[str, Any], tokenizer_or_size: PreTrainedTokenizerBase | int) -> PretrainedConfig:
    """Config of a new student; its vocabulary and special tokens come from the tokenizer.

    Args:
        fields: ``model_type`` (default ``llama``) and fields of that type's transformers config.
        tokenizer_or_size: the student's tokenizer, or the size that it will have.

    Raises:
        ModelError: a model type or field that transformers does not have, or widths that do not fit together.
    """
    fields = dict(fields)
    model_type = fields.pop("model_type", "llama")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(f"student.new.model_type {model_type!r} is not one that transformers has; for example llama")
    config_class = CONFIG_MAPPING[model_type]
    aliases = getattr(config_class, "attribute_map", {})
    known = {*config_class().to_dict(), *aliases}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ModelError(
            f"student.new has fields {unknown} that a {model_type} config does not; known: {sorted(known)}"
        )
    heads, kv_heads = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise ModelError(
            f"student.new: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if isinstance(tokenizer_or_size, int):
        vocabulary = {"vocab_size": tokenizer_or_size, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    else:
        vocabulary = {
            "vocab_size": len(tokenizer_or_size),
            "bos_token_id": tokenizer_or_size.bos_token_id,
            "eos_token_id": tokenizer_or_size.eos_token_id,
            "pad_token_id": tokenizer_or_size.pad_token_id,
        }
    try:
        config = config_class(**{**vocabulary, **fields})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"student.new does not make a {model_type}: {error}") from error
    # Newer releases of transformers check this themselves.
    if "head_dim" not in fields and config.hidden_size % config.num_attention_heads:
        raise ModelError(
            f"student.new does not make a {model_type}: hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}; change one, or give head_dim"
        )
    return config


def new_student(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A new student in float32; the same ``seed`` gives the same weights, and no other random state is touched.

    Raises:
        ModelError: as :func:`student_config`.
    """
    config = student_config(fields, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (ValueError, RuntimeError, KeyError, AssertionError) as error:
            raise ModelError(f"student.new does not make a {config.model_type}: {error}") from error
