"""A teacher's log-likelihood of each token, beside its KV: one number a token, added to a store that is there already.

A store's folder holds them in ``likelihoods-<digits>.safetensors``: for each sample key float32 ``[tokens]``, NaN for
the first. The digits are the first of the file's sha256, so that a damaged file is known by its name.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from kvgraft.data.batching import length_buckets, pad_texts
from kvgraft.data.spans import EncodedText
from kvgraft.errors import StoreError
from kvgraft.models.likelihood import token_log_likelihood
from kvgraft.progress import progress_bar
from kvgraft.store.format import short_key, write_atomically

logger = logging.getLogger(__name__)

_PATTERN = "likelihoods-*.safetensors"
_NAME_DIGITS = 16
# Tokens after which what was computed goes to disk, so that a kill costs little.
_TOKENS_PER_FILE = 500_000


@dataclass(frozen=True)
class TokenLikelihoods:
    """The token likelihoods in a store's folder."""

    folder: Path
    numbers: Mapping[str, Tensor]

    @classmethod
    def open(cls, folder: Path) -> TokenLikelihoods:
        """All that ``folder`` holds; none is no error.

        Raises:
            StoreError: a file is damaged.
        """
        numbers: dict[str, Tensor] = {}
        for path in sorted(folder.glob(_PATTERN)):
            if path.name != _file_name(path.read_bytes()):
                raise StoreError(
                    f"{path} is damaged: its checksum is not what its name says. Delete it and run the cache command "
                    "again: only its texts are redone, and the KV beside it stays."
                )
            numbers.update(load_file(path))
        return cls(folder, numbers)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that are not here, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self.numbers]

    def read(self, key: str) -> Tensor:
        """Log-likelihood of each token of one text: float32 ``[tokens]``, NaN for the first.

        Raises:
            StoreError: there is none for this text.
        """
        if key not in self.numbers:
            raise StoreError(
                f"the KV store in {self.folder} has no token likelihoods of sample {short_key(key)}, which "
                "kv_loss.combine: confidence needs. Run `kvgraft cache` with such a recipe: it adds one number per "
                "token and leaves the stored KV as it is."
            )
        return self.numbers[key]


def fill_likelihoods(
    folder: Path,
    teacher: str,
    load_teacher: Callable[[], PreTrainedModel],
    texts: Sequence[EncodedText],
    *,
    token_budget: int,
) -> TokenLikelihoods:
    """The token likelihoods of ``texts`` in the store ``folder``; what is there already is not computed again.

    Args:
        folder: of the store that holds the teacher's KV over these texts.
        teacher: name shown on the bar and in errors.
        load_teacher: called only if some text is missing.
        texts: as the teacher's tokenizer reads them.
        token_budget: most tokens, padding included, in one pass of the teacher.

    Raises:
        StoreError, ModelError: a damaged file, a full disk, a model that gives NaN or logits that are not covered.
    """
    by_key = {text.sample_key: text for text in texts}
    missing = [by_key[key] for key in TokenLikelihoods.open(folder).missing(by_key)]
    if not missing:
        return TokenLikelihoods.open(folder)
    model = load_teacher()
    waiting: dict[str, Tensor] = {}
    total = sum(len(text.input_ids) for text in missing)
    with progress_bar(f"token likelihoods of {teacher}", total, "tokens") as advance:
        for bucket in length_buckets([len(text.input_ids) for text in missing], token_budget):
            batch = [missing[index] for index in bucket]
            waiting.update(_likelihoods_of(model, batch, teacher))
            if sum(len(numbers) for numbers in waiting.values()) >= _TOKENS_PER_FILE:
                _write(folder, waiting)
                waiting = {}
            advance(sum(len(text.input_ids) for text in batch))
    if waiting:
        _write(folder, waiting)
    return TokenLikelihoods.open(folder)


def _likelihoods_of(model: PreTrainedModel, batch: Sequence[EncodedText], teacher: str) -> dict[str, Tensor]:
    input_ids, mask = pad_texts(batch)
    found = token_log_likelihood(model, input_ids, mask).cpu()
    numbers = {}
    for row, text in enumerate(batch):
        numbers[text.sample_key] = found[row, : len(text.input_ids)].clone()
        if not torch.isfinite(numbers[text.sample_key][1:]).all():
            raise StoreError(
                f"teacher {teacher} gives token likelihoods that are not finite for text {short_key(text.sample_key)}; "
                "load it in float32 or bfloat16, or leave this text out"
            )
    return numbers


def _write(folder: Path, numbers: Mapping[str, Tensor]) -> None:
    content = save(dict(numbers))
    write_atomically(folder / _file_name(content), [memoryview(content)])


def _file_name(content: bytes) -> str:
    return _PATTERN.replace("*", hashlib.sha256(content).hexdigest()[:_NAME_DIGITS])
