"""Where two tokenizations predict the same thing."""

import numpy as np
import pytest

from kvgraft.align.predictions import (
    PredictionPairs,
    same_tokens,
    share_vocabulary,
    shared_boundaries,
    vocabulary_size,
)
from kvgraft.data.spans import encode_with_spans
from kvgraft.data.tokenizers import train_tokenizer
from kvgraft.data.word_problems import generate
from kvgraft.errors import AlignmentError

TEXTS = [problem["question"] for problem in generate("train", 20, seed=3)]


def test_pairs_end_at_the_same_byte_and_chunks_cover_the_same_bytes() -> None:
    small, large = train_tokenizer(TEXTS, 300), train_tokenizer(TEXTS, 500)
    for text in TEXTS:
        one, other = encode_with_spans(small, text), encode_with_spans(large, text)
        pairs = shared_boundaries(one.spans, other.spans)
        assert len(pairs.student) > 5
        assert (one.spans[pairs.student, 1] == other.spans[pairs.teacher, 1]).all()
        # All of them: whatever else ends on one side ends inside a token of the other.
        ends = set(one.spans[:, 1].tolist()) & set(other.spans[:, 1].tolist())
        assert len(pairs.student) == len(ends)
        own = pairs.chunks(len(one.input_ids), pairs.student)
        theirs = pairs.chunks(len(other.input_ids), pairs.teacher)
        assert own.max() == theirs.max() == len(pairs.student) - 2
        for chunk in range(len(pairs.student) - 1):
            bytes_of = [side.spans[index == chunk] for side, index in ((one, own), (other, theirs))]
            assert bytes_of[0][0, 0] == bytes_of[1][0, 0]
            assert bytes_of[0][-1, 1] == bytes_of[1][-1, 1]


def test_tokens_without_bytes_are_in_no_pair() -> None:
    pairs = shared_boundaries([[0, 0], [0, 2], [2, 5], [5, 5]], [[0, 1], [1, 2], [2, 2], [2, 4], [4, 5]])
    assert pairs.student.tolist() == [1, 2]
    assert pairs.teacher.tolist() == [1, 4]
    assert pairs.chunks(4, pairs.student).tolist() == [-1, -1, 0, -1]
    assert pairs.chunks(5, pairs.teacher).tolist() == [-1, -1, 0, 0, 0]


def test_no_pair_gives_no_chunk() -> None:
    none = PredictionPairs(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    assert none.chunks(3, none.student).tolist() == [-1, -1, -1]


def test_same_tokens_stop_where_the_two_part() -> None:
    assert same_tokens([5, 6, 7, 0], [5, 6, 7]).student.tolist() == [0, 1, 2]
    assert same_tokens([5, 6, 8], [5, 6, 7, 9]).teacher.tolist() == [0, 1]
    with pytest.raises(AlignmentError, match=r"gave the student's text the tokens \[1\]"):
        same_tokens([1], [2])


def test_one_tokenizer_is_told_from_two() -> None:
    small, large = train_tokenizer(TEXTS, 300), train_tokenizer(TEXTS, 310)
    assert share_vocabulary(small, train_tokenizer(TEXTS, 300))
    assert not share_vocabulary(small, large)
    assert vocabulary_size(small) == len(small)
