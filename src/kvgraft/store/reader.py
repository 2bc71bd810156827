"""Read a KV store: samples by key, straight from the shards on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvgraft.errors import StoreError
from kvgraft.kv import KV
from kvgraft.store.few_bits import FewBitsQuantizer
from kvgraft.store.format import (
    MANIFEST_NAME,
    QUANTIZER_NAME,
    Manifest,
    SampleEntry,
    StoreIdentity,
    damage,
    read_manifest,
    read_quantizer,
    short_key,
    stored_bytes_per_token,
)
from kvgraft.store.moments import Moments
from kvgraft.store.open_shards import OpenShard, OpenShards, open_shard


@dataclass(frozen=True)
class StoredSample:
    """One text's KV (batch 1, no padding, positions from 0) with its token spans ``[tokens, 2]`` int32."""

    kv: KV
    spans: np.ndarray
    truncated_bytes: int
    text_bytes: int


@dataclass(frozen=True)
class KVStatistics:
    """Mean and population variance of each channel over ``count`` tokens.

    ``mean`` and ``variance`` are float32 ``[layers, 2, kv_dim]``; index 0 of the middle axis is keys, 1 is values.
    """

    count: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def from_moments(cls, moments: Moments, layers: Sequence[int]) -> KVStatistics:
        """Of the entries ``layers`` of the moments' layer axis.

        Raises:
            StoreError: no token counts.
        """
        if moments.count == 0:
            raise StoreError("no token of the teacher's texts counts, so its KV has no mean; add longer texts")
        variance = moments.m2[layers] / moments.count
        return cls(moments.count, moments.mean[layers].float(), variance.float())

    def standard(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel ``[2, layers, kv_dim]``, keys first; no deviation is zero."""
        return self.mean.transpose(0, 1), _deviation(self.variance)

    def layer_deviations(self) -> Tensor:
        """Deviation of each layer's keys and values ``[2, layers]`` about their channels' means; none is zero."""
        return _deviation(self.variance.mean(-1))


@dataclass(frozen=True)
class KVStore:
    """A complete store, opened for reading with :meth:`open`. Worker processes may share one after a fork."""

    folder: Path
    manifest: Manifest
    quantizer: FewBitsQuantizer | None = None
    _handles: OpenShards = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path, expected: StoreIdentity | None = None, *, verify: bool = True) -> KVStore:
        """Open the store in ``folder``.

        Args:
            folder: the store's folder.
            expected: what the store must hold; default whatever it holds.
            verify: read every shard once and compare its checksum; otherwise only sizes are looked at.

        Raises:
            StoreError: there is no store, it is incomplete or damaged, or it holds something else.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None:
            raise StoreError(
                f"there is no KV store in {folder} (no {MANIFEST_NAME}). Run the cache command to make it."
            )
        if expected is not None and (difference := manifest.identity.difference(expected)):
            raise StoreError(
                f"the KV store in {folder} was made from something else. {'; '.join(difference)}. "
                "Run the cache command with another folder, or name the right one."
            )
        if not manifest.complete:
            raise StoreError(
                f"the KV store in {folder} is incomplete: {len(manifest.samples)} samples are there and the rest was "
                "never written. Run the cache command again to add only what is missing."
            )
        for name, shard in manifest.shards.items():
            reason = damage(folder, name, shard, checksum=verify)
            if reason:
                raise StoreError(
                    f"shard {name} of the KV store in {folder} {reason}. "
                    f"Delete {name} and run the cache command again: only its {shard.samples} samples are redone."
                )
        quantizer = read_quantizer(folder, manifest)
        if manifest.quantizer is not None and quantizer is None:
            raise StoreError(
                f"{QUANTIZER_NAME} of the KV store in {folder} is missing or damaged, and its shards cannot be read "
                f"without it. Run the cache command again to make the store anew."
            )
        return cls(folder, manifest, quantizer)

    @property
    def identity(self) -> StoreIdentity:
        """What the store holds."""
        return self.manifest.identity

    def keys(self) -> list[str]:
        """Keys of all samples."""
        return list(self.manifest.samples)

    def __len__(self) -> int:
        return len(self.manifest.samples)

    def __contains__(self, key: object) -> bool:
        return key in self.manifest.samples

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(shard.tokens for shard in self.manifest.shards.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of all shard files, and of what a quantised store is decoded by."""
        once = 0 if self.quantizer is None else (self.folder / QUANTIZER_NAME).stat().st_size
        return once + sum(shard.bytes for shard in self.manifest.shards.values())

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk for each token, all layers and everything beside the KV included; 0 for an empty store."""
        return self.total_bytes / max(self.num_tokens, 1)

    def read(self, key: str, layers: Sequence[int] | None = None, *, as_stored: bool = False) -> StoredSample:
        """One sample.

        Args:
            key: the sample's key.
            layers: teacher layers wanted, in this order, repeats allowed; default all that the store holds.
            as_stored: give floats in the store's own dtype and not in float32. All layers are then the mapped file
                itself, which nobody may write into; a quantised store is decoded to float32 in any case.

        Raises:
            StoreError: the store has no such sample or layer.
        """
        entry = self._entry(key)
        wanted = self.identity.layers if layers is None else tuple(layers)
        index = self._layer_index(wanted)
        numbers = self._numbers(entry, index, as_stored)
        heads = numbers.view(*numbers.shape[:3], self.identity.num_kv_heads, self.identity.head_dim).transpose(2, 3)
        kv = KV(
            keys=heads[None, :, 0],
            values=heads[None, :, 1],
            positions=torch.arange(entry.tokens)[None],
            mask=torch.ones(1, entry.tokens, dtype=torch.bool),
            layers=wanted,
            rotated=self.identity.rotated,
        )
        return StoredSample(kv, self._spans(entry), entry.truncated_bytes, entry.text_bytes)

    def ask_ahead(self, keys: Iterable[str], layers: Sequence[int] | None = None) -> None:
        """Let the system fetch samples together that will be read one by one, which a disk does in less time.

        Args:
            keys: of the samples.
            layers: as :meth:`read` will be asked for.

        Raises:
            StoreError: the store has no such sample or layer.
        """
        index = self._layer_index(self.identity.layers if layers is None else layers)
        for key in keys:
            self._ask_ahead(self._entry(key), index)

    def read_spans(self, key: str) -> np.ndarray:
        """The token spans ``[tokens, 2]`` int32 of one sample, without its KV.

        Raises:
            StoreError: the store has no such sample.
        """
        return self._spans(self._entry(key))

    def statistics(self, layers: Sequence[int] | None = None) -> KVStatistics:
        """Mean and variance of each channel over the tokens that count, from what the shards keep of it.

        Args:
            layers: teacher layers wanted, in this order, repeats allowed; default all that the store holds.

        Raises:
            StoreError: the store has no such layer, or no token that counts.
        """
        index = self._layer_index(self.identity.layers if layers is None else layers)
        total = Moments.empty(self.identity.geometry)
        for name in self.manifest.shards:
            shard = self._shard(name)
            count = int(shard.get_tensor("count"))
            total = total.merge(Moments(count, shard.get_tensor("mean"), shard.get_tensor("m2")))
        return KVStatistics.from_moments(total, index)

    def _entry(self, key: str) -> SampleEntry:
        entry = self.manifest.samples.get(key)
        if entry is None:
            raise StoreError(
                f"sample {short_key(key)} is not in the KV store in {self.folder}, which holds {len(self)} samples. "
                "Run the cache command over the text that this run uses."
            )
        return entry

    def _layer_index(self, layers: Sequence[int]) -> list[int]:
        held = self.identity.layers
        absent = [layer for layer in layers if layer not in held]
        if absent:
            raise StoreError(
                f"teacher layers {absent} are not in the KV store in {self.folder}, which holds layers {list(held)}. "
                "Run the cache command with these layers."
            )
        return [held.index(layer) for layer in layers]

    def _spans(self, entry: SampleEntry) -> np.ndarray:
        return np.array(self._slice(entry, "spans").numpy())

    def _numbers(self, entry: SampleEntry, index: list[int], as_stored: bool) -> Tensor:
        """Numbers ``[layers, 2, tokens, kv_dim]`` at ``index`` of the store's layers, float32 unless ``as_stored``."""
        held = len(self.identity.layers)
        if len(index) < held:
            self._ask_ahead(entry, index)
        rows = self._slice(entry, "kv")
        if self.identity.format_version == 1:
            mapped = rows.view(entry.tokens, held, 2, -1).permute(1, 2, 0, 3)
        else:
            mapped = rows.view(held, 2, entry.tokens, -1)
        if self.quantizer is None and not as_stored:
            # Read and converted in one pass. A copy even of float32: what is handed out must not change with the file.
            numbers = torch.empty(len(index), *mapped.shape[1:], dtype=torch.float32)
            for place, layer in zip(numbers, index, strict=True):
                place.copy_(mapped[layer])
            return numbers
        chosen = mapped if index == list(range(held)) else mapped.index_select(0, torch.tensor(index))
        return chosen if self.quantizer is None else self.quantizer.decode(chosen, index)

    def _ask_ahead(self, entry: SampleEntry, index: list[int]) -> None:
        """Let the system fetch these layers of a sample and no others, unless it holds the last of them."""
        held = len(self.identity.layers)
        sample_bytes = entry.tokens * self._token_bytes
        start = self._kv_range(entry.shard)[0] + entry.first_token * self._token_bytes
        wanted = dict.fromkeys(index)
        if self.identity.format_version == 1 or len(wanted) == held:
            # Layers lie side by side, token by token, or all of them are wanted.
            places, length = [start], sample_bytes
        else:
            length = sample_bytes // held
            places = [start + layer * length for layer in wanted]
        shard = self._shard(entry.shard)
        if places and not shard.is_cached(places[-1]):
            for place in places:
                shard.ask_ahead(place, length)

    def _slice(self, entry: SampleEntry, name: str) -> Tensor:
        return self._shard(entry.shard).get_tensor(name)[entry.first_token : entry.first_token + entry.tokens]

    def _shard(self, name: str) -> OpenShard:
        start, end = self._kv_range(name)
        # With the first byte of the KV, which is looked at when it is mapped.
        small = [(0, start + 1), (end, self.manifest.shards[name].bytes - end)]
        return open_shard(self._handles, self.folder, name, small)

    def _kv_range(self, name: str) -> tuple[int, int]:
        """First byte of a shard's KV in its file, and the one behind the last."""
        shard = self.manifest.shards[name]
        kv_bytes = shard.tokens * self._token_bytes
        start = shard.head_bytes or shard.bytes - kv_bytes
        return start, start + kv_bytes

    @cached_property
    def _token_bytes(self) -> int:
        return stored_bytes_per_token(self.identity.geometry, self.identity.dtype)


def _deviation(variance: Tensor) -> Tensor:
    return variance.sqrt().clamp_min(torch.finfo(torch.float32).eps).transpose(0, 1)
