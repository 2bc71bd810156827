"""Texts as token ids and labels, and how many of them fit into one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvgraft.data.chat import earlier_answers, encode_text
from kvgraft.data.datasets import Example
from kvgraft.data.spans import EncodedText, Spans

IGNORED = -100


@dataclass(frozen=True)
class EncodedExample:
    """One text as the student reads it.

    Attributes:
        input_ids: token ids; an end-of-text closes a text that was not cut.
        labels: the same ids, ``-100`` where no loss is taken: the first token, which nothing predicts, and the prompt
            where only completions count.
        spans: int32 ``[tokens, 2]`` byte spans of the text, empty for special tokens.
        truncated_bytes: bytes cut off at the end.
        text_bytes: length of the whole text in bytes.
        sample_key: sha256 of the text, under which a store holds its KV.
    """

    input_ids: list[int]
    labels: list[int]
    spans: Spans
    truncated_bytes: int
    text_bytes: int
    sample_key: str

    @property
    def has_label(self) -> bool:
        """Whether a loss is taken of any of its tokens; nothing predicts the first."""
        return any(label != IGNORED for label in self.labels[1:])

    @property
    def predicted_bytes(self) -> int:
        """Bytes of the text whose tokens carry a label."""
        labelled = np.array(self.labels) != IGNORED
        return int((self.spans[labelled, 1] - self.spans[labelled, 0]).sum())


def encode_example(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    loss_on: Literal["all", "completion"] = "all",
) -> EncodedExample:
    """``example`` in at most ``max_length`` tokens, its end-of-text among them.

    The completion of a conversation is every turn of the assistant, and the token that ends it; of one that was given
    as a prompt and a completion, the last.

    Raises:
        DataError, AlignmentError: as :func:`kvgraft.data.spans.encode_with_spans`.
    """
    # A chat template says itself how a text ends.
    own_end = bool(example.turns)
    encoded = encode_text(example, tokenizer, max_length if own_end else max_length - 1)
    input_ids, spans = list(encoded.input_ids), encoded.spans
    end_of_text = None if own_end else tokenizer.eos_token_id
    has_end = input_ids[-1] == end_of_text
    if end_of_text is not None and not encoded.truncated_bytes and not has_end:
        input_ids.append(end_of_text)
        spans = np.concatenate([spans, np.full((1, 2), spans[-1, 1], dtype=np.int32)])
    elif not own_end and encoded.truncated_bytes and spans[-1, 0] == spans[-1, 1]:
        # A tokenizer that adds it itself, or a separator, does so wherever the text was cut: learned as an end.
        input_ids, spans = input_ids[:-1], spans[:-1]
    labels = list(input_ids)
    labels[0] = IGNORED
    if loss_on == "completion" and example.turns:
        labels = [
            label if said else IGNORED for label, said in zip(labels, _said_by_assistant(example, spans), strict=True)
        ]
    elif loss_on == "completion":
        completed = _in_completion(example, spans, tokenizer)
        labels = [label if counts else IGNORED for label, counts in zip(labels, completed, strict=True)]
    return EncodedExample(input_ids, labels, spans, encoded.truncated_bytes, encoded.text_bytes, encoded.sample_key)


def _in_completion(example: Example, spans: Spans, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """bool ``[tokens]``: the tokens of the completion, and those of earlier answers, each with the one that ends it."""
    completed: NDArray[np.bool_] = spans[:, 0] >= len(example.text[: example.prompt_characters].encode())
    text = spans[:, 1] > spans[:, 0]
    for first, last in earlier_answers(example, tokenizer):
        completed |= text & (spans[:, 1] > first) & (spans[:, 0] <= last)
    return completed


def _said_by_assistant(example: Example, spans: Spans) -> NDArray[np.bool_]:
    """bool ``[tokens]``: the tokens of the assistant's turns, each with the token after it, which ends the turn.

    Of an example without ``messages`` only the completion.
    """
    said = np.zeros(len(spans), dtype=bool)
    text = spans[:, 1] > spans[:, 0]
    for turn, (first, last) in zip(example.turns, example.contents, strict=True):
        if turn.role == "assistant" and (example.messages or first >= example.prompt_characters):
            start, end = (len(example.text[:edge].encode()) for edge in (first, last))
            said |= text & (spans[:, 0] >= start) & (spans[:, 1] <= end)
    ends = np.flatnonzero(said[:-1] & ~text[1:]) + 1
    said[ends] = True
    return said


def pad_texts(texts: Sequence[EncodedText]) -> tuple[Tensor, Tensor]:
    """Token ids of ``texts``, padded on the right with 0, and their mask: both ``[texts, longest]`` int64."""
    lengths = [len(text.input_ids) for text in texts]
    input_ids = torch.zeros(len(texts), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, text in enumerate(texts):
        input_ids[row, : lengths[row]] = torch.tensor(text.input_ids)
        mask[row, : lengths[row]] = 1
    return input_ids, mask


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in groups of ``batch_size``, the longest first: the least padding that so many at a time can have."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def length_buckets(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices grouped so that each group, padded to its longest, takes at most ``token_budget`` tokens.

    Groups hold texts of like length, longest first, so that a pass that does not fit fails at once. A text longer than
    the budget is alone.
    """
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        # The first of a group is its longest.
        if not buckets or (len(buckets[-1]) + 1) * lengths[buckets[-1][0]] > token_budget:
            buckets.append([])
        buckets[-1].append(index)
    return buckets
