"""The layers of a causal language model without its head."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The layers without the language-model head."""
    decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    inner = getattr(model, "model", None)
    # transformers gives Llama 4 itself for its decoder, and for ModernBERT the head, whose name is ``decoder``.
    if (decoder is model or not isinstance(decoder, PreTrainedModel)) and isinstance(inner, PreTrainedModel):
        return inner
    return decoder
