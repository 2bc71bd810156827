"""A teacher's log-likelihood of each token, beside its KV: one number a token, also added to a store that is there.

A store's folder holds them in ``likelihoods-<digits>.safetensors``: for each sample key float32 ``[tokens]``, NaN for
the first. The digits are the first of the file's sha256, so that a damaged file is known by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from kvgraft.data.spans import EncodedText
from kvgraft.errors import StoreError
from kvgraft.kv import all_finite
from kvgraft.models.head import Head, head_of
from kvgraft.store.atomic_file import write_atomically
from kvgraft.store.fill import Found
from kvgraft.store.format import short_key

_PATTERN = "likelihoods-*.safetensors"
_NAME_DIGITS = 16
# Tokens after which what was computed goes to disk, so that a kill costs little.
_TOKENS_PER_FILE = 500_000
# Tokens whose logits are held at a time.
_CHUNK_TOKENS = 256


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


@dataclass(frozen=True)
class LikelihoodsToFill:
    """Token likelihoods that :func:`~kvgraft.store.fill.fill_stores` computes where ``folder`` lacks them.

    Args:
        folder: of the store that holds the teacher's KV over the same texts.
    """

    folder: Path
    keys: tuple[str, ...]
    content: ClassVar[str] = "token likelihoods"
    kv_layers: ClassVar[tuple[int, ...]] = ()
    one_writer: ClassVar[bool] = False

    def is_finished(self) -> bool:
        """Whether the folder has those of every text."""
        return not self.open().missing(self.keys)

    def writer(self, folder: Path) -> LikelihoodWriter:
        """Writer into the store's own folder, for a share too: each file is named by its content."""
        return LikelihoodWriter(self.folder)

    def add(self, writer: LikelihoodWriter, model: PreTrainedModel, text: EncodedText, found: Found) -> None:
        """Hand what ``model`` says of ``text`` to ``writer``."""
        assert found.hidden is not None
        writer.add(text.sample_key, likelihoods_of_text(found.hidden, head_of(model), text.input_ids))

    def open(self) -> TokenLikelihoods:
        """All that the folder holds."""
        return TokenLikelihoods.open(self.folder)


class LikelihoodWriter:
    """Adds token likelihoods to the folder of a store; what came before it is left saves what it was given."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: dict[str, Tensor] = {}
        self._waiting_tokens = 0

    def __enter__(self) -> LikelihoodWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._write()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that are not on disk, each once."""
        return TokenLikelihoods.open(self._folder).missing(keys)

    def add(self, key: str, numbers: Tensor) -> None:
        """Keep ``numbers [tokens]`` of one text.

        Raises:
            StoreError: one is not finite, or the disk is full.
        """
        if not all_finite(numbers[1:]):
            raise StoreError(
                f"token likelihoods of text {short_key(key)} are not finite; load the teacher in float32 or bfloat16, "
                "or leave this text out"
            )
        self._waiting[key] = numbers
        self._waiting_tokens += len(numbers)
        if self._waiting_tokens >= _TOKENS_PER_FILE:
            self._write()

    def adopt_shares(self) -> None:
        """Nothing to do: all processes write into one folder."""

    def finish(self) -> None:
        """Write what waits."""
        self._write()

    def _write(self) -> None:
        if self._waiting:
            content = save(self._waiting)
            write_atomically(self._folder / _file_name(content), [memoryview(content)])
            self._waiting, self._waiting_tokens = {}, 0


@torch.no_grad()
def likelihoods_of_text(hidden: Tensor, head: Head, input_ids: Sequence[int]) -> Tensor:
    """Log-likelihoods ``[tokens]`` of one text from its ``hidden [tokens, width]``: on the CPU, NaN for the first."""
    next_ids = torch.tensor(input_ids[1:], device=hidden.device)
    found = head.log_likelihood_in_chunks(hidden[:-1], next_ids, _CHUNK_TOKENS)
    return torch.cat([torch.full((1,), float("nan")), found.cpu()])


def _file_name(content: bytes) -> str:
    return _PATTERN.replace("*", hashlib.sha256(content).hexdigest()[:_NAME_DIGITS])
