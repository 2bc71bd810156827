"""Write a KV store: check samples, convert them, and have them written."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from kvgraft.errors import StoreError
from kvgraft.kv import KV, all_finite
from kvgraft.processes import is_apples
from kvgraft.store.atomic_file import TEMPORARY_SUFFIX, write_atomically
from kvgraft.store.few_bits import calibrate, calibration_tokens
from kvgraft.store.format import (
    FORMAT_VERSION,
    QUANTIZER_NAME,
    SHARD_PATTERN,
    Manifest,
    StoreIdentity,
    damage,
    read_manifest,
    read_quantizer,
    short_key,
    write_manifest,
)
from kvgraft.store.lock import lock_folder, unlock_folder
from kvgraft.store.moments import Moments
from kvgraft.store.shard import PendingSample
from kvgraft.store.shard_queue import ShardQueue
from kvgraft.store.shares import SHARE_PATTERN, with_shards_of

logger = logging.getLogger(__name__)

# Layer axis, keys (0) or values (1), token.
_Place = tuple[int, int, int]


class KVStoreWriter:
    """The one writer of a store folder; use it in a ``with`` block, which holds the folder's lock.

    Samples are written while the next ones are made (:mod:`kvgraft.store.shard_queue`). What goes wrong there is raised
    when a later sample is added, by :meth:`finish`, or on leaving the block.

    An existing folder is continued: leftovers of a killed run are removed, and shards that are missing or damaged are
    dropped with a warning, so that :meth:`missing` names exactly what has to be done again. What several processes left
    in folders of their own (:mod:`kvgraft.store.shares`) is taken over. Leaving the block writes
    what was added; only :meth:`finish` marks the store complete, which a reader asks for.

    The scales of a quantised store come from the first texts that are added to it and stay with its folder, so that a
    continued store gets the same numbers. Leaving the block before there were enough of these texts writes nothing.

    Args:
        folder: the store's folder; made if absent.
        identity: what the store holds.
        shard_bytes: KV bytes after which a shard is written (a shard ends with the sample that reaches it).

    Raises:
        StoreError: another writer has the folder, or it holds something else than ``identity``.
    """

    def __init__(self, folder: Path, identity: StoreIdentity, shard_bytes: int) -> None:
        if shard_bytes < 1:
            raise StoreError(f"shard_bytes must be at least 1; got {shard_bytes}")
        self.folder = Path(folder)
        self.identity = identity
        self._shard_bytes = shard_bytes
        # By key, those that wait for the store's scales.
        self._pending: dict[str, PendingSample] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = lock_folder(self.folder)
        self._queue = ShardQueue(self.folder, Manifest(identity=identity), shard_bytes)
        try:
            self._queue.manifest = _recover(self.folder, identity)
            self._quantizer = read_quantizer(self.folder, self._queue.manifest)
            self.adopt_shares()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> KVStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._pending and not self._ready:
                logger.info("%d samples of %s were too few to choose its scales", len(self._pending), self.folder)
            elif error is None:
                self._queue.flush()
            else:
                self._flush_after(error)
        finally:
            self.close()

    def __contains__(self, key: object) -> bool:
        return key in self._pending or key in self._queue

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that were not added yet, in their order, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self]

    def add(
        self,
        key: str,
        kv: KV,
        spans: np.ndarray,
        truncated_bytes: int,
        text_bytes: int,
        counted: Tensor | None = None,
    ) -> None:
        """Add one text. A key that the store already has is left as it is.

        Args:
            key: :func:`~kvgraft.data.spans.sample_key` of the text.
            kv: its KV, batch 1 without padding, of the store's layers; any float dtype and device.
            spans: ``[tokens, 2]`` integers, the bytes of the text that each token stands for.
            truncated_bytes: bytes cut off the end of the text.
            text_bytes: bytes of the text.
            counted: ``[tokens]`` bool, the tokens that count in the store's statistics; default all.

        Raises:
            StoreError: the sample does not fit the store, holds NaN or Inf, or does not fit the store's dtype; or the
                disk was full when the shard before was written.
        """
        if self._lock is None:
            raise StoreError(f"the writer of {self.folder} is closed; open a new KVStoreWriter to add samples")
        if key in self:
            return
        _require_fit(key, kv, self.identity)
        tokens = kv.mask.shape[1]
        if spans.shape != (tokens, 2) or not np.issubdtype(spans.dtype, np.integer):
            raise StoreError(
                f"spans of sample {short_key(key)} must be [{tokens}, 2] integers to go with its KV; "
                f"got {list(spans.shape)} of {spans.dtype}"
            )
        if truncated_bytes < 0 or text_bytes < 0:
            raise StoreError(
                f"sample {short_key(key)} cannot have {text_bytes} bytes of text and {truncated_bytes} cut off"
            )
        if counted is not None and (tuple(counted.shape) != (tokens,) or counted.dtype != torch.bool):
            raise StoreError(
                f"counted of sample {short_key(key)} must be [{tokens}] bool; "
                f"got {list(counted.shape)} of {counted.dtype}"
            )
        counted = torch.ones(tokens, dtype=torch.bool) if counted is None else counted
        # It lacks the counting of moments, and float8.
        kv = kv.to("cpu") if is_apples(kv.keys.device) else kv
        with _one_core_left():
            numbers, moments = self._numbers(key, kv.detach(), counted.to(kv.keys.device))
        span_tensor = torch.from_numpy(np.array(spans, dtype=np.int32))
        sample = PendingSample(key, numbers, counted.cpu(), moments, span_tensor, truncated_bytes, text_bytes)
        if self._ready:
            self._queue.append(self._encoded(sample))
        else:
            self._pending[key] = replace(sample, kv=self._on_processor(numbers))
            waiting = sum(sample.tokens for sample in self._pending.values())
            if waiting >= calibration_tokens(self.identity.dtype):
                self._calibrate()

    def adopt_shares(self) -> None:
        """Move the shards of every share into this store, and remove the shares' folders."""
        self._queue.flush()
        for share in sorted(self.folder.glob(SHARE_PATTERN)):
            with KVStoreWriter(share, self.identity, self._shard_bytes) as other:
                ours, theirs = self._queue.manifest, other._queue.manifest
                self._keep(with_shards_of(ours, self.folder, theirs, share, SHARD_PATTERN))
                shutil.rmtree(share)

    def finish(self) -> None:
        """Write what is left and mark the store complete; call it once every text was added."""
        if self._pending:
            self._calibrate()
        self._queue.flush()
        if not self._queue.manifest.complete:
            self._keep(self._queue.manifest.model_copy(update={"complete": True}))

    def close(self) -> None:
        """Give the folder's lock back without adding anything more."""
        self._queue.close()
        if self._lock is not None:
            unlock_folder(self._lock)
            self._lock = None

    def _numbers(self, key: str, kv: KV, counted: Tensor) -> tuple[Tensor, Moments]:
        """The checked numbers ``[layers, 2, tokens, kv_dim]`` in the store's dtype, float32 for a quantised store.

        They stay on the device that has the KV until they are as few bytes as they become.
        """
        dtype = torch.float32 if self.identity.quantized else self.identity.torch_dtype
        geometry, tokens = kv.geometry, kv.mask.shape[1]
        shape = (geometry.num_layers, 2, tokens, geometry.num_kv_heads, geometry.head_dim)
        numbers = self._queue.room(shape, dtype, kv.keys.device)
        keys, values = kv.keys[0].transpose(1, 2), kv.values[0].transpose(1, 2)

        def fill(layers: slice) -> None:
            # Converted on the way, and what is in the processor's cache then is counted at once.
            numbers[layers, 0].copy_(keys[layers])
            numbers[layers, 1].copy_(values[layers])

        moments = Moments.of(numbers.flatten(-2), counted, fill)
        finite = all_finite(moments.m2) and all_finite(numbers[:, :, ~counted])
        if not finite and (place := _first_not_finite(numbers)):
            layer, kind, token = place
            given = (kv.keys, kv.values)[kind][0, layer, :, token]
            if all_finite(given):
                raise self._out_of_range(key, place, str(dtype).removeprefix("torch."))
            raise StoreError(
                f"sample {short_key(key)} has NaN or Inf in {self._named(place)}. "
                "Run the teacher in float32 or bfloat16, or leave this text out."
            )
        return numbers.flatten(-2), moments

    def _on_processor(self, numbers: Tensor) -> Tensor:
        on_processor = numbers.device.type == "cpu"
        return numbers if on_processor else self._queue.room(numbers.shape, numbers.dtype).copy_(numbers)

    def _encoded(self, sample: PendingSample) -> PendingSample:
        """``sample`` as it is written: on the processor, and with the records of its numbers in a quantised store."""
        if self._quantizer is None:
            return replace(sample, kv=self._on_processor(sample.kv))
        self._quantizer = self._quantizer.to(sample.kv.device)
        records = self._quantizer.encode(sample.kv)
        if place := _first_not_finite(self._quantizer.halves(records)):
            raise self._out_of_range(sample.key, place, self.identity.dtype)
        return replace(sample, kv=self._on_processor(records))

    def _out_of_range(self, key: str, place: _Place, dtype: str) -> StoreError:
        wider = "float32" if dtype == "bfloat16" else "bfloat16 or float32"
        return StoreError(
            f"sample {short_key(key)} has a number beyond the range of {dtype} in {self._named(place)}. "
            f"Set the store's dtype to {wider}."
        )

    def _named(self, place: _Place) -> str:
        layer, kind, token = place
        return f"the {('keys', 'values')[kind]} of layer {self.identity.layers[layer]}, token {token}"

    @property
    def _ready(self) -> bool:
        return self._quantizer is not None or not self.identity.quantized

    def _calibrate(self) -> None:
        """Choose the store's quantizer by the samples that wait, keep it on disk, and put it to them."""
        samples = self._pending.values()
        counted = torch.cat([sample.kv[:, :, sample.counted] for sample in samples], dim=2)
        tokens = counted if counted.shape[2] else torch.cat([sample.kv for sample in samples], dim=2)
        self._quantizer = calibrate(self.identity.dtype, tokens, self.identity.head_dim)
        try:
            encoded = [self._encoded(sample) for sample in samples]
            digest = write_atomically(self.folder / QUANTIZER_NAME, [memoryview(self._quantizer.to_bytes())])
            self._keep(self._queue.manifest.model_copy(update={"quantizer": digest}))
        except BaseException:
            self._quantizer = None
            raise
        self._pending = {}
        for sample in encoded:
            self._queue.append(sample)

    def _keep(self, manifest: Manifest) -> None:
        write_manifest(self.folder, manifest)
        self._queue.manifest = manifest

    def _flush_after(self, error: BaseException) -> None:
        """Save what is whole on the way out of a failure, which stays the error that the caller sees."""
        try:
            self._queue.flush()
        except (StoreError, OSError) as second:
            logger.warning("could not save the last samples of %s after %s: %s", self.folder, repr(error), second)


@contextmanager
def _one_core_left() -> Iterator[None]:
    """Compute with a thread less than there are, for the thread that writes: torch's helpers wait in busy loops."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _recover(folder: Path, identity: StoreIdentity) -> Manifest:
    """The manifest of what is usable in a locked folder, which then holds no other shard or temporary file."""
    manifest = read_manifest(folder)
    if manifest is not None and (difference := manifest.identity.difference(identity)):
        raise StoreError(
            f"the KV store in {folder} was made from something else. {'; '.join(difference)}. "
            "Choose another folder, or delete this one."
        )
    found = manifest or Manifest(identity=identity)
    if {identity.format_version, found.identity.format_version} != {FORMAT_VERSION}:
        raise StoreError(
            f"the KV store in {folder} is of format version {found.identity.format_version}, which can be read but not "
            f"continued: this kvgraft writes version {FORMAT_VERSION}. Delete the folder and run the cache command "
            "again."
        )
    bad = {name: reason for name, shard in found.shards.items() if (reason := damage(folder, name, shard))}
    if found.quantizer is not None and read_quantizer(folder, found) is None:
        # Without what they were written by, shards cannot be read.
        bad = dict.fromkeys(found.shards, f"cannot be read without a sound {QUANTIZER_NAME}")
        found = found.model_copy(update={"quantizer": None, "complete": False})
        manifest = None
    kept = found.without(bad)
    if bad:
        lost = len(found.samples) - len(kept.samples)
        for name, reason in bad.items():
            logger.warning("shard %s of %s %s; its samples will be done again", name, folder, reason)
        logger.warning("%d of %d samples of %s have to be done again", lost, len(found.samples), folder)
    if bad or manifest is None:
        write_manifest(folder, kept)
    leftovers = [path for path in folder.glob(SHARD_PATTERN) if path.name not in kept.shards]
    for path in [*leftovers, *folder.glob(f"*{TEMPORARY_SUFFIX}")]:
        path.unlink(missing_ok=True)
    return kept


def _require_fit(key: str, kv: KV, identity: StoreIdentity) -> None:
    name = f"sample {short_key(key)}"
    batch, tokens = kv.mask.shape
    if batch != 1 or tokens == 0:
        raise StoreError(f"{name} must be the KV of one text of at least one token; got {batch} texts, {tokens} tokens")
    if not bool(kv.mask.all()):
        raise StoreError(f"{name} has padding: {int((~kv.mask).sum())} of {tokens} tokens; cut it off before adding")
    if kv.layers != identity.layers:
        raise StoreError(f"{name} has layers {list(kv.layers)}; the store holds layers {list(identity.layers)}")
    if kv.geometry != identity.geometry:
        raise StoreError(f"{name} has {kv.geometry}; the store holds {identity.geometry}")
    if kv.rotated != identity.rotated:
        raise StoreError(f"{name} has rotated={kv.rotated} keys; the store holds rotated={identity.rotated}")


def _first_not_finite(numbers: Tensor) -> _Place | None:
    if all_finite(numbers):
        return None
    layer, kind, token, *_ = (int(index) for index in (~torch.isfinite(numbers)).nonzero()[0])
    return layer, kind, token
