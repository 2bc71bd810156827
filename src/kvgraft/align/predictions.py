"""Where two models predict the same thing: the places of a text at which their next-token distributions compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizerBase

from kvgraft.errors import AlignmentError

Index = NDArray[np.int64]


@dataclass(frozen=True)
class PredictionPairs:
    """Token ``student[i]`` and token ``teacher[i]`` end at the same place of the text: what follows is the same.

    Both int64 ``[pairs]``, rising.
    """

    student: Index
    teacher: Index

    def chunks(self, tokens: int, side: Index) -> Index:
        """Chunk of each of ``tokens`` tokens of one side: int64 ``[tokens]``, -1 outside.

        Chunk ``i`` is what lies behind pair ``i`` up to pair ``i + 1`` with it, so there are ``pairs - 1`` of them.
        Text before the first pair, which has nothing in front of it, belongs to none.
        """
        chunk = np.searchsorted(side, np.arange(tokens), side="left") - 1
        chunk[chunk >= len(side) - 1] = -1
        return chunk


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token ids that a tokenizer can give: one past its highest. A model's embedding matrix may be larger."""
    return max(tokenizer.get_vocab().values()) + 1


def share_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether both tokenizers give every token the same id.

    The sizes of the models' embedding matrices are not looked at: a matrix that is larger is padded, not another
    vocabulary.
    """
    return bool(student.get_vocab() == teacher.get_vocab())


def same_tokens(student_ids: Sequence[int], teacher_ids: Sequence[int]) -> PredictionPairs:
    """Pairs where both models have read the same token ids from the start of the text on.

    The student may read on where the teacher's text was cut, or close it with an end-of-text of its own.

    Raises:
        AlignmentError: not even the first token is the same.
    """
    length = min(len(student_ids), len(teacher_ids))
    differs = np.flatnonzero(np.not_equal(student_ids[:length], teacher_ids[:length]))
    common = int(differs[0]) if len(differs) else length
    if common == 0:
        raise AlignmentError(
            f"one tokenizer gave the student's text the tokens {list(student_ids[:5])} ... and the teacher's "
            f"{list(teacher_ids[:5])} ...; read the text with the same special tokens on both sides"
        )
    return PredictionPairs(np.arange(common), np.arange(common))


def shared_boundaries(student_spans: ArrayLike, teacher_spans: ArrayLike) -> PredictionPairs:
    """Pairs where a token of each side ends at the same byte.

    Args:
        student_spans, teacher_spans: ``[tokens, 2]`` byte spans, as ``encode_with_spans`` gives them. Tokens that
            stand for no byte are never in a pair.
    """
    ends = []
    for spans in (student_spans, teacher_spans):
        array = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
        text = np.flatnonzero(array[:, 1] > array[:, 0])
        ends.append((array[text, 1], text))
    (student_ends, student_text), (teacher_ends, teacher_text) = ends
    _, one, other = np.intersect1d(student_ends, teacher_ends, assume_unique=True, return_indices=True)
    return PredictionPairs(student_text[one].astype(np.int64), teacher_text[other].astype(np.int64))
