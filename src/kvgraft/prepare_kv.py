"""A teacher's KV over the texts of a run: from its store, or from the teacher itself in every step."""

from __future__ import annotations

from typing import Any

from kvgraft.data.chat import template_fingerprint
from kvgraft.data.datasets import Example
from kvgraft.data.spans import EncodedText
from kvgraft.identify import IdentifiedModel
from kvgraft.prepare_log_probs import log_probs_to_fill
from kvgraft.processes import process_state
from kvgraft.recipe import Recipe, StoreRecipe
from kvgraft.store.fill import FillReport, StoreToFill, encode_for_teacher, fill_store, fill_stores
from kvgraft.store.fill_kv import KVStoreToFill, kv_store_folder
from kvgraft.store.format import StoreIdentity, text_fingerprint
from kvgraft.store.likelihoods import TokenLikelihoods, fill_likelihoods
from kvgraft.store.online import OnlineKV
from kvgraft.store.reader import KVStore


def store_kv(
    model: IdentifiedModel, examples: list[Example], layers: tuple[int, ...], max_length: int, settings: StoreRecipe
) -> tuple[KVStore, FillReport]:
    """The store of ``model``'s KV over ``examples``, filled where it is not yet; several processes share the work."""
    encoded = encode_for_teacher(examples, model.tokenizer, max_length)
    store = _kv_to_fill(model, examples, encoded, layers, max_length, settings)
    return fill_store(store, model.recipe.name, model.load, encoded, token_budget=settings.token_budget)


def store_kv_and_log_probs(
    model: IdentifiedModel, examples: list[Example], layers: tuple[int, ...], max_length: int, recipe: Recipe
) -> tuple[KVStore, FillReport]:
    """As :func:`store_kv`; the same pass of ``model`` fills the logit store of ``recipe`` too."""
    encoded = encode_for_teacher(examples, model.tokenizer, max_length)
    store = _kv_to_fill(model, examples, encoded, layers, max_length, recipe.store)
    stores: list[StoreToFill[Any]] = [store, log_probs_to_fill(model, examples, encoded, max_length, recipe)]
    report, _ = fill_stores(stores, model.recipe.name, model.load, encoded, token_budget=recipe.store.token_budget)
    return store.open(), report


def online_kv(
    model: IdentifiedModel, examples: list[Example], layers: tuple[int, ...], max_length: int, recipe: Recipe
) -> tuple[OnlineKV, FillReport]:
    """``model`` itself in place of a store, and what it has cost so far: nothing."""
    encoded = encode_for_teacher(examples, model.tokenizer, max_length)
    by_key = {text.sample_key: text for text in encoded}
    kv = OnlineKV(
        model.recipe.name,
        _identity(model, examples, encoded, layers, max_length, "float32"),
        model.load,
        by_key,
        recipe.kv_loss.calibration_texts,
        recipe.store.token_budget,
    )
    return kv, FillReport(0, 0.0, sum(bool(text.truncated_bytes) for text in by_key.values()))


def _kv_to_fill(
    model: IdentifiedModel,
    examples: list[Example],
    encoded: list[EncodedText],
    layers: tuple[int, ...],
    max_length: int,
    settings: StoreRecipe,
) -> KVStoreToFill:
    identity = _identity(model, examples, encoded, layers, max_length, settings.dtype)
    folder = kv_store_folder(settings.path, model.recipe.name, identity)
    return KVStoreToFill(folder, identity, settings.shard_megabytes * 1_000_000, settings.verify)


def _identity(
    model: IdentifiedModel,
    examples: list[Example],
    encoded: list[EncodedText],
    layers: tuple[int, ...],
    max_length: int,
    dtype: str,
) -> StoreIdentity:
    return StoreIdentity(
        model=model.fingerprint,
        tokenizer=model.tokenizer_fingerprint,
        text=text_fingerprint(text.sample_key for text in encoded),
        layers=layers,
        num_kv_heads=model.geometry.num_kv_heads,
        head_dim=model.geometry.head_dim,
        dtype=dtype,
        max_length=max_length,
        template=template_fingerprint(examples, model.tokenizer),
    )


def store_likelihoods(
    model: IdentifiedModel, examples: list[Example], store: KVStore, settings: StoreRecipe
) -> TokenLikelihoods:
    """How likely ``model`` finds the tokens of ``store``, filled where it is not yet known."""
    encoded = encode_for_teacher(examples, model.tokenizer, store.identity.max_length)
    with process_state().main_process_first():
        return fill_likelihoods(
            store.folder, model.recipe.name, model.load, encoded, token_budget=settings.token_budget
        )
