"""One shard file of a KV store, written while its samples come."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvgraft.store.atomic_file import AtomicFile
from kvgraft.store.checksum import Checksum
from kvgraft.store.format import SampleEntry, ShardEntry, StoreIdentity
from kvgraft.store.moments import Moments

_DTYPE_CODES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
}
# More than the header of a shard takes, whatever it holds.
_HEADER_BYTES = 1024
# KV begins with a page.
_PAGE_BYTES = 4096
# Dtype and shape of a tensor.
_Layout = tuple[torch.dtype, list[int]]


@dataclass(frozen=True)
class PendingSample:
    """A checked sample that waits for its shard.

    ``kv`` is ``[layers, 2, tokens, kv_dim]`` in the store's dtype, or float32 while the store has no quantizer yet;
    ``moments`` are those of the tokens that count, ``counted``.
    """

    key: str
    kv: Tensor
    counted: Tensor
    moments: Moments
    spans: Tensor
    truncated_bytes: int
    text_bytes: int

    @property
    def tokens(self) -> int:
        """How many tokens the text has."""
        return self.kv.shape[2]


class GrowingShard:
    """A shard on its way to the disk, to which samples are added until :meth:`finish` gives it its name.

    KV goes to the disk as it comes, behind room for what depends on all samples and is written last: the file's header
    and the moments. What is small for each sample follows the KV. Done by hand, because the safetensors library takes
    whole tensors only.

    Args:
        path: the file.
        identity: what the store holds.
        shard_bytes: KV bytes that it will hold, about.

    Raises:
        StoreError: the disk is full, here and in every method that writes.
    """

    def __init__(self, path: Path, identity: StoreIdentity, shard_bytes: int) -> None:
        self.name = path.name
        self.samples: dict[str, SampleEntry] = {}
        self.tokens = 0
        self.kv_bytes = 0
        self._dtype = identity.torch_dtype
        self._spans: list[Tensor] = []
        self._moments = Moments.empty(identity.geometry)
        small_bytes = sum(tensor.nbytes for tensor in self._small().values())
        self._head_bytes = math.ceil((_HEADER_BYTES + small_bytes) / _PAGE_BYTES) * _PAGE_BYTES
        self._checksum = Checksum()
        self._file = AtomicFile(path, self._head_bytes + shard_bytes)
        self._file.seek(self._head_bytes)

    def place(self, sample: PendingSample) -> None:
        """Give ``sample`` its place, behind those before."""
        self.samples[sample.key] = SampleEntry(
            shard=self.name,
            first_token=self.tokens,
            tokens=sample.tokens,
            truncated_bytes=sample.truncated_bytes,
            text_bytes=sample.text_bytes,
        )
        self.tokens += sample.tokens
        self.kv_bytes += sample.kv.nbytes

    def write(self, sample: PendingSample) -> None:
        """Write a sample; they come in the order of their places."""
        self._append(_bytes_of(sample.kv))
        self._spans.append(sample.spans)
        self._moments = self._moments.merge(sample.moments)

    def sync(self) -> None:
        """Bring to the disk what was written by now; another thread may go on writing meanwhile."""
        self._file.sync()

    def finish(self) -> ShardEntry:
        """Write what is left, and give the file its name, once it is safe on disk."""
        # As many rows as tokens, whatever they hold: see kvgraft.store.format.
        rows = [self.tokens, self.kv_bytes // self.tokens // self._dtype.itemsize]
        # Numbers have to lie on whole multiples of their own size.
        filler = torch.zeros(-self.kv_bytes % 8, dtype=torch.uint8)
        spans = torch.cat(self._spans)
        self._append(_bytes_of(filler))
        self._append(_bytes_of(spans))
        self._write_head({"kv": (self._dtype, rows), "filler": _layout(filler), "spans": _layout(spans)})
        self._file.commit()
        return ShardEntry(
            checksum=self._checksum.text(),
            bytes=self._head_bytes + self.kv_bytes + filler.nbytes + spans.nbytes,
            tokens=self.tokens,
            samples=len(self.samples),
            head_bytes=self._head_bytes,
        )

    def discard(self) -> None:
        """Remove the file, unless it has its name."""
        self._file.discard()

    def _append(self, chunk: memoryview) -> None:
        self._file.write(chunk)
        self._checksum.update(chunk)

    def _write_head(self, behind: dict[str, _Layout]) -> None:
        small = self._small()
        header = _header({**{name: _layout(tensor) for name, tensor in small.items()}, **behind})
        length = self._head_bytes - sum(tensor.nbytes for tensor in small.values())
        self._file.seek(0)
        for chunk in [memoryview(_padded(header, length)), *map(_bytes_of, small.values())]:
            self._append(chunk)

    def _small(self) -> dict[str, Tensor]:
        moments = self._moments
        return {"count": torch.tensor([moments.count]), "mean": moments.mean, "m2": moments.m2}


def _header(tensors: dict[str, _Layout]) -> bytes:
    """The header of a safetensors file that holds ``tensors``, one behind the other."""
    entries, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _DTYPE_CODES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return json.dumps(entries, separators=(",", ":")).encode()


def _padded(header: bytes, length: int) -> bytes:
    """``header`` as the first ``length`` bytes of a file: its own length first, and spaces behind it."""
    return (length - 8).to_bytes(8, "little") + header.ljust(length - 8)


def _layout(tensor: Tensor) -> _Layout:
    return tensor.dtype, list(tensor.shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
