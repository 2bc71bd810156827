"""Fill stores: run the teacher once over every text that one of them does not hold yet."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgraft.data.batching import length_buckets, pad_texts
from kvgraft.data.chat import encode_text
from kvgraft.data.datasets import Example
from kvgraft.data.spans import EncodedText
from kvgraft.errors import StoreError
from kvgraft.kv import KV
from kvgraft.models.capture import capture
from kvgraft.models.head import hidden_states, kv_and_hidden_states
from kvgraft.models.tensor_parallel import is_tensor_parallel
from kvgraft.processes import from_main_process, process_state
from kvgraft.progress import progress_bar
from kvgraft.store.shares import share_folder

logger = logging.getLogger(__name__)

_Opened = TypeVar("_Opened", covariant=True)


@dataclass(frozen=True)
class FillReport:
    """What filling cost: tokens and seconds of the teacher's pass, both zero when everything was there.

    ``truncated_texts`` counts the texts of the whole store that the teacher read only in part.
    """

    tokens: int
    seconds: float
    truncated_texts: int

    @property
    def tokens_per_second(self) -> float | None:
        """Rate of the teacher's pass, capture and writing included; None when it was skipped."""
        return self.tokens / self.seconds if self.tokens else None


@dataclass(frozen=True)
class Found:
    """What a pass of the teacher gave for one text; None is what no store asked for.

    ``kv`` has batch 1 and no padding; ``hidden [tokens, hidden_size]`` is what the head reads. Both lie on the model's
    device, where writers turn them into what they keep.
    """

    kv: KV | None = None
    hidden: Tensor | None = None


class Writer(AbstractContextManager[Any], Protocol):
    """What writes a store; it saves what is whole when it is left."""

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that were not added yet, in their order."""

    def adopt_shares(self) -> None:
        """Take over what several processes wrote."""

    def finish(self) -> None:
        """Mark the store complete."""


class StoreToFill(Protocol[_Opened]):
    """A kind of store that a teacher's pass can fill.

    Attributes:
        content: what it holds, in words.
        folder: where it is.
        kv_layers: the layers whose KV it takes; none if it takes the last hidden states.
        one_writer: whether processes cannot share the work.
    """

    @property
    def content(self) -> str: ...
    @property
    def folder(self) -> Path: ...
    @property
    def kv_layers(self) -> tuple[int, ...]: ...
    @property
    def one_writer(self) -> bool: ...

    def is_finished(self) -> bool:
        """Whether nothing is left to do."""

    def writer(self, folder: Path) -> Any:
        """A :class:`Writer` of the store, or of a share of it."""

    def add(self, writer: Any, model: PreTrainedModel, text: EncodedText, found: Found) -> None:
        """Hand what ``model`` gave for ``text`` to a writer."""

    def open(self) -> _Opened:
        """The store once it is filled."""


class Hashed(Protocol):
    """What a store holds, told by a hash."""

    def hash(self) -> str:
        """Digits that name the folder."""


def store_folder(path: Path, teacher: str, identity: Hashed) -> Path:
    """Folder below ``path`` for what ``identity`` says; runs that differ in any of it never share one."""
    return path / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', teacher)}-{identity.hash()}"


def encode_for_teacher(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EncodedText]:
    """``examples`` as the teacher reads them, cut to ``max_length`` tokens."""
    return [encode_text(example, tokenizer, max_length) for example in examples]


def fill_store(
    store: StoreToFill[_Opened],
    teacher: str,
    load_teacher: Callable[[], PreTrainedModel],
    texts: Sequence[EncodedText],
    *,
    token_budget: int,
) -> tuple[_Opened, FillReport]:
    """:func:`fill_stores` for ``store`` alone, which is then opened."""
    (report,) = fill_stores([store], teacher, load_teacher, texts, token_budget=token_budget)
    return store.open(), report


def fill_stores(
    stores: Sequence[StoreToFill[Any]],
    teacher: str,
    load_teacher: Callable[[], PreTrainedModel],
    texts: Sequence[EncodedText],
    *,
    token_budget: int,
) -> list[FillReport]:
    """Make or continue ``stores``, all of the same teacher and ``texts``; what one of them holds already is left.

    A text that several stores lack is read once for all of them. Where several processes run, all of them call this,
    and each runs the teacher over its share of the batches. Where some store has one writer, the main process does
    everything; where the processes hold one teacher together, all run it and the main process writes.

    Args:
        stores: of different contents.
        teacher: name shown on the bar and in errors.
        load_teacher: called only if some text is missing.
        texts: as the teacher's tokenizer reads them.
        token_budget: most tokens, padding included, in one pass of the teacher.

    Returns:
        for each store the tokens that it lacked, and the seconds of the whole pass.

    Raises:
        StoreError, ModelError, KVGraftError: a store cannot be written, the model cannot be captured, or it gives
            NaN or Inf (names teacher, text and layer). What was written stays and is not done again.
    """
    by_key = {text.sample_key: text for text in texts}
    truncated = sum(bool(text.truncated_bytes) for text in by_key.values())
    state = process_state()
    finished = from_main_process([state.is_main_process and store.is_finished() for store in stores])
    unfinished = [store for store, is_finished in zip(stores, finished, strict=True) if not is_finished]
    for store in stores:
        if store not in unfinished:
            logger.info("%s of %s: these %d texts are in %s", store.content, teacher, len(by_key), store.folder)
    if not unfinished:
        logger.info("nothing of %s is missing: the teacher is not run", teacher)
        return [FillReport(0, 0.0, truncated) for _ in stores]
    with ExitStack() as opened:
        # The main process holds the stores' locks until everything is in them.
        mine = unfinished if state.is_main_process else []
        writers: list[Writer] = [opened.enter_context(store.writer(store.folder)) for store in mine]
        missing = from_main_process([writer.missing(by_key) for writer in writers])
        for store, keys in zip(unfinished, missing, strict=True):
            if len(keys) < len(by_key):
                done = len(by_key) - len(keys)
                logger.info("%s: %d of %d texts are in %s already", store.content, done, len(by_key), store.folder)
        model = load_teacher()
        started = time.perf_counter()
        batches = _batches(by_key, missing, token_budget)
        shared_model = is_tensor_parallel(model)
        processes = 1 if shared_model or any(store.one_writer for store in unfinished) else state.num_processes
        # Buckets come longest first, so that turns even the work out.
        share = batches if processes == 1 else batches[state.process_index :: processes]
        if processes > 1:
            with ExitStack() as own:
                folders = [share_folder(store.folder, state.process_index) for store in unfinished]
                shares = [
                    own.enter_context(store.writer(folder)) for store, folder in zip(unfinished, folders, strict=True)
                ]
                _add_share(unfinished, shares, model, share, teacher)
        elif state.is_main_process or shared_model:
            _add_share(unfinished, writers, model, share, teacher)
        state.wait_for_everyone()
        for writer in writers:
            writer.adopt_shares()
            writer.finish()
    state.wait_for_everyone()
    seconds = time.perf_counter() - started
    lacked = {
        store.content: sum(len(by_key[key].input_ids) for key in keys)
        for store, keys in zip(unfinished, missing, strict=True)
    }
    return [
        FillReport(tokens, seconds if tokens else 0.0, truncated)
        for tokens in (lacked.get(store.content, 0) for store in stores)
    ]


@dataclass(frozen=True)
class _Batch:
    """Texts that go through the teacher together, and which of the unfinished stores lack them."""

    stores: tuple[int, ...]
    texts: list[EncodedText]


def _batches(by_key: Mapping[str, EncodedText], missing: Sequence[Sequence[str]], token_budget: int) -> list[_Batch]:
    lacked = [set(keys) for keys in missing]
    lacking: dict[tuple[int, ...], list[EncodedText]] = {}
    for key, text in by_key.items():
        stores = tuple(number for number, keys in enumerate(lacked) if key in keys)
        lacking.setdefault(stores, []).append(text)
    return [
        _Batch(stores, [texts[index] for index in bucket])
        for stores, texts in lacking.items()
        if stores
        for bucket in length_buckets([len(text.input_ids) for text in texts], token_budget)
    ]


def _add_share(
    stores: Sequence[StoreToFill[Any]],
    writers: Sequence[Any],
    model: PreTrainedModel,
    share: Sequence[_Batch],
    teacher: str,
) -> None:
    tokens = [sum(len(text.input_ids) for text in batch.texts) for batch in share]
    contents = " and ".join(store.content for store in stores)
    with progress_bar(f"capturing {contents} of {teacher}", sum(tokens), "tokens") as advance:
        for batch, size in zip(share, tokens, strict=True):
            lacking = [stores[number] for number in batch.stores]
            for text, found in zip(batch.texts, _run(model, batch.texts, lacking), strict=True):
                for number in batch.stores if writers else ():
                    try:
                        stores[number].add(writers[number], model, text, found)
                    except StoreError as error:
                        raise StoreError(f"teacher {teacher}: {error}") from error
            advance(size)


def _run(model: PreTrainedModel, texts: Sequence[EncodedText], stores: Sequence[StoreToFill[Any]]) -> list[Found]:
    """What ``stores`` take of each text, from one pass of ``model``."""
    layers = next((store.kv_layers for store in stores if store.kv_layers), ())
    if all(store.kv_layers for store in stores):
        return [Found(kv=kv) for kv in kv_of_texts(model, texts, layers)]
    if not layers:
        hidden = hidden_states(model, *pad_texts(texts))
        return [Found(hidden=hidden[row, : len(text.input_ids)]) for row, text in enumerate(texts)]
    kv, hidden = kv_and_hidden_states(model, *pad_texts(texts), layers)
    by_text = _by_text(kv, texts)
    return [Found(by_text[row], hidden[row, : len(text.input_ids)]) for row, text in enumerate(texts)]


def kv_of_texts(model: PreTrainedModel, texts: Sequence[EncodedText], layers: Sequence[int]) -> list[KV]:
    """KV of each of ``texts`` (batch 1, no padding, on the model's device) from one pass of ``model``.

    It is not checked for NaN.

    Raises:
        ModelError: the model cannot be captured.
    """
    return _by_text(capture(model, *pad_texts(texts), layers=layers), texts)


def _by_text(kv: KV, texts: Sequence[EncodedText]) -> list[KV]:
    return [_one_text(kv, row, len(text.input_ids)) for row, text in enumerate(texts)]


def _one_text(kv: KV, row: int, tokens: int) -> KV:
    return replace(
        kv,
        keys=kv.keys[row : row + 1, ..., :tokens, :],
        values=kv.values[row : row + 1, ..., :tokens, :],
        positions=kv.positions[row : row + 1, :tokens],
        mask=kv.mask[row : row + 1, :tokens],
    )
