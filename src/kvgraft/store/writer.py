"""Write a KV store: samples gather in memory and reach the disk a whole shard at a time."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from kvgraft.errors import StoreError
from kvgraft.kv import KV
from kvgraft.store.format import (
    QUANTIZER_NAME,
    SHARD_PATTERN,
    TEMPORARY_SUFFIX,
    Manifest,
    Moments,
    SampleEntry,
    ShardEntry,
    StoreIdentity,
    damage,
    read_manifest,
    read_quantizer,
    short_key,
    write_atomically,
    write_manifest,
)
from kvgraft.store.lock import lock_folder, unlock_folder
from kvgraft.store.quantize import Quantizer
from kvgraft.store.shard import PendingSample, write_shard

logger = logging.getLogger(__name__)

# Where processes that fill one store together write, each in a folder of its own.
SHARE_PATTERN = "share-*"
# Tokens that a quantised store's scales and components come from: several times a head's width.
CALIBRATION_TOKENS = 2048


class KVStoreWriter:
    """The one writer of a store folder; use it in a ``with`` block, which holds the folder's lock.

    An existing folder is continued: leftovers of a killed run are removed, and shards that are missing or damaged are
    dropped with a warning, so that :meth:`missing` names exactly what has to be done again. What several processes left
    in folders of their own (:func:`share_folder`) is taken over. Leaving the block writes
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
        self._pending: dict[str, PendingSample] = {}
        self._pending_bytes = 0
        self._moments = Moments.empty(identity.geometry)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = lock_folder(self.folder)
        try:
            self._manifest = _recover(self.folder, identity)
            self._quantizer = read_quantizer(self.folder, self._manifest)
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
                self._flush()
            else:
                self._flush_after(error)
        finally:
            self.close()

    def __contains__(self, key: object) -> bool:
        return key in self._manifest.samples or key in self._pending

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
                disk is full.
        """
        if self._lock is None:
            raise StoreError(f"the writer of {self.folder} is closed; open a new KVStoreWriter to add samples")
        if key in self:
            return
        packed = self._pack(key, kv)
        stored = packed if self.identity.quantized else self._stored(key, packed)
        tokens = packed.shape[0]
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
        counted = torch.ones(tokens, dtype=torch.bool) if counted is None else counted.cpu()
        moments = self._moments.merge(Moments.of(packed[counted] if self.identity.quantized else stored[counted]))
        if self._quantizer is not None:
            stored = self._stored(key, packed)
        span_tensor = torch.from_numpy(np.array(spans, dtype=np.int32))
        self._pending[key] = PendingSample(key, stored, counted, span_tensor, truncated_bytes, text_bytes)
        self._pending_bytes += stored.nbytes
        self._moments = moments
        if not self._ready and sum(len(sample.kv) for sample in self._pending.values()) >= CALIBRATION_TOKENS:
            self._calibrate()
        if self._ready and self._pending_bytes >= self._shard_bytes:
            self._flush()

    def adopt_shares(self) -> None:
        """Move the shards of every share into this store, and remove the shares' folders."""
        for share in sorted(self.folder.glob(SHARE_PATTERN)):
            with KVStoreWriter(share, self.identity, self._shard_bytes) as other:
                self._manifest = _with_shards_of(self._manifest, self.folder, other._manifest, share)
                write_manifest(self.folder, self._manifest)
                shutil.rmtree(share)

    def finish(self) -> None:
        """Write what is left and mark the store complete; call it once every text was added."""
        if self._pending and not self._ready:
            self._calibrate()
        self._flush()
        if not self._manifest.complete:
            manifest = self._manifest.model_copy(update={"complete": True})
            write_manifest(self.folder, manifest)
            self._manifest = manifest

    def close(self) -> None:
        """Give the folder's lock back without writing anything."""
        if self._lock is not None:
            unlock_folder(self._lock)
            self._lock = None

    def _pack(self, key: str, kv: KV) -> Tensor:
        """The checked numbers ``[tokens, layers, 2, kv_dim]``."""
        _require_fit(key, kv, self.identity)
        keys, values = kv.detach().flatten()
        packed = torch.stack([keys[0], values[0]], dim=2).transpose(0, 1).cpu()
        place = _first_not_finite(packed, kv.layers)
        if place:
            raise StoreError(
                f"sample {short_key(key)} has NaN or Inf in {place}. "
                "Run the teacher in float32 or bfloat16, or leave this text out."
            )
        return packed

    def _stored(self, key: str, packed: Tensor) -> Tensor:
        """What :meth:`_pack` gave, in the store's dtype."""
        dtype, layers = self.identity.dtype, self.identity.layers
        if self._quantizer is not None:
            stored = self._quantizer.encode(packed)
            place = _first_not_finite(self._quantizer.halves(stored), layers)
        else:
            stored = packed.to(self.identity.torch_dtype).contiguous()
            place = _first_not_finite(stored, layers)
        if place:
            wider = "float32" if dtype == "bfloat16" else "bfloat16 or float32"
            raise StoreError(
                f"sample {short_key(key)} has a number beyond the range of {dtype} in {place}. "
                f"Set the store's dtype to {wider}."
            )
        return stored

    @property
    def _ready(self) -> bool:
        return self._quantizer is not None or not self.identity.quantized

    def _calibrate(self) -> None:
        """Choose the store's quantizer by the samples that wait, keep it on disk, and put it to them."""
        samples = self._pending.values()
        counted = torch.cat([sample.kv[sample.counted] for sample in samples])
        tokens = counted if len(counted) else torch.cat([sample.kv for sample in samples])
        self._quantizer = Quantizer.calibrate(self.identity.dtype, tokens, self.identity.head_dim)
        try:
            pending = {sample.key: replace(sample, kv=self._stored(sample.key, sample.kv)) for sample in samples}
            digest = write_atomically(self.folder / QUANTIZER_NAME, [memoryview(self._quantizer.to_bytes())])
            manifest = self._manifest.model_copy(update={"quantizer": digest})
            write_manifest(self.folder, manifest)
        except BaseException:
            self._quantizer = None
            raise
        self._manifest, self._pending = manifest, pending
        self._pending_bytes = sum(sample.kv.nbytes for sample in pending.values())

    def _flush(self) -> None:
        if not self._pending:
            return
        # Taken out first: should writing fail, these samples count as missing again and are not tried twice.
        samples, moments = list(self._pending.values()), self._moments
        self._pending, self._pending_bytes = {}, 0
        self._moments = Moments.empty(self.identity.geometry)
        name = _next_shard_name(self._manifest.shards)
        entry = write_shard(self.folder / name, samples, moments)
        manifest = _with_shard(self._manifest, name, entry, samples)
        try:
            write_manifest(self.folder, manifest)
        except BaseException:
            (self.folder / name).unlink(missing_ok=True)
            raise
        self._manifest = manifest

    def _flush_after(self, error: BaseException) -> None:
        """Save what is whole on the way out of a failure, which stays the error that the caller sees."""
        try:
            self._flush()
        except (StoreError, OSError) as second:
            logger.warning("could not save the last samples of %s after %s: %s", self.folder, repr(error), second)


def share_folder(folder: Path, process: int) -> Path:
    """Where process number ``process`` writes while several fill the store in ``folder``."""
    return folder / SHARE_PATTERN.replace("*", f"{process:05d}")


def _recover(folder: Path, identity: StoreIdentity) -> Manifest:
    """The manifest of what is usable in a locked folder, which then holds no other shard or temporary file."""
    manifest = read_manifest(folder)
    if manifest is not None and (difference := manifest.identity.difference(identity)):
        raise StoreError(
            f"the KV store in {folder} was made from something else. {'; '.join(difference)}. "
            "Choose another folder, or delete this one."
        )
    found = manifest or Manifest(identity=identity)
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


def _first_not_finite(packed: Tensor, layers: tuple[int, ...]) -> str | None:
    # One sum is much cheaper than a look at each number, and what is not finite makes it so.
    if math.isfinite(float(packed.sum(dtype=torch.float32))):
        return None
    finite = torch.isfinite(packed)
    if bool(finite.all()):
        return None
    token, layer, kind, _ = (int(index) for index in (~finite).nonzero()[0])
    return f"the {('keys', 'values')[kind]} of layer {layers[layer]}, token {token}"


def _next_shard_name(shards: Iterable[str]) -> str:
    # One past the highest and not the first gap: a dropped shard then seldom lends its name to other contents.
    last = max((int(Path(name).stem.removeprefix("kv-")) for name in shards), default=-1)
    return f"kv-{last + 1:05d}.safetensors"


def _with_shard(manifest: Manifest, name: str, entry: ShardEntry, samples: list[PendingSample]) -> Manifest:
    entries = dict(manifest.samples)
    first = 0
    for sample in samples:
        tokens = sample.kv.shape[0]
        entries[sample.key] = SampleEntry(
            shard=name,
            first_token=first,
            tokens=tokens,
            truncated_bytes=sample.truncated_bytes,
            text_bytes=sample.text_bytes,
        )
        first += tokens
    shards = {**manifest.shards, name: entry}
    return manifest.model_copy(update={"complete": False, "shards": shards, "samples": entries})


def _with_shards_of(manifest: Manifest, folder: Path, other: Manifest, share: Path) -> Manifest:
    """``manifest`` of ``folder`` and the shards of ``other``, which are moved there from ``share``."""
    shards, samples = dict(manifest.shards), dict(manifest.samples)
    # A shard with a sample that is here already would count it twice; what else it holds is done again.
    repeated = {sample.shard for key, sample in other.samples.items() if key in samples}
    names = {}
    for name, entry in other.shards.items():
        if name not in repeated:
            names[name] = _next_shard_name(shards)
            os.replace(share / name, folder / names[name])
            shards[names[name]] = entry
    for key, sample in other.samples.items():
        if sample.shard in names:
            samples[key] = sample.model_copy(update={"shard": names[sample.shard]})
    complete = manifest.complete and not names
    return manifest.model_copy(update={"complete": complete, "shards": shards, "samples": samples})
