"""Fill a KV store: run the teacher once over every text that the store does not hold yet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgraft.data.spans import EncodedText
from kvgraft.store.fill import Found, store_folder
from kvgraft.store.format import READABLE_VERSIONS, StoreIdentity, is_whole, read_manifest, read_quantizer
from kvgraft.store.reader import KVStore
from kvgraft.store.writer import KVStoreWriter

# The first tokens of a text are attention sinks whose norms are unlike the rest; they stay out of the statistics.
_SINK_TOKENS = 2


@dataclass(frozen=True)
class KVStoreToFill:
    """A KV store that :func:`~kvgraft.store.fill.fill_stores` makes, continues, or leaves as it is.

    Args:
        folder: see :func:`kv_store_folder`.
        identity: what the store holds.
        shard_bytes: KV bytes after which a shard ends.
        verify: compare every shard's checksum where the store says that it is complete.
    """

    folder: Path
    identity: StoreIdentity
    shard_bytes: int
    verify: bool = True
    content: ClassVar[str] = "KV"

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """Layers whose KV it holds."""
        return self.identity.layers

    @property
    def one_writer(self) -> bool:
        """A quantised store's scales come from the texts that its writer sees first."""
        return self.identity.quantized

    def is_finished(self) -> bool:
        """Whether the folder holds the complete and sound store, so that the writer has nothing to do."""
        manifest = read_manifest(self.folder)
        if manifest is None or manifest.identity.difference(self.identity):
            return False
        if manifest.quantizer is not None and read_quantizer(self.folder, manifest) is None:
            return False
        return is_whole(self.folder, manifest, checksum=self.verify)

    def writer(self, folder: Path) -> KVStoreWriter:
        """Writer of the store, or of a share of it."""
        return KVStoreWriter(folder, self.identity, self.shard_bytes)

    def add(self, writer: KVStoreWriter, model: PreTrainedModel, text: EncodedText, found: Found) -> None:
        """Hand what ``model`` gave for ``text`` to ``writer``."""
        assert found.kv is not None
        counted = counted_tokens(len(text.input_ids))
        writer.add(text.sample_key, found.kv, text.spans, text.truncated_bytes, text.text_bytes, counted)

    def open(self) -> KVStore:
        """The store once it is filled: every shard was checked or written then, so that sizes are enough here."""
        return KVStore.open(self.folder, self.identity, verify=False)


def kv_store_folder(path: Path, teacher: str, identity: StoreIdentity) -> Path:
    """As :func:`store_folder`, or where a complete store of the same numbers stands in an older format that is read."""
    for version in READABLE_VERSIONS:
        folder = store_folder(path, teacher, replace(identity, format_version=version))
        manifest = read_manifest(folder)
        if manifest is not None and manifest.complete:
            return folder
    return store_folder(path, teacher, identity)


def counted_tokens(tokens: int) -> Tensor:
    """bool ``[tokens]``: which tokens of a text count in mean and spread."""
    return torch.arange(tokens) >= min(_SINK_TOKENS, tokens - 1)
