"""Fill a logit store: run the teacher once over every text that the store does not hold yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgraft.data.spans import EncodedText
from kvgraft.models.head import Head, head_of
from kvgraft.store.fill import Found
from kvgraft.store.format import is_whole
from kvgraft.store.logits import LogitIdentity, LogitManifest, LogitStore, LogitStoreWriter
from kvgraft.store.top_log_probs import pack_top

# Logits are made for so many numbers at a time: 64 MB of them.
_CHUNK_NUMBERS = 1 << 24


@dataclass(frozen=True)
class LogitStoreToFill:
    """A logit store that :func:`~kvgraft.store.fill.fill_stores` makes, continues, or leaves as it is.

    Args:
        folder: the store's.
        identity: what it holds.
        shard_bytes: bytes after which a shard is written to disk.
        verify: compare every shard's checksum where the store says that it is complete.
    """

    folder: Path
    identity: LogitIdentity
    shard_bytes: int
    verify: bool = True
    content: ClassVar[str] = "log-probabilities"
    kv_layers: ClassVar[tuple[int, ...]] = ()
    one_writer: ClassVar[bool] = False

    def is_finished(self) -> bool:
        """Whether the folder holds the complete and sound store, so that the writer has nothing to do."""
        manifest = LogitManifest.read(self.folder)
        if manifest is None or manifest.identity.difference(self.identity):
            return False
        return is_whole(self.folder, manifest, checksum=self.verify)

    def writer(self, folder: Path) -> LogitStoreWriter:
        """Writer of the store, or of a share of it."""
        return LogitStoreWriter(folder, self.identity, self.shard_bytes)

    def add(self, writer: LogitStoreWriter, model: PreTrainedModel, text: EncodedText, found: Found) -> None:
        """Hand what ``model`` says of ``text`` to ``writer``."""
        assert found.hidden is not None
        head = head_of(model).cut(self.identity.vocabulary)
        words, likelihood = log_probs_of_text(found.hidden, head, text.input_ids, self.identity)
        writer.add(text.sample_key, words, likelihood, text.truncated_bytes, text.text_bytes)

    def open(self) -> LogitStore:
        """The store once it is filled: every shard was checked or written then, so that sizes are enough here."""
        return LogitStore.open(self.folder, self.identity, verify=False)


@torch.no_grad()
def log_probs_of_text(
    hidden: Tensor, head: Head, input_ids: Sequence[int], identity: LogitIdentity
) -> tuple[Tensor, Tensor]:
    """Words ``[tokens, top_k]`` and log-likelihoods ``[tokens]`` of one text, from its ``hidden [tokens, width]``."""
    next_ids = torch.tensor([*input_ids[1:], 0], device=hidden.device)
    words, likelihoods = [], []
    step = max(1, _CHUNK_NUMBERS // identity.vocabulary)
    for first in range(0, hidden.shape[0], step):
        logits = head.logits(hidden[first : first + step])
        chosen = logits.gather(-1, next_ids[first : first + step, None])[:, 0]
        likelihoods.append(chosen - logits.logsumexp(-1))
        words.append(pack_top(logits / identity.temperature, identity.top_k))
    # Entry i of what was computed is of token i + 1; the last is of a token that does not exist.
    own = torch.cat(likelihoods).roll(1)
    own[0] = 0.0
    return torch.cat(words).cpu(), own.cpu()
