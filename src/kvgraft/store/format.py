"""What a KV store is on disk: its identity, its manifest, its shard files and how each is written whole.

A folder holds ``manifest.json`` and shards ``kv-00000.safetensors``. A shard has these tensors:

* ``kv`` ``[tokens, layers * 2 * kv_dim]``: one contiguous run of as many rows as a sample has tokens, which holds
  ``[layers, 2, tokens, kv_dim]``, keys (0) and values (1), so that a layer of a sample is one run as well; in a
  quantised store the last axis is the ``record_bytes`` of :mod:`kvgraft.store.few_bits`. It begins at byte
  ``head_bytes`` of the file, behind a header that is filled up with spaces, the count and the moments; in shards of
  before (``head_bytes`` 0) it comes last;
* ``filler``, up to 7 bytes of zeros, so that what follows lies on whole multiples of its numbers' size;
* ``spans`` ``[tokens, 2]`` int32: the bytes of the text that each token stands for;
* ``count`` ``[1]`` int64, ``mean`` and ``m2`` ``[layers, 2, kv_dim]`` float64: moments of the tokens that count.

A quantised store also has ``quantizer.safetensors``, by which all its shards were written.

Format version 1 held ``kv`` as ``[tokens, layers, 2, kv_dim]``. Its stores are read as they are and not continued.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Protocol

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from kvgraft.errors import StoreError
from kvgraft.kv import KVGeometry
from kvgraft.store.atomic_file import write_text_atomically
from kvgraft.store.checksum import file_has_checksum, has_checksum
from kvgraft.store.few_bits import FEW_BITS_DTYPES, FewBitsQuantizer, quantizer_from_bytes, record_bytes

FORMAT_VERSION = 2
# Newest first. Their stores hold the same numbers in another order.
READABLE_VERSIONS = (FORMAT_VERSION, 1)
MANIFEST_NAME = "manifest.json"
QUANTIZER_NAME = "quantizer.safetensors"
SHARD_PATTERN = "kv-*.safetensors"
STORE_DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    **dict.fromkeys(FEW_BITS_DTYPES, torch.uint8),
}
_FIELD_LABELS = {
    "model": "the teacher",
    "tokenizer": "the tokenizer",
    "text": "the text",
    "template": "the template",
    "layers": "the layers",
    "num_kv_heads": "the number of key/value heads",
    "head_dim": "the head width",
    "dtype": "the dtype",
    "max_length": "the maximum length in tokens",
    "rotated": "whether keys are rotated",
    "format_version": "the format version",
}


@dataclass(frozen=True)
class StoreIdentity:
    """Everything that decides the numbers in a store; two runs share a store only when all of it is equal.

    Attributes:
        model: fingerprint of the teacher's weights or revision.
        tokenizer: fingerprint of the teacher's tokenizer.
        text: fingerprint of the set of sample keys (:func:`text_fingerprint`).
        layers: teacher layers held, in the order of the layer axis; no repeats.
        num_kv_heads: key/value heads of a layer.
        head_dim: width of one head.
        dtype: number format on disk, one of :data:`STORE_DTYPES`.
        max_length: teacher tokens after which a text is cut.
        template: fingerprint or name of the chat template put around each text; empty for none.
        rotated: whether keys carry their rotary rotation; stores made by kvgraft hold keys without it.
        format_version: layout of the folder.

    Raises:
        StoreError: a field holds something no store can have.
    """

    model: str
    tokenizer: str
    text: str
    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    dtype: str
    max_length: int
    template: str = ""
    rotated: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.dtype not in STORE_DTYPES:
            raise StoreError(f"a KV store's dtype is one of {', '.join(STORE_DTYPES)}; got {self.dtype!r}")
        if not self.layers or len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
            raise StoreError(f"a KV store needs distinct layer numbers from 0 up; got {list(self.layers)}")
        for name in ("num_kv_heads", "head_dim", "max_length"):
            if getattr(self, name) < 1:
                raise StoreError(f"{name} of a KV store must be at least 1; got {getattr(self, name)}")
        if self.quantized and self.geometry.kv_dim % 2:
            raise StoreError(
                f"a KV store of {self.dtype} needs an even KV width; got {self.geometry.kv_dim}. Choose another dtype"
            )

    @property
    def geometry(self) -> KVGeometry:
        """Layers, heads and head width of every sample."""
        return KVGeometry(len(self.layers), self.num_kv_heads, self.head_dim)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format on disk as torch names it; bytes where numbers are quantised."""
        return STORE_DTYPES[self.dtype]

    @property
    def quantized(self) -> bool:
        """Whether numbers are kept in a few bits, as :mod:`kvgraft.store.few_bits` does it."""
        return self.dtype in FEW_BITS_DTYPES

    def hash(self) -> str:
        """16 hexadecimal digits that name this identity's folder."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def difference(self, other: StoreIdentity) -> list[str]:
        """One sentence for each field in which ``self`` (the store) and ``other`` (this run) differ.

        Format versions that can be read make no difference.
        """
        sentences = []
        for field in fields(self):
            held, needed = getattr(self, field.name), getattr(other, field.name)
            both_readable = field.name == "format_version" and {held, needed} <= set(READABLE_VERSIONS)
            if held != needed and not both_readable:
                label = _FIELD_LABELS[field.name]
                sentences.append(f"{label}: the store holds {_readable(held)}, this run needs {_readable(needed)}")
        return sentences


class ShardEntry(BaseModel):
    """One shard file as the manifest knows it; ``bytes`` and ``checksum`` are of the whole file.

    The first ``head_bytes`` were written last, and the checksum takes them last. It is ``xxh3_128:`` and hexadecimal
    digits; a manifest of before has a ``sha256`` in its place.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    checksum: str = Field(validation_alias=AliasChoices("checksum", "sha256"))
    bytes: int = Field(ge=1)
    tokens: int = Field(ge=1)
    samples: int = Field(ge=1)
    head_bytes: int = Field(default=0, ge=0)


class SampleEntry(BaseModel):
    """Where one text lies: ``tokens`` rows of ``shard`` from row ``first_token`` on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: str
    first_token: int = Field(ge=0)
    tokens: int = Field(ge=1)
    truncated_bytes: int = Field(ge=0)
    text_bytes: int = Field(ge=0)


# The pattern also keeps a hand-made manifest from naming a file outside its folder.
ShardName = Annotated[str, StringConstraints(pattern=r"^kv-\d{5,}\.safetensors$")]


class Manifest(BaseModel):
    """Contents of ``manifest.json``: shards by file name, samples by key; ``complete`` once nothing is left to add.

    ``quantizer`` is the checksum of ``quantizer.safetensors``, None before there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: StoreIdentity
    complete: bool = False
    quantizer: str | None = None
    shards: dict[ShardName, ShardEntry] = {}
    samples: dict[str, SampleEntry] = {}

    @model_validator(mode="after")
    def _samples_lie_in_shards(self) -> Manifest:
        for key, sample in self.samples.items():
            shard = self.shards.get(sample.shard)
            if shard is None or sample.first_token + sample.tokens > shard.tokens:
                raise ValueError(f"sample {short_key(key)} lies outside shard {sample.shard}")
        return self

    def with_shard(self, name: str, shard: ShardEntry, samples: Mapping[str, SampleEntry]) -> Manifest:
        """This manifest with one more shard and its ``samples``, and so incomplete."""
        shards, held = {**self.shards, name: shard}, {**self.samples, **samples}
        return self.model_copy(update={"complete": False, "shards": shards, "samples": held})

    def without(self, shards: Iterable[str]) -> Manifest:
        """This manifest after losing ``shards`` and their samples, and so incomplete."""
        lost = set(shards)
        return Manifest(
            identity=self.identity,
            complete=self.complete and not lost,
            quantizer=self.quantizer,
            shards={name: shard for name, shard in self.shards.items() if name not in lost},
            samples={key: sample for key, sample in self.samples.items() if sample.shard not in lost},
        )


def stored_bytes_per_token(geometry: KVGeometry, dtype: str) -> int:
    """Bytes that a store of ``dtype`` takes for the KV of one token."""
    if dtype in FEW_BITS_DTYPES:
        return 2 * geometry.num_layers * record_bytes(dtype, geometry.kv_dim)
    return geometry.bytes_per_token(STORE_DTYPES[dtype].itemsize)


def text_fingerprint(keys: Iterable[str]) -> str:
    """Fingerprint of a set of sample keys; order and repeats make no difference."""
    return hashlib.sha256("\n".join(sorted(set(keys))).encode()).hexdigest()


def short_key(key: str) -> str:
    """The first digits of a sample key, enough to find it by."""
    return key[:12]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of ``folder``, or None where there is none.

    Raises:
        StoreError: the file is not a manifest, or one of another format version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    advice = f"Delete the folder {folder} and run the cache command again to rebuild it."
    try:
        content = json.loads(path.read_bytes())
        version = content["identity"]["format_version"]
        if version not in READABLE_VERSIONS:
            raise StoreError(
                f"the KV store in {folder} has format version {version}; this kvgraft reads "
                f"{' and '.join(map(str, READABLE_VERSIONS))}. {advice}"
            )
        return Manifest.model_validate(content)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not the manifest of a KV store ({error}). {advice}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise StoreError(f"{path} is damaged at {place or 'its samples'}: {first['msg']}. {advice}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of ``folder`` in one step; a reader sees the old one or the new one, never a part."""
    write_text_atomically(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1))


def read_quantizer(folder: Path, manifest: Manifest) -> FewBitsQuantizer | None:
    """The quantizer that ``manifest`` names, or None where its file is missing or not the one named."""
    path = folder / QUANTIZER_NAME
    if manifest.quantizer is None or not path.is_file():
        return None
    content = path.read_bytes()
    if not has_checksum([content], manifest.quantizer):
        return None
    return quantizer_from_bytes(manifest.identity.dtype, content)


class ListedShards(Protocol):
    """What the manifests of all kinds of stores say of their shards."""

    @property
    def complete(self) -> bool: ...
    @property
    def shards(self) -> Mapping[str, ShardEntry]: ...


def is_whole(folder: Path, manifest: ListedShards, *, checksum: bool) -> bool:
    """Whether ``manifest`` says that it is complete and :func:`damage` finds nothing in any shard."""
    shards = manifest.shards.items()
    return manifest.complete and not any(damage(folder, name, shard, checksum=checksum) for name, shard in shards)


def damage(folder: Path, name: str, shard: ShardEntry, *, checksum: bool = True) -> str | None:
    """What is wrong with a shard file, in words, or None. Without ``checksum`` only its size is looked at."""
    path = folder / name
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != shard.bytes:
        return f"has {size} bytes where the manifest says {shard.bytes}"
    if checksum and not file_has_checksum(path, shard.checksum, shard.head_bytes):
        return "has another checksum than the manifest says"
    return None


def _readable(value: object) -> str:
    if isinstance(value, tuple):
        return str(list(value))
    return "nothing" if value == "" else str(value)
