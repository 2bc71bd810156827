"""The calls in which a model's layers hand queries, keys and values to attention, with somebody standing between.

transformers looks the attention function up by name for each call and passes it the layer's module, query, key (after
its rotation) and value. Inside the block that look-up returns the same function behind another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvgraft.errors import ModelError
from kvgraft.models.decoder import decoder_of
from kvgraft.models.geometry import kv_layers
from kvgraft.models.latent import keeps_latents, noting_latents, reading_vectors, shared_vectors
from kvgraft.models.rope import Rotation, Turning, cosines_and_sines, read_rotation

Around = Callable[..., Any]


def attention_layers(model: PreTrainedModel) -> dict[nn.Module, int]:
    """The attentions of ``model`` that hold KV, and which layer each is, counted among those."""
    number = {place: layer for layer, place in enumerate(kv_layers(model.config))}
    return {
        module: number[module.layer_idx]  # type: ignore[index]
        for module in decoder_of(model).modules()
        if getattr(module, "layer_idx", None) in number and type(module).__name__.endswith(("Attention", "MLA"))
    }


@contextmanager
def intercepted_attention(
    model: PreTrainedModel, around: Around, turnings: Mapping[int, Turning] | None = None
) -> Iterator[dict[int, Rotation | None]]:
    """Let ``around`` stand between every attention layer of ``model`` and the function that it looks up.

    Args:
        model: a causal language model of transformers. Another model that runs inside the block is left alone.
        around: called as ``around(layer, attention, module, query, key, value, *rest, **options)`` in place of
            ``attention(module, query, key, value, *rest, **options)``; returns what the layer gets. Key and value of
            a layer that keeps latents are one tensor, what :func:`kvgraft.models.latent.shared_vectors` gives.
        turnings: how layers turn their keys, as :func:`turnings_of` gives it; others are taken to turn halves.

    Yields:
        what turned the keys of each layer that received cosines and sines, None where it leaves them alone; filled as
        layers run.
    """
    attentions = attention_layers(model)
    rotations: dict[int, Rotation | None] = {}
    known = turnings or {}
    attended: set[int] = set()

    def note_rotation(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer, handed = attentions[module], cosines_and_sines(kwargs.get("position_embeddings"))
        attended.discard(layer)
        if handed is not None:
            rotations[layer] = read_rotation(known.get(layer, "halves"), *handed)

    look_up = ALL_ATTENTION_FUNCTIONS.get_interface

    def look_up_and_stand_between(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        attention = look_up(*args, **kwargs)

        def called(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
            if module not in attentions:
                return attention(module, query, key, value, *rest, **options)
            layer = attentions[module]
            if layer in attended:
                raise ModelError(
                    f"{type(model).__name__} cannot be captured: layer {layer} attends more than once in a pass, "
                    "each time with a part of its values (differential attention); use an architecture with one "
                    "attention a layer, such as Llama, Qwen, Mistral, Gemma, Phi or GPT-2"
                )
            attended.add(layer)
            if keeps_latents(module) and module in latents:
                vectors = shared_vectors(module, latents.pop(module), key)
                reading = reading_vectors(attention, vectors, key, value)
                return around(layer, reading, module, query, vectors, vectors, *rest, **options)
            return around(layer, attention, module, query, key, value, *rest, **options)

        return called

    handles = [module.register_forward_pre_hook(note_rotation, with_kwargs=True) for module in attentions]
    ALL_ATTENTION_FUNCTIONS.get_interface = look_up_and_stand_between
    try:
        with noting_latents(attentions) as latents:
            yield rotations
    finally:
        ALL_ATTENTION_FUNCTIONS.get_interface = look_up
        for handle in handles:
            handle.remove()
