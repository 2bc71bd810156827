"""Token ids and masks as a model takes them."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from kvgraft.errors import ModelError


def require_ids(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Refuse what ``model`` cannot read: ``input_ids [batch, tokens]`` of its vocabulary, a mask of the same shape."""
    if not hasattr(model, "get_input_embeddings"):
        raise ModelError(f"capture takes a model of transformers, as load_model gives it; got {type(model).__name__}")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.numel() == 0:
        given = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ModelError(f"input_ids must be a tensor [batch, tokens] with at least one token; got {given}")
    vocabulary = model.get_input_embeddings().num_embeddings
    if input_ids.is_floating_point() or not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocabulary:
        raise ModelError(
            f"input_ids of {type(model).__name__} must be whole numbers in 0..{vocabulary - 1}; got {input_ids.dtype} "
            f"in {input_ids.min()}..{input_ids.max()}; use the model's own tokenizer"
        )
    if attention_mask is not None and getattr(attention_mask, "shape", None) != input_ids.shape:
        given = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ModelError(f"attention_mask must be {list(input_ids.shape)}, as input_ids; got {given}")
