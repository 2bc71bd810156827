"""A teacher's KV over the texts of a run: from its store, or from the teacher itself in every step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from kvgraft.data.chat import template_fingerprint
from kvgraft.data.datasets import Example
from kvgraft.data.spans import sample_key
from kvgraft.errors import StoreError
from kvgraft.identify import IdentifiedModel
from kvgraft.prepare_log_probs import log_probs_to_fill
from kvgraft.recipe import Recipe, StoreRecipe
from kvgraft.store.fill import FillReport, StoreToFill, encode_for_teacher, fill_store, fill_stores
from kvgraft.store.fill_kv import KVStoreToFill, kv_store_folder
from kvgraft.store.format import MANIFEST_NAME, StoreIdentity, read_manifest, text_fingerprint
from kvgraft.store.likelihoods import LikelihoodsToFill, TokenLikelihoods
from kvgraft.store.online import OnlineKV
from kvgraft.store.reader import KVStore


def store_kv(
    model: IdentifiedModel, examples: list[Example], layers: tuple[int, ...], max_length: int, settings: StoreRecipe
) -> tuple[KVStore, FillReport]:
    """The store of ``model``'s KV over ``examples``, filled where it is not yet; several processes share the work."""
    encoded = encode_for_teacher(examples, model.tokenizer, max_length)
    store = _kv_to_fill(model, examples, layers, max_length, settings)
    return fill_store(store, model.recipe.name, model.load, encoded, token_budget=settings.token_budget)


def store_for_training(
    model: IdentifiedModel,
    examples: list[Example],
    layers: tuple[int, ...],
    max_length: int,
    recipe: Recipe,
    *,
    with_likelihoods: bool,
) -> tuple[KVStore, FillReport, TokenLikelihoods | None]:
    """As :func:`store_kv`; the same pass of ``model`` gives all else that ``recipe`` keeps of it.

    That is the logit store of its logit arms, and ``with_likelihoods`` how likely the model finds each token.
    """
    encoded = encode_for_teacher(examples, model.tokenizer, max_length)
    store = _kv_to_fill(model, examples, layers, max_length, recipe.store)
    likelihoods = LikelihoodsToFill(store.folder, tuple(text.sample_key for text in encoded))
    stores: list[StoreToFill[Any]] = [store]
    if recipe.stores_log_probs:
        stores.append(log_probs_to_fill(model, examples, encoded, max_length, recipe))
    if with_likelihoods:
        stores.append(likelihoods)
    report, *_ = fill_stores(stores, model.recipe.name, model.load, encoded, token_budget=recipe.store.token_budget)
    return store.open(), report, likelihoods.open() if with_likelihoods else None


def online_kv(
    model: IdentifiedModel, examples: list[Example], layers: tuple[int, ...], max_length: int, recipe: Recipe
) -> tuple[OnlineKV, FillReport]:
    """``model`` itself in place of a store, and what it has cost so far: nothing."""
    encoded = encode_for_teacher(examples, model.tokenizer, max_length)
    by_key = {text.sample_key: text for text in encoded}
    kv = OnlineKV(
        model.recipe.name,
        _identity(model, examples, layers, max_length, "float32"),
        model.load,
        by_key,
        recipe.kv_loss.calibration_texts,
        recipe.store.token_budget,
    )
    return kv, FillReport(0, 0.0, sum(bool(text.truncated_bytes) for text in by_key.values()))


def not_stored(
    model: IdentifiedModel,
    examples: Sequence[Example],
    layers: tuple[int, ...] | None,
    max_length: int,
    settings: StoreRecipe,
    *,
    with_likelihoods: bool = False,
) -> list[Example]:
    """Those of ``examples`` whose KV the store of ``model`` over them lacks, or their likelihoods if asked for.

    ``layers`` None stands for any.
    """
    stored: set[str] = set()
    # Once for all stores, since it hashes every text; where any layers will do, those of each store take their place.
    identity = _identity(model, examples, layers or (0,), max_length, settings.dtype)
    for path in settings.path.glob(f"*/{MANIFEST_NAME}"):
        # What is damaged, or a store of another kind, holds none.
        with suppress(StoreError):
            folder, manifest = path.parent, read_manifest(path.parent)
            assert manifest is not None
            found = manifest.identity
            wanted = identity if layers else replace(identity, layers=found.layers)
            if not found.difference(wanted) and folder == kv_store_folder(settings.path, model.recipe.name, wanted):
                likely = TokenLikelihoods.open(folder).numbers if with_likelihoods else manifest.samples
                stored |= manifest.samples.keys() & likely.keys()
    return [example for example in examples if sample_key(example.text) not in stored]


def _kv_to_fill(
    model: IdentifiedModel,
    examples: list[Example],
    layers: tuple[int, ...],
    max_length: int,
    settings: StoreRecipe,
) -> KVStoreToFill:
    identity = _identity(model, examples, layers, max_length, settings.dtype)
    folder = kv_store_folder(settings.path, model.recipe.name, identity)
    return KVStoreToFill(folder, identity, settings.shard_megabytes * 1_000_000, settings.verify)


def _identity(
    model: IdentifiedModel, examples: Sequence[Example], layers: tuple[int, ...], max_length: int, dtype: str
) -> StoreIdentity:
    return StoreIdentity(
        model=model.fingerprint,
        tokenizer=model.tokenizer_fingerprint,
        text=text_fingerprint(sample_key(example.text) for example in examples),
        layers=layers,
        num_kv_heads=model.geometry.num_kv_heads,
        head_dim=model.geometry.head_dim,
        dtype=dtype,
        max_length=max_length,
        template=template_fingerprint(examples, model.tokenizer),
    )
