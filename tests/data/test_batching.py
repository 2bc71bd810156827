"""Texts as token ids, labels and groups of like length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from kvgraft.data.batching import IGNORED, batches_by_length, encode_example, length_buckets
from kvgraft.data.datasets import Example
from kvgraft.data.tokenizers import END_OF_TEXT, train_tokenizer
from kvgraft.errors import DataError

TEXT = "Tom has 3 apples.\nHe has 3 apples 🍎. #### 3"
TOKENIZER = train_tokenizer([TEXT], 280)


def test_tokenizer_writes_any_text_and_is_the_same_each_time() -> None:
    text = "never seen: 漢字 🙂 \t é"
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text
    assert train_tokenizer([TEXT], 280).get_vocab() == TOKENIZER.get_vocab()
    assert 257 < len(TOKENIZER) <= 280
    assert TOKENIZER.eos_token == TOKENIZER.pad_token == END_OF_TEXT


def test_whole_text_ends_with_end_of_text_and_its_first_token_is_not_predicted() -> None:
    encoded = encode_example(Example(TEXT), TOKENIZER, 200)
    assert TOKENIZER.decode(encoded.input_ids[:-1]) == TEXT
    assert encoded.input_ids[-1] == TOKENIZER.eos_token_id
    assert encoded.labels == [IGNORED, *encoded.input_ids[1:]]
    assert encoded.spans[-1].tolist() == [len(TEXT.encode())] * 2
    assert encoded.truncated_bytes == 0


def test_cut_text_has_no_end_of_text_and_counts_what_was_cut() -> None:
    encoded = encode_example(Example(TEXT), TOKENIZER, 8)
    assert len(encoded.input_ids) <= 8
    assert encoded.input_ids[-1] != TOKENIZER.eos_token_id
    assert encoded.truncated_bytes == len(TEXT.encode()) - encoded.spans[-1, 1] > 0


def test_a_tokenizer_that_adds_its_own_end_of_text_ends_no_text_that_was_cut() -> None:
    tokenizer = train_tokenizer([TEXT], 280)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, tokenizer.eos_token_id)]
    )
    assert encode_example(Example(TEXT), tokenizer, 200).input_ids[-1] == tokenizer.eos_token_id
    cut = encode_example(Example(TEXT), tokenizer, 8)
    assert tokenizer.eos_token_id not in cut.input_ids
    assert len(cut.input_ids) == len(cut.labels) == len(cut.spans)
    assert cut.truncated_bytes == len(TEXT.encode()) - cut.spans[-1, 1] > 0


def test_a_tokenizer_that_adds_a_separator_ends_no_text_that_was_cut() -> None:
    backend = train_tokenizer([TEXT], 280).backend_tokenizer
    separator = backend.token_to_id(END_OF_TEXT)
    backend.post_processor = TemplateProcessing(f"$A {END_OF_TEXT}", None, [(END_OF_TEXT, separator)])
    # As BERT's: it has no token for the end of a text.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, sep_token=END_OF_TEXT)
    assert encode_example(Example(TEXT), tokenizer, 200).input_ids[-1] == separator
    cut = encode_example(Example(TEXT), tokenizer, 8)
    assert separator not in cut.input_ids
    assert cut.truncated_bytes == len(TEXT.encode()) - cut.spans[-1, 1] > 0


def test_prompt_is_ignored_where_only_completions_count() -> None:
    prompt = TEXT.index("\n") + 1
    encoded = encode_example(Example(TEXT, prompt), TOKENIZER, 200, "completion")
    counted = [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != IGNORED]
    assert TOKENIZER.decode(counted) == TEXT[prompt:] + END_OF_TEXT


@pytest.mark.parametrize("text", ["a", "é"])
def test_one_token(text: str) -> None:
    encoded = encode_example(Example(text), TOKENIZER, 10)
    assert len(encoded.input_ids) == len(encoded.labels) == len(encoded.spans)
    assert encoded.labels[0] == IGNORED


def test_empty_text_is_refused() -> None:
    with pytest.raises(DataError, match="the text is empty"):
        encode_example(Example(""), TOKENIZER, 10)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_buckets_hold_every_text_once_within_the_budget(lengths: list[int], budget: int) -> None:
    buckets = length_buckets(lengths, budget)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(lengths)))
    for bucket in buckets:
        padded = len(bucket) * max(lengths[index] for index in bucket)
        assert padded <= budget or len(bucket) == 1


def test_batches_of_like_length_hold_every_text_once() -> None:
    lengths = [3, 9, 1, 7, 7, 2, 8]
    batches = batches_by_length(lengths, 3)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert [[lengths[index] for index in batch] for batch in batches] == [[9, 8, 7], [7, 3, 2], [1]]
    assert batches_by_length([], 3) == []
