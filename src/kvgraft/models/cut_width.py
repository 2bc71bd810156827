"""Students cut from a larger model by the width of their MLPs: the channels that do most on some text stay."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgraft.errors import ModelError
from kvgraft.models.cut import layer_stack, require_same_from_config
from kvgraft.models.decoder import decoder_of
from kvgraft.models.geometry import depth_of


@torch.no_grad()
def channel_importance(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """How much each channel of each layer's MLP adds to the residual stream, on average over the tokens of ``texts``.

    The root mean square of what comes into ``down_proj`` times the norm of the weights that it meets there: Wanda's
    measure (Sun et al. 2023, arXiv 2306.11695), summed over a channel.

    Args:
        model: a causal language model with gated MLPs.
        texts: token ids.

    Returns:
        float32 ``[intermediate_size]`` for each layer.

    Raises:
        ModelError: the model has other MLPs.
    """
    mlps = _mlps(model)
    squares = [torch.zeros(mlp.down_proj.in_features, dtype=torch.float64) for mlp in mlps]

    def note(sums: Tensor, module: nn.Module, inputs: Any) -> None:
        sums += inputs[0].double().square().flatten(0, -2).sum(0).cpu()

    handles = [
        mlp.down_proj.register_forward_pre_hook(partial(note, sums)) for mlp, sums in zip(mlps, squares, strict=True)
    ]
    try:
        for text in texts:
            decoder_of(model)(input_ids=torch.tensor([text], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(len(text) for text in texts)
    return [
        (sums / tokens).sqrt().float() * mlp.down_proj.weight.float().norm(dim=0).cpu()
        for mlp, sums in zip(mlps, squares, strict=True)
    ]


def cut_intermediate(model: PreTrainedModel, channels: Sequence[Tensor]) -> PreTrainedModel:
    """``model`` with some channels of its MLPs, changed in place; layers, heads, KV and residual stream stay as wide.

    Args:
        model: a causal language model with gated MLPs.
        channels: for each layer which to keep, int64, rising, as many in every layer.

    Raises:
        ModelError: the model has other MLPs, or would be another model once saved.
    """
    text = model.config.get_text_config()
    text.origin_intermediate_size, text.intermediate_size = text.intermediate_size, len(channels[0])
    for mlp, kept in zip(_mlps(model), channels, strict=True):
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight = nn.Parameter(linear.weight.detach()[kept].clone())
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias.detach()[kept].clone())
            linear.out_features = len(kept)
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.detach()[:, kept].clone())
        mlp.down_proj.in_features = len(kept)
        mlp.intermediate_size = len(kept)
    require_same_from_config(model)
    return model


def require_channels(model: PreTrainedModel, count: int) -> None:
    """Raise ModelError where the MLPs of ``model`` cannot be cut to ``count`` channels."""
    width = _mlps(model)[0].down_proj.in_features
    if not 0 < count <= width:
        raise ModelError(f"cannot keep {count} of the {width} channels of each MLP; give 1..{width}")


def largest(importance: Sequence[Tensor], count: int) -> list[Tensor]:
    """The ``count`` channels of each layer that are most important, rising."""
    return [layer.topk(count).indices.sort().values for layer in importance]


def _mlps(model: PreTrainedModel) -> list[Any]:
    """The MLP of each layer: ``down_proj(activation(gate_proj(x)) * up_proj(x))``."""
    mlps = [getattr(layer, "mlp", None) for layer in layer_stack(model, depth_of(model.config))]
    names = ("gate_proj", "up_proj", "down_proj")
    gated = all(isinstance(getattr(mlp, name, None), nn.Linear) for mlp in mlps for name in names)
    if not gated or not isinstance(getattr(model.config.get_text_config(), "intermediate_size", None), int):
        raise ModelError(
            f"the MLPs of {type(model).__name__} cannot be cut: they are not one gate_proj, up_proj and down_proj for "
            "each layer, all as wide; use an architecture such as Llama, Qwen, Mistral or Gemma, or cut layers"
        )
    return mlps
