"""One shard file of a KV store: the samples that go into it, and its bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvgraft.store.format import SHARD_PATTERN, Manifest, SampleEntry, ShardEntry, write_atomically, write_manifest
from kvgraft.store.moments import Moments
from kvgraft.store.shares import next_shard_name

_DTYPE_CODES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class PendingSample:
    """A checked sample that waits for its shard.

    ``kv`` is ``[layers, 2, tokens, kv_dim]`` in the store's dtype, or float32 while the store has no quantizer yet.
    """

    key: str
    kv: Tensor
    counted: Tensor
    spans: Tensor
    truncated_bytes: int
    text_bytes: int

    @property
    def tokens(self) -> int:
        """How many tokens the text has."""
        return self.kv.shape[2]


def add_shard(folder: Path, manifest: Manifest, samples: list[PendingSample], moments: Moments) -> Manifest:
    """Write the shard of ``samples`` into ``folder``; ``moments`` are those of their tokens that count.

    Returns ``manifest`` with the shard, which is in the folder then.
    """
    name = next_shard_name(manifest.shards, SHARD_PATTERN)
    entry = _write_shard(folder / name, samples, moments)
    extended = _with_shard(manifest, name, entry, samples)
    try:
        write_manifest(folder, extended)
    except BaseException:
        (folder / name).unlink(missing_ok=True)
        raise
    return extended


def _write_shard(path: Path, samples: list[PendingSample], moments: Moments) -> ShardEntry:
    chunks = _safetensors_chunks(
        {
            "count": [torch.tensor([moments.count])],
            "mean": [moments.mean],
            "m2": [moments.m2],
            "spans": [sample.spans for sample in samples],
            # As many rows as tokens, whatever they hold: see kvgraft.store.format.
            "kv": [sample.kv.reshape(sample.tokens, -1) for sample in samples],
        }
    )
    return ShardEntry(
        checksum=write_atomically(path, chunks),
        bytes=sum(chunk.nbytes for chunk in chunks),
        tokens=sum(sample.tokens for sample in samples),
        samples=len(samples),
    )


def _with_shard(manifest: Manifest, name: str, entry: ShardEntry, samples: list[PendingSample]) -> Manifest:
    entries = dict(manifest.samples)
    first = 0
    for sample in samples:
        entries[sample.key] = SampleEntry(
            shard=name,
            first_token=first,
            tokens=sample.tokens,
            truncated_bytes=sample.truncated_bytes,
            text_bytes=sample.text_bytes,
        )
        first += sample.tokens
    shards = {**manifest.shards, name: entry}
    return manifest.model_copy(update={"complete": False, "shards": shards, "samples": entries})


def _safetensors_chunks(tensors: dict[str, list[Tensor]]) -> list[memoryview]:
    """A safetensors file of the parts of each tensor joined along the first axis.

    Done by hand because the library would first join and then serialize, holding every shard three times in memory,
    and would report a full disk without its error number. Every tensor but the last must fill whole 8 bytes.
    """
    header: dict[str, object] = {}
    data: list[memoryview] = []
    offset = 0
    for name, parts in tensors.items():
        chunks = [part.contiguous().reshape(-1).view(torch.uint8).numpy().data for part in parts]
        end = offset + sum(chunk.nbytes for chunk in chunks)
        shape = [sum(part.shape[0] for part in parts), *parts[0].shape[1:]]
        header[name] = {"dtype": _DTYPE_CODES[parts[0].dtype], "shape": shape, "data_offsets": [offset, end]}
        data += chunks
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *data]
