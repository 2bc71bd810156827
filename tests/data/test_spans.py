"""Byte spans of tokens, on small tokenizers of every kind that a pretrained model comes with."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kvgraft.data.spans import EncodedText, encode_with_spans
from kvgraft.errors import AlignmentError, DataError

CORPUS = [
    "Maya has 12 apples and gives 5 of them to Tom. How many apples does Maya have left?",
    "The cost is 3 * 4 = <<3*4=12>>12 dollars.\n#### 12",
    "def add(a, b):\n    return a + b\n\n\ttabs too",
    "你好世界 今天天气很好 😀 🎉 and café naïve résumé",
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def _wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _template(tokenizer: Tokenizer, single: str, *tokens: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=single, special_tokens=[(token, tokenizer.token_to_id(token)) for token in tokens]
    )


@lru_cache
def byte_bpe(
    vocab_size: int = 400, prefix_space: bool = False, trim: bool = False, nfc: bool = False, bos: bool = False
) -> PreTrainedTokenizerFast:
    """The byte-level BPE of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    byte_level = processors.ByteLevel(trim_offsets=trim)
    template = _template(tokenizer, "<s> $A", "<s>")
    tokenizer.post_processor = processors.Sequence([byte_level, template]) if bos else byte_level
    return _wrap(tokenizer, bos_token="<s>", eos_token="</s>")


@lru_cache
def unigram(byte_fallback: bool = True) -> PreTrainedTokenizerFast:
    """SentencePiece Unigram behind NFKC, with EOS, as in T5; unknown characters are bytes or ``<unk>``."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS[:3],
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    pieces = sorted(vocab := trained.get_vocab(), key=vocab.__getitem__)
    vocabulary = [(piece, -2.0 - len(pieces) / 100 - rank / 50) for rank, piece in enumerate(pieces)]
    if byte_fallback:
        vocabulary += [(token, -100.0) for token in BYTE_TOKENS]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = _template(tokenizer, "$A </s>", "</s>")
    return _wrap(tokenizer, unk_token="<unk>", eos_token="</s>")


@lru_cache
def llama_bpe() -> PreTrainedTokenizerFast:
    """SentencePiece BPE with byte fallback, a space in front and BOS, as in Llama 2: no pre-tokenizer."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS[:3], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = sorted(vocab := trained.get_vocab(), key=vocab.__getitem__)
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", *BYTE_TOKENS, *learned])}
    merges = [
        (token[:cut], token[cut:])
        for token in learned
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = _template(tokenizer, "<s> $A", "<s>")
    return _wrap(tokenizer, unk_token="<unk>", bos_token="<s>")


@lru_cache
def wordpiece() -> PreTrainedTokenizerFast:
    """BERT: lower case, accents and white space dropped, [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = _template(tokenizer, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    return _wrap(tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def sample_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """One tokenizer of every kind, by name; the same objects on every call."""
    return {
        "byte_bpe": byte_bpe(),
        "byte_bpe_trimmed": byte_bpe(prefix_space=True, trim=True),
        "byte_bpe_nfc_bos": byte_bpe(vocab_size=300, nfc=True, bos=True),
        "unigram": unigram(),
        "unigram_unk": unigram(byte_fallback=False),
        "llama_bpe": llama_bpe(),
        "wordpiece": wordpiece(),
    }


NAMES = list(sample_tokenizers())
SPELLING = ["byte_bpe", "byte_bpe_trimmed", "llama_bpe"]  # no normalizer that changes text: exact to the byte

# Words of the corpus, white space, multi-byte characters, combining marks (in and out of order), compatibility forms,
# text that looks like the tokenizers' own notation, and characters that normalizers drop.
PIECES = [
    "apples", "Maya", "the", "12", "a", "#", "\n", "\n\n", " ", "  ", "\t", "\u00a0", "\u3000", "é", "e\u0301",
    "a\u0323\u0302", "a\u0302\u0323", "\u0301", "你好", "天", "😀", "👩‍👩‍👧", "ﬁ", "½", "\u0391", "İ", "▁", "Ġ",
    "<0x41>", "<s>", "</s>", "[SEP]", "\ufffd", "\u200b", "\x00", "\x07", "각",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8"), max_size=4), max_size=14).map("".join)
nonempty_texts = texts.filter(bool)


def encode_or_none(tokenizer: PreTrainedTokenizerFast, text: str, max_length: int | None = None) -> EncodedText | None:
    """The spans, or None where the tokenizer has no token for the text (white space alone in BERT)."""
    try:
        return encode_with_spans(tokenizer, text, max_length)
    except DataError as error:
        if "gives no token" not in str(error):
            raise
        return None


def special_tokens_mask(tokenizer: PreTrainedTokenizerFast, text: str) -> NDArray[np.bool_]:
    return np.asarray(tokenizer(text, return_special_tokens_mask=True)["special_tokens_mask"], dtype=bool)


def assert_spans_account_for_every_byte(encoded: EncodedText, text: str) -> None:
    size = len(text.encode())
    spans = encoded.spans.astype(int)
    assert encoded.text_bytes == size
    assert encoded.spans.dtype == np.int32
    assert spans.shape == (len(encoded.input_ids), 2)
    assert (spans[:, 0] <= spans[:, 1]).all()
    assert (spans[1:, 0] >= spans[:-1, 1]).all(), "spans overlap or step back"
    kept = size - encoded.truncated_bytes
    assert spans.min() >= 0
    assert spans.max() <= kept
    times_covered = np.zeros(size, dtype=int)
    for start, end in spans:
        times_covered[start:end] += 1
    assert times_covered.max() <= 1
    assert encoded.uncovered_bytes == int((times_covered[:kept] == 0).sum())
    assert int(times_covered.sum()) + encoded.uncovered_bytes + encoded.truncated_bytes == size


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=nonempty_texts)
def test_every_byte_is_covered_once_or_counted(name: str, text: str) -> None:
    encoded = encode_or_none(sample_tokenizers()[name], text)
    if encoded is not None:
        assert_spans_account_for_every_byte(encoded, text)
        assert encoded.truncated_bytes == 0


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(text=nonempty_texts, max_length=st.integers(3, 12))
def test_truncation_keeps_special_tokens_and_counts_what_it_cuts(name: str, text: str, max_length: int) -> None:
    tokenizer = sample_tokenizers()[name]
    whole, cut = encode_or_none(tokenizer, text), encode_or_none(tokenizer, text, max_length)
    if whole is None or cut is None:
        assert whole is cut
        return
    assert_spans_account_for_every_byte(cut, text)
    assert len(cut.input_ids) == min(max_length, len(whole.input_ids))
    added = special_tokens_mask(tokenizer, text)
    is_text = np.flatnonzero(~added)
    kept = np.delete(np.arange(len(added)), is_text[max(0, max_length - int(added.sum())) :])
    assert cut.input_ids == [whole.input_ids[index] for index in kept]
    np.testing.assert_array_equal(cut.spans[~added[kept]], whole.spans[kept][~added[kept]])
    last_text_token = kept[~added[kept]][-1]
    cut_bytes = whole.text_bytes - int(whole.spans[last_text_token, 1])
    assert cut.truncated_bytes == (cut_bytes if len(kept) < len(added) else 0)


@pytest.mark.parametrize("name", SPELLING)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(text=nonempty_texts)
def test_tokens_that_spell_the_text_have_exactly_their_bytes(name: str, text: str) -> None:
    if "▁" in text and name == "llama_bpe":
        text = text.replace("▁", "_")  # this tokenizer cannot tell it from a space
    if "<" in text:
        text = text.replace("<", "(")  # written special and byte tokens are read otherwise
    tokenizer = sample_tokenizers()[name]
    encoded = encode_with_spans(tokenizer, text)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    utf8 = text.encode()
    for position, (token, (start, end)) in enumerate(
        zip(tokenizer.convert_ids_to_tokens(encoded.input_ids), encoded.spans, strict=True)
    ):
        if token == "<s>":
            assert start == end
            continue
        if name == "llama_bpe":
            meant = bytes([int(token[3:5], 16)]) if token in BYTE_TOKENS else token.replace("▁", " ").encode()
        else:
            meant = bytes(byte_of[character] for character in token)
        is_first = position == (name == "llama_bpe")
        assert utf8[start:end] == meant or (is_first and b" " + utf8[start:end] == meant)
    assert encoded.uncovered_bytes == 0


@settings(max_examples=80, deadline=None, derandomize=True)
@given(text=nonempty_texts)
def test_tokens_that_do_not_spell_the_text_end_where_their_characters_end(text: str) -> None:
    tokenizer = wordpiece()
    encoded = encode_or_none(tokenizer, text)
    if encoded is None:
        return
    offsets = np.asarray(tokenizer(text, return_offsets_mapping=True)["offset_mapping"])
    furthest = 0
    for index, (first, last) in enumerate(offsets[1:-1], start=1):
        shares_with_next = index < len(offsets) - 2 and offsets[index + 1][0] < max(last, furthest)
        furthest = max(furthest, last)
        if not shares_with_next:
            assert encoded.spans[index, 1] == len(text[:furthest].encode())
        assert encoded.spans[index, 0] <= max(len(text[:first].encode()), encoded.spans[index - 1, 1])


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_have_empty_spans_and_text_tokens_do_not(name: str) -> None:
    text = "Maya has 12 apples"
    tokenizer = sample_tokenizers()[name]
    encoded = encode_with_spans(tokenizer, text)
    special = special_tokens_mask(tokenizer, text)
    assert special.sum() == {"byte_bpe_nfc_bos": 1, "unigram": 1, "unigram_unk": 1, "llama_bpe": 1, "wordpiece": 2}.get(
        name, 0
    )
    lengths = encoded.spans[:, 1] - encoded.spans[:, 0]
    assert (lengths[special] == 0).all()
    assert int(lengths.sum()) == len(text)
    without = encode_with_spans(tokenizer, text, add_special_tokens=False)
    np.testing.assert_array_equal(without.spans, encoded.spans[~special])


def test_special_token_written_in_the_text_is_text() -> None:
    tokenizer = byte_bpe(vocab_size=300, nfc=True, bos=True)
    encoded = encode_with_spans(tokenizer, "a</s>b")
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 1
    where = encoded.input_ids.index(tokenizer.eos_token_id)
    assert encoded.spans[where].tolist() == [1, 5]
    assert encoded.spans[0].tolist() == [0, 0]


def test_character_split_across_byte_level_tokens_is_split_at_its_bytes() -> None:
    tokenizer = byte_bpe()
    tokens = tokenizer.convert_ids_to_tokens(encode_with_spans(tokenizer, "龘").input_ids)
    assert len(tokens) == 3, "the rare character must be in no merge for this test to mean anything"
    assert encode_with_spans(tokenizer, "龘").spans.tolist() == [[0, 1], [1, 2], [2, 3]]


def test_character_split_across_byte_fallback_tokens_behind_a_normalizer() -> None:
    # NFKC turns the ligature into two letters, so only the emoji's own tokens can be spelled.
    encoded = encode_with_spans(unigram(), "ﬁ😀")
    assert_spans_account_for_every_byte(encoded, "ﬁ😀")
    assert encoded.spans[-5:-1].tolist() == [[3, 4], [4, 5], [5, 6], [6, 7]]
    assert encoded.uncovered_bytes == 0


def test_shared_character_is_split_where_its_tokens_tell() -> None:
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate([*characters, "ðŁ"])}, [("ð", "Ł")]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # The composed é is not what the text says, so the text as a whole is not spelled; the emoji alone is. The
    # tokenizers library counts a composed character as its first one, so the accent's two bytes belong to no token.
    encoded = encode_with_spans(_wrap(tokenizer), "e\u0301😀")
    assert encoded.spans.tolist() == [[0, 0], [0, 1], [3, 5], [5, 6], [6, 7]]
    assert encoded.uncovered_bytes == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a½a", [[0, 1], [1, 2], [2, 2], [2, 3], [3, 4]]),  # 1, a slash and 2 share two bytes
        ("ﬃ", [[0, 1], [1, 2], [2, 3]]),
        ("㎞b", [[0, 1], [1, 3], [3, 4]]),
    ],
)
def test_letters_that_share_a_character_take_a_byte_each_while_bytes_last(text: str, expected: list[list[int]]) -> None:
    vocabulary = {letter: index for index, letter in enumerate(["?", *"abfikm12\u2044"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    encoded = encode_with_spans(_wrap(tokenizer, unk_token="?"), text)
    assert encoded.spans.tolist() == expected


def test_trimmed_offsets_still_give_the_space_to_the_word_after_it() -> None:
    trimmed = encode_with_spans(byte_bpe(prefix_space=True, trim=True), "Maya  has\n12")
    assert trimmed.spans[0, 0] == 0
    assert trimmed.uncovered_bytes == 0


def test_dropped_whitespace_goes_to_the_next_token_and_the_rest_is_uncovered() -> None:
    encoded = encode_with_spans(wordpiece(), "  the\n\tthe  ")
    assert encoded.spans[0].tolist() == [0, 0]
    assert encoded.spans[1, 0] == 0
    text = encoded.spans[1:-1]
    assert text[-1, 1] == 10
    assert encoded.uncovered_bytes == 2


def test_one_token_text() -> None:
    encoded = encode_with_spans(byte_bpe(), "a")
    assert encoded.spans.tolist() == [[0, 1]]
    assert (encoded.truncated_bytes, encoded.uncovered_bytes, encoded.text_bytes) == (0, 0, 1)
    assert encoded.sample_key == hashlib.sha256(b"a").hexdigest()


def test_tokenizer_without_merges_of_its_own_uses_offsets_for_unknown_words() -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), behavior="removed")
    encoded = encode_with_spans(_wrap(tokenizer, unk_token="[UNK]"), "the 你好 the")
    assert encoded.spans.tolist() == [[0, 3], [3, 10], [10, 14]]


def test_empty_text_is_refused() -> None:
    with pytest.raises(DataError, match="text is empty"):
        encode_with_spans(byte_bpe(), "")


def test_text_without_any_token_is_refused() -> None:
    with pytest.raises(DataError, match=r"gives no token for the text '   '"):
        encode_with_spans(wordpiece(), "   ")


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(DataError, match="surrogate pair at character 2"):
        encode_with_spans(byte_bpe(), "ab\ud83d")


def test_slow_tokenizer_is_refused() -> None:
    with pytest.raises(AlignmentError, match="ByT5Tokenizer gives no offsets"):
        encode_with_spans(ByT5Tokenizer(), "text")


@pytest.mark.parametrize("max_length", [-1, 0, 1, 2])
def test_max_length_without_room_for_text_is_refused(max_length: int) -> None:
    with pytest.raises(AlignmentError, match=rf"max_length {max_length} leaves no room.*adds 2 special tokens"):
        encode_with_spans(wordpiece(), "Maya has apples", max_length)


def test_long_text_is_cut_from_the_right_whatever_the_tokenizer_says() -> None:
    tokenizer = byte_bpe(vocab_size=300, nfc=True, bos=True)
    text = "apples and " * 50
    whole = encode_with_spans(tokenizer, text)
    for side in ("left", "right"):
        tokenizer.truncation_side = side
        cut = encode_with_spans(tokenizer, text, 10)
        assert cut.input_ids == whole.input_ids[:10]
        assert cut.truncated_bytes == len(text) - int(whole.spans[9, 1]) > 0
        assert cut.sample_key == whole.sample_key
    tokenizer.truncation_side = "right"
    assert encode_with_spans(tokenizer, text, len(whole.input_ids)).truncated_bytes == 0


@pytest.mark.parametrize(
    ("prefix_space", "text", "expected"),
    [
        # Ġ Ċ 你好: offsets are trimmed, and a space in front is (0, 0) in them.
        (False, " \n你好", [[0, 1], [1, 2], [2, 8]]),
        # 你好 Ġ #: the space behind an added token is the tokenizer's own.
        (True, "你好#", [[0, 6], [6, 6], [6, 7]]),
        (True, "你好\t", [[0, 6], [6, 6], [6, 7]]),
    ],
)
def test_added_tokens_among_byte_level_ones_leave_each_its_bytes(
    prefix_space: bool, text: str, expected: list[list[int]]
) -> None:
    inner = Tokenizer.from_str(byte_bpe(prefix_space=prefix_space, trim=True).backend_tokenizer.to_str())
    inner.add_tokens(["你好"])
    assert encode_with_spans(_wrap(inner), text).spans.tolist() == expected
