"""What teachers think comes next, on disk: top log-probabilities and each token's own log-likelihood.

A folder beside the KV stores, keyed by the same sample keys, made and resumed in the same way, so that it can be added
to a KV store without touching it. A shard ``logits-00000.safetensors`` has ``words`` ``[tokens, top_k]`` int32
(:mod:`kvgraft.store.top_log_probs`; row ``i`` is the distribution of the token after token ``i``) and
``token_log_likelihood`` ``[tokens]`` float32 (entry ``i`` is of token ``i`` itself, 0 for the first, which nothing
predicts).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from safetensors.torch import save
from torch import Tensor

from kvgraft.errors import StoreError
from kvgraft.kv import all_finite
from kvgraft.store.atomic_file import TEMPORARY_SUFFIX, write_atomically, write_text_atomically
from kvgraft.store.format import MANIFEST_NAME, SampleEntry, ShardEntry, damage, short_key
from kvgraft.store.lock import lock_folder, unlock_folder
from kvgraft.store.open_shards import OpenShards, open_shard
from kvgraft.store.shares import SHARE_PATTERN, next_shard_name, with_shards_of
from kvgraft.store.top_log_probs import WORD_BYTES, unpack_top

logger = logging.getLogger(__name__)

LOGIT_FORMAT_VERSION = 1
_SHARD_PATTERN = "logits-*.safetensors"


@dataclass(frozen=True)
class LogitIdentity:
    """Everything that decides the numbers in a logit store.

    Attributes:
        model, tokenizer, text, max_length, template: as in :class:`kvgraft.store.format.StoreIdentity`.
        vocabulary: tokens that the distributions run over: those of the tokenizer, without padding rows of the head.
        top_k: most likely tokens kept for each token; 0 keeps the log-likelihoods alone.
        temperature: divides the logits before they become log-probabilities; log-likelihoods are always at 1.
        format_version: layout of the folder.
    """

    model: str
    tokenizer: str
    text: str
    max_length: int
    vocabulary: int
    top_k: int
    temperature: float = 1.0
    template: str = ""
    format_version: int = LOGIT_FORMAT_VERSION

    def hash(self) -> str:
        """16 hexadecimal digits that name this identity's folder."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def difference(self, other: LogitIdentity) -> list[str]:
        """One sentence for each field in which ``self`` (the store) and ``other`` (this run) differ."""
        pairs = ((part.name, getattr(self, part.name), getattr(other, part.name)) for part in fields(self))
        return [
            f"{name}: the store holds {held}, this run needs {needed}" for name, held, needed in pairs if held != needed
        ]


class LogitManifest(BaseModel):
    """Contents of ``manifest.json``; ``complete`` once nothing is left to add."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: LogitIdentity
    complete: bool = False
    shards: dict[Annotated[str, StringConstraints(pattern=r"^logits-\d{5,}\.safetensors$")], ShardEntry] = {}
    samples: dict[str, SampleEntry] = {}

    @classmethod
    def read(cls, folder: Path) -> LogitManifest | None:
        """The manifest of ``folder``, or None where there is none.

        Raises:
            StoreError: the file is not one, or of another format version.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            return None
        try:
            found = cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise StoreError(
                f"{path} is not the manifest of a logit store ({error.errors()[0]['msg']}). Delete the folder {folder} "
                "and run the cache command again to rebuild it."
            ) from error
        if found.identity.format_version != LOGIT_FORMAT_VERSION:
            raise StoreError(
                f"the logit store in {folder} has format version {found.identity.format_version}; this kvgraft reads "
                f"{LOGIT_FORMAT_VERSION}. Delete the folder and run the cache command again to rebuild it."
            )
        return found

    def write(self, folder: Path) -> None:
        """Replace the manifest of ``folder`` in one step."""
        write_text_atomically(folder / MANIFEST_NAME, self.model_dump_json(indent=1))


@dataclass(frozen=True)
class StoredLogits:
    """One text: ids int64 and log-probabilities ``[tokens, top_k]`` of the next token, the rest's ``[tokens]``.

    ``token_log_likelihood`` ``[tokens]`` is each token's own; all are float32 on the CPU.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor
    token_log_likelihood: Tensor


@dataclass(frozen=True)
class LogitStore:
    """A complete logit store, opened for reading with :meth:`open`."""

    folder: Path
    manifest: LogitManifest
    _handles: OpenShards = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path, expected: LogitIdentity | None = None, *, verify: bool = True) -> LogitStore:
        """Open the store in ``folder``.

        Raises:
            StoreError: there is none, it is incomplete or damaged, or it holds something else than ``expected``.
        """
        manifest = LogitManifest.read(folder)
        if manifest is None or not manifest.complete:
            state = "there is no logit store" if manifest is None else "the logit store is incomplete"
            raise StoreError(
                f"{state} in {folder}. Run the cache command with an arm that needs it (logits, kv_logits): the "
                "teacher reads the text once more and the KV store stays as it is."
            )
        if expected is not None and (difference := manifest.identity.difference(expected)):
            raise StoreError(f"the logit store in {folder} was made from something else. {'; '.join(difference)}.")
        for name, shard in manifest.shards.items():
            if reason := damage(folder, name, shard, checksum=verify):
                raise StoreError(
                    f"shard {name} of the logit store in {folder} {reason}. Delete it and run the cache command again: "
                    f"only its {shard.samples} samples are redone."
                )
        return cls(folder, manifest)

    @property
    def identity(self) -> LogitIdentity:
        """What the store holds."""
        return self.manifest.identity

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
        """Bytes of all shard files."""
        return sum(shard.bytes for shard in self.manifest.shards.values())

    @property
    def distribution_bytes_per_token(self) -> int:
        """Bytes of a token's distribution: its top log-probabilities and the rest."""
        return WORD_BYTES * self.identity.top_k

    def read(self, key: str) -> StoredLogits:
        """One text.

        Raises:
            StoreError: the store has no such sample.
        """
        ids, log_probs, rest = unpack_top(self.words(key), self.identity.vocabulary)
        return StoredLogits(ids, log_probs, rest, self.token_log_likelihood(key))

    def words(self, key: str) -> Tensor:
        """The distributions of one text as they are packed: int32 ``[tokens, top_k]``."""
        return self._rows(key, "words")

    def token_log_likelihood(self, key: str) -> Tensor:
        """Each token's own log-likelihood ``[tokens]`` float32; 0 for the first, which nothing predicts."""
        return self._rows(key, "token_log_likelihood")

    def _rows(self, key: str, name: str) -> Tensor:
        entry = self.manifest.samples.get(key)
        if entry is None:
            raise StoreError(
                f"sample {short_key(key)} is not in the logit store in {self.folder}, which holds {len(self)} samples. "
                "Run the cache command over the text that this run uses."
            )
        rows = open_shard(self._handles, self.folder, entry.shard).get_tensor(name)
        return rows[entry.first_token : entry.first_token + entry.tokens].clone()


@dataclass(frozen=True)
class _Pending:
    words: Tensor
    token_log_likelihood: Tensor
    truncated_bytes: int
    text_bytes: int


class LogitStoreWriter:
    """The one writer of a logit store's folder; use it in a ``with`` block, which holds the folder's lock.

    As :class:`kvgraft.store.writer.KVStoreWriter`: an existing folder is continued, damaged shards are done again, what
    several processes left is taken over, and only :meth:`finish` marks the store complete.
    """

    def __init__(self, folder: Path, identity: LogitIdentity, shard_bytes: int) -> None:
        self.folder, self.identity, self._shard_bytes = folder, identity, shard_bytes
        self._pending: dict[str, _Pending] = {}
        self._pending_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = lock_folder(folder)
        try:
            self._manifest = self._recover()
            self.adopt_shares()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LogitStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._flush()
        except (StoreError, OSError) as second:
            if error is None:
                raise
            logger.warning("could not save the last samples of %s after %s: %s", self.folder, repr(error), second)
        finally:
            self.close()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that were not added yet, in their order, each once."""
        held = {*self._manifest.samples, *self._pending}
        return [key for key in dict.fromkeys(keys) if key not in held]

    def add(self, key: str, words: Tensor, token_log_likelihood: Tensor, truncated_bytes: int, text_bytes: int) -> None:
        """Add one text of which nothing is there yet: ``words [tokens, top_k]``, log-likelihoods ``[tokens]``.

        Raises:
            StoreError: shapes that do not fit the store, or numbers that are not finite.
        """
        tokens = token_log_likelihood.shape[0]
        if words.shape != (tokens, self.identity.top_k) or words.dtype != torch.int32 or tokens == 0:
            raise StoreError(
                f"sample {short_key(key)} must have int32 words [{tokens}, {self.identity.top_k}]; got "
                f"{list(words.shape)} of {words.dtype}"
            )
        if not all_finite(token_log_likelihood):
            raise StoreError(
                f"sample {short_key(key)} has log-likelihoods that are NaN or Inf. Run the teacher in float32 or "
                "bfloat16, or leave this text out."
            )
        sample = _Pending(words, token_log_likelihood.float(), truncated_bytes, text_bytes)
        self._pending[key] = sample
        self._pending_bytes += sample.words.nbytes + sample.token_log_likelihood.nbytes
        if self._pending_bytes >= self._shard_bytes:
            self._flush()

    def adopt_shares(self) -> None:
        """Move the shards of every share into this store, and remove the shares' folders."""
        for share in sorted(self.folder.glob(SHARE_PATTERN)):
            with LogitStoreWriter(share, self.identity, self._shard_bytes) as other:
                self._manifest = with_shards_of(self._manifest, self.folder, other._manifest, share, _SHARD_PATTERN)
                self._manifest.write(self.folder)
                shutil.rmtree(share)

    def finish(self) -> None:
        """Write what is left and mark the store complete."""
        self._flush()
        self._manifest = self._manifest.model_copy(update={"complete": True})
        self._manifest.write(self.folder)

    def close(self) -> None:
        """Give the folder's lock back without writing anything."""
        if self._lock is not None:
            unlock_folder(self._lock)
            self._lock = None

    def _flush(self) -> None:
        if not self._pending:
            return
        pending, self._pending, self._pending_bytes = self._pending, {}, 0
        samples = list(pending.values())
        name = next_shard_name(self._manifest.shards, _SHARD_PATTERN)
        tensors = {
            "words": torch.cat([sample.words for sample in samples]),
            "token_log_likelihood": torch.cat([sample.token_log_likelihood for sample in samples]),
        }
        content = save(tensors)
        tokens = tensors["token_log_likelihood"].shape[0]
        digest = write_atomically(self.folder / name, [memoryview(content)])
        shard = ShardEntry(checksum=digest, bytes=len(content), tokens=tokens, samples=len(samples))
        entries, first = dict(self._manifest.samples), 0
        for key, sample in pending.items():
            rows = sample.token_log_likelihood.shape[0]
            entries[key] = SampleEntry(
                shard=name,
                first_token=first,
                tokens=rows,
                truncated_bytes=sample.truncated_bytes,
                text_bytes=sample.text_bytes,
            )
            first += rows
        shards = {**self._manifest.shards, name: shard}
        manifest = LogitManifest(identity=self.identity, shards=shards, samples=entries)
        manifest.write(self.folder)
        self._manifest = manifest

    def _recover(self) -> LogitManifest:
        """The manifest of what is usable in the folder, which then holds no other shard or temporary file."""
        manifest = LogitManifest.read(self.folder)
        if manifest is not None and (difference := manifest.identity.difference(self.identity)):
            raise StoreError(
                f"the logit store in {self.folder} was made from something else. {'; '.join(difference)}. "
                "Choose another folder, or delete this one."
            )
        found = manifest or LogitManifest(identity=self.identity)
        bad = {name for name, shard in found.shards.items() if damage(self.folder, name, shard)}
        if bad:
            logger.warning("shards %s of %s are damaged; their samples will be done again", sorted(bad), self.folder)
        kept = LogitManifest(
            identity=self.identity,
            complete=found.complete and not bad,
            shards={name: shard for name, shard in found.shards.items() if name not in bad},
            samples={key: sample for key, sample in found.samples.items() if sample.shard not in bad},
        )
        if bad or manifest is None:
            kept.write(self.folder)
        leftovers = [path for path in self.folder.glob(_SHARD_PATTERN) if path.name not in kept.shards]
        for path in [*leftovers, *self.folder.glob(f"*{TEMPORARY_SUFFIX}")]:
            path.unlink(missing_ok=True)
        return kept
