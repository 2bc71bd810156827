"""Fill a logit store: run the teacher once over every text that the store does not hold yet."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgraft.data.batching import length_buckets, pad_texts
from kvgraft.data.spans import EncodedText
from kvgraft.models.head import Head, head_of, hidden_states
from kvgraft.progress import progress_bar
from kvgraft.store.fill import FillReport
from kvgraft.store.format import damage
from kvgraft.store.logits import LogitIdentity, LogitManifest, LogitStore, LogitStoreWriter
from kvgraft.store.top_log_probs import pack_top

logger = logging.getLogger(__name__)

# Logits are made for so many numbers at a time: 64 MB of them.
_CHUNK_NUMBERS = 1 << 24


def fill_logit_store(
    folder: Path,
    identity: LogitIdentity,
    teacher: str,
    load_teacher: Callable[[], PreTrainedModel],
    texts: Sequence[EncodedText],
    *,
    shard_bytes: int,
    token_budget: int,
    verify: bool = True,
) -> tuple[LogitStore, FillReport]:
    """The logit store of ``texts`` in ``folder``, made, continued, or opened as it is.

    Arguments and errors are those of :func:`kvgraft.store.fill.fill_store`.
    """
    by_key = {text.sample_key: text for text in texts}
    truncated = sum(bool(text.truncated_bytes) for text in by_key.values())
    if _finished(folder, identity, verify):
        logger.info("log-probabilities of %s are in %s; the teacher is not run", teacher, folder)
        return LogitStore.open(folder, identity, verify=False), FillReport(0, 0.0, truncated)
    with LogitStoreWriter(folder, identity, shard_bytes) as writer:
        missing = [by_key[key] for key in writer.missing(by_key)]
        tokens = sum(len(text.input_ids) for text in missing)
        total = sum(len(text.input_ids) for text in by_key.values())
        model = load_teacher()
        head = head_of(model).cut(identity.vocabulary)
        started = time.perf_counter()
        with progress_bar(f"log-probabilities of {teacher}", total, "tokens", done=total - tokens) as advance:
            for bucket in length_buckets([len(text.input_ids) for text in missing], token_budget):
                batch = [missing[index] for index in bucket]
                for text, hidden in zip(batch, _hidden_by_text(model, batch), strict=True):
                    words, likelihood = log_probs_of_text(hidden, head, text.input_ids, identity)
                    writer.add(text.sample_key, words, likelihood, text.truncated_bytes, text.text_bytes)
                advance(sum(len(text.input_ids) for text in batch))
        writer.finish()
    seconds = time.perf_counter() - started
    return LogitStore.open(folder, identity, verify=False), FillReport(tokens, seconds, truncated)


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


def _hidden_by_text(model: PreTrainedModel, batch: Sequence[EncodedText]) -> list[Tensor]:
    hidden = hidden_states(model, *pad_texts(batch))
    return [hidden[index, : len(text.input_ids)] for index, text in enumerate(batch)]


def _finished(folder: Path, identity: LogitIdentity, verify: bool) -> bool:
    manifest = LogitManifest.read(folder)
    if manifest is None or not manifest.complete or manifest.identity.difference(identity):
        return False
    return not any(damage(folder, name, shard, checksum=verify) for name, shard in manifest.shards.items())
