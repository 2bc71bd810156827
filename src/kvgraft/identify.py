"""A model that a recipe names: what it is, without its weights, and how to load them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvgraft.kv import KVGeometry
from kvgraft.models import loading
from kvgraft.models.geometry import context_of, kv_geometry
from kvgraft.processes import process_state
from kvgraft.recipe import TeacherRecipe


@dataclass(frozen=True)
class IdentifiedModel:
    """A model whose KV is to be stored, known well enough to find its store; its weights are not loaded yet.

    ``load`` gives the model itself, the same until ``let_go``, after which it is held by none but those who have it.
    """

    recipe: TeacherRecipe
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    tokenizer_fingerprint: str
    load: Callable[[], PreTrainedModel]
    let_go: Callable[[], None]

    @property
    def geometry(self) -> KVGeometry:
        """Layers and heads of the model."""
        return kv_geometry(self.config)

    @property
    def context(self) -> int | None:
        """Most tokens that the model reads, where its config says."""
        return context_of(self.config)


def identify(model: TeacherRecipe, tokenizer: PreTrainedTokenizerBase | None = None) -> IdentifiedModel:
    """Config, tokenizer and fingerprints of ``model``, which reads text by ``tokenizer`` (default: its own)."""

    @lru_cache(1)
    def load() -> PreTrainedModel:
        device = model.device
        if device == "auto" and process_state().num_processes > 1:
            device = str(process_state().device)
        return loading.load_model(
            model.model,
            model.revision,
            dtype=model.dtype,
            device=device,
            quantization=model.quantization,
            device_map=model.device_map,
            tensor_parallel=model.tensor_parallel,
        )

    if tokenizer is None:
        tokenizer = loading.load_tokenizer(model.model, model.revision)
    # Weights in few bits give other KV.
    numbers = model.dtype if model.quantization is None else f"{model.dtype}, {model.quantization}"
    return IdentifiedModel(
        recipe=model,
        config=loading.load_config(model.model, model.revision),
        tokenizer=tokenizer,
        fingerprint=f"{loading.fingerprint(model.model, model.revision)} in {numbers}",
        tokenizer_fingerprint=loading.tokenizer_fingerprint(tokenizer),
        load=load,
        let_go=load.cache_clear,
    )
