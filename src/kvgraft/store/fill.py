"""Fill a store: run the teacher once over every text that the store does not hold yet."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgraft.data.batching import length_buckets, pad_texts
from kvgraft.data.chat import encode_text
from kvgraft.data.datasets import Example
from kvgraft.data.spans import EncodedText
from kvgraft.errors import StoreError
from kvgraft.kv import KV
from kvgraft.models.capture import capture
from kvgraft.processes import from_main_process, process_state
from kvgraft.progress import progress_bar
from kvgraft.store.format import READABLE_VERSIONS, StoreIdentity, damage, read_manifest, read_quantizer
from kvgraft.store.reader import KVStore
from kvgraft.store.writer import KVStoreWriter, share_folder

logger = logging.getLogger(__name__)

# The first tokens of a text are attention sinks whose norms are unlike the rest; they stay out of the statistics.
_SINK_TOKENS = 2


@dataclass(frozen=True)
class FillReport:
    """What filling cost: tokens and seconds of the teacher's pass, both zero when everything was there.

    ``truncated_texts`` counts the texts of the whole store that were longer than the teacher may read.
    """

    tokens: int
    seconds: float
    truncated_texts: int

    @property
    def tokens_per_second(self) -> float | None:
        """Rate of the teacher's pass, capture and writing included; None when it was skipped."""
        return self.tokens / self.seconds if self.tokens else None


class Hashed(Protocol):
    """What a store holds, told by a hash."""

    def hash(self) -> str:
        """Digits that name the folder."""


def store_folder(path: Path, teacher: str, identity: Hashed) -> Path:
    """Folder below ``path`` for what ``identity`` says; runs that differ in any of it never share one."""
    return path / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', teacher)}-{identity.hash()}"


def kv_store_folder(path: Path, teacher: str, identity: StoreIdentity) -> Path:
    """As :func:`store_folder`, or where a complete store of the same numbers stands in an older format that is read."""
    for version in READABLE_VERSIONS:
        folder = store_folder(path, teacher, replace(identity, format_version=version))
        manifest = read_manifest(folder)
        if manifest is not None and manifest.complete:
            return folder
    return store_folder(path, teacher, identity)


def fill_store(
    folder: Path,
    identity: StoreIdentity,
    teacher: str,
    load_teacher: Callable[[], PreTrainedModel],
    texts: Sequence[EncodedText],
    *,
    shard_bytes: int,
    token_budget: int,
    verify: bool = True,
) -> tuple[KVStore, FillReport]:
    """The store of ``texts`` in ``folder``, made, continued, or opened as it is.

    Where several processes run, all of them call this, and each runs the teacher over its share of the batches. A
    quantised store is filled by the main process alone, since its scales come from the texts that it sees first.

    Args:
        folder: see :func:`kv_store_folder`.
        identity: what the store holds.
        teacher: name shown on the bar and in errors.
        load_teacher: called only if some text is missing.
        texts: as the teacher's tokenizer reads them.
        shard_bytes: KV bytes after which a shard is written to disk.
        token_budget: most tokens, padding included, in one pass of the teacher.
        verify: compare every shard's checksum when the finished store is opened.

    Raises:
        StoreError, ModelError, KVGraftError: the store cannot be written, the model cannot be captured, or it gives
            NaN or Inf (names teacher, text and layer). What was written stays and is not done again.
    """
    by_key = {text.sample_key: text for text in texts}
    truncated = sum(bool(text.truncated_bytes) for text in by_key.values())
    state = process_state()
    if from_main_process(state.is_main_process and _is_finished(folder, identity, verify)):
        logger.info("KV of %s over these %d texts is in %s; the teacher is not run", teacher, len(by_key), folder)
        return KVStore.open(folder, identity, verify=False), FillReport(0, 0.0, truncated)
    # The main process holds the store's lock until everything is in it.
    with KVStoreWriter(folder, identity, shard_bytes) if state.is_main_process else nullcontext() as store:
        missing = [by_key[key] for key in from_main_process([] if store is None else store.missing(by_key))]
        if len(missing) < len(by_key):
            logger.info("%d of %d texts are in %s already", len(by_key) - len(missing), len(by_key), folder)
        model = load_teacher()
        started = time.perf_counter()
        buckets = length_buckets([len(text.input_ids) for text in missing], token_budget)
        # Buckets come longest first, so that turns even the work out.
        processes = 1 if identity.quantized else state.num_processes
        share = [[missing[index] for index in bucket] for bucket in buckets[state.process_index :: processes]]
        if store is not None and processes == 1:
            _add_share(store, model, share, teacher)
        elif processes > 1:
            with KVStoreWriter(share_folder(folder, state.process_index), identity, shard_bytes) as writer:
                _add_share(writer, model, share, teacher)
        state.wait_for_everyone()
        if store is not None:
            store.adopt_shares()
            store.finish()
    state.wait_for_everyone()
    report = FillReport(sum(len(text.input_ids) for text in missing), time.perf_counter() - started, truncated)
    # Sizes are enough here: every shard was checked or written by these very processes.
    return KVStore.open(folder, identity, verify=False), report


def _is_finished(folder: Path, identity: StoreIdentity, verify: bool) -> bool:
    """Whether ``folder`` holds the complete and sound store, so that the writer has nothing to do."""
    manifest = read_manifest(folder)
    if manifest is None or not manifest.complete or manifest.identity.difference(identity):
        return False
    if manifest.quantizer is not None and read_quantizer(folder, manifest) is None:
        return False
    return not any(damage(folder, name, shard, checksum=verify) for name, shard in manifest.shards.items())


def encode_for_teacher(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EncodedText]:
    """``examples`` as the teacher reads them, cut to ``max_length`` tokens."""
    return [encode_text(example, tokenizer, max_length) for example in examples]


def _add_share(
    writer: KVStoreWriter, model: PreTrainedModel, share: Sequence[Sequence[EncodedText]], teacher: str
) -> None:
    tokens = [sum(len(text.input_ids) for text in batch) for batch in share]
    with progress_bar(f"capturing KV of {teacher}", sum(tokens), "tokens") as advance:
        for batch, size in zip(share, tokens, strict=True):
            _add_batch(writer, model, batch, teacher)
            advance(size)


def _add_batch(writer: KVStoreWriter, model: PreTrainedModel, batch: Sequence[EncodedText], teacher: str) -> None:
    found = kv_of_texts(model, batch, writer.identity.layers)
    for text, kv in zip(batch, found, strict=True):
        counted = counted_tokens(len(text.input_ids))
        try:
            writer.add(text.sample_key, kv, text.spans, text.truncated_bytes, text.text_bytes, counted)
        except StoreError as error:
            raise StoreError(f"teacher {teacher}: {error}") from error


def kv_of_texts(model: PreTrainedModel, texts: Sequence[EncodedText], layers: Sequence[int]) -> list[KV]:
    """KV of each of ``texts`` (batch 1, no padding, in memory) from one pass of ``model``; not checked for NaN.

    Raises:
        ModelError: the model cannot be captured.
    """
    kv = capture(model, *pad_texts(texts), layers=layers).to("cpu")
    return [_one_text(kv, row, len(text.input_ids)) for row, text in enumerate(texts)]


def counted_tokens(tokens: int) -> Tensor:
    """bool ``[tokens]``: which tokens of a text count in mean and spread."""
    return torch.arange(tokens) >= min(_SINK_TOKENS, tokens - 1)


def _one_text(kv: KV, row: int, tokens: int) -> KV:
    return replace(
        kv,
        keys=kv.keys[row : row + 1, ..., :tokens, :],
        values=kv.values[row : row + 1, ..., :tokens, :],
        positions=kv.positions[row : row + 1, :tokens],
        mask=kv.mask[row : row + 1, :tokens],
    )
