"""Which bytes of a text each token stands for, for any fast tokenizer.

Offsets of a fast tokenizer count characters of the original text, also behind a normalizer. They are not enough:
tokens that split one character all carry the whole character, and ``trim_offsets`` leaves spaces to nobody. The rules:

1. Where the tokens, read as byte-level text or as plain text with ``<0xE4>`` bytes and ``▁`` for a space, spell the
   whole text (a space added in front aside), their lengths are the spans: exact to the byte, whitespace included.
2. Otherwise (a normalizer changed something, whitespace was dropped, an unknown token) the tokenizer's offsets are
   taken. Tokens that share characters are told apart by rule 1 on those characters alone; where that fails too, each
   but the last ends strictly inside what they share, one byte further each while bytes last, and is empty after that.
3. Whitespace that no token covers goes to the token after it, as in byte-level vocabularies, so no token's end moves.
   Whitespace after the last token and other dropped characters belong to no token: ``EncodedText.uncovered_bytes``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvgraft.errors import AlignmentError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = NDArray[np.int32]

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class EncodedText:
    """A tokenized text and the bytes of it that each token stands for.

    Attributes:
        input_ids: token ids, special tokens included.
        spans: int32 ``[tokens, 2]``, half-open ranges of the text's UTF-8 bytes, in order and disjoint. Empty
            (start == end) where a token stands for no byte: BOS, EOS, a prefix space that the text does not have.
        truncated_bytes: bytes at the end of the text that were cut off by ``max_length``.
        text_bytes: length of the whole text in UTF-8 bytes.
        sample_key: sha256 of the text's UTF-8 bytes, the key under which a store holds it.
    """

    input_ids: list[int]
    spans: Spans
    truncated_bytes: int
    text_bytes: int
    sample_key: str

    @property
    def uncovered_bytes(self) -> int:
        """Bytes in the kept part of the text that belong to no token; covered + uncovered + truncated = all."""
        covered = int((self.spans[:, 1] - self.spans[:, 0]).sum())
        return self.text_bytes - self.truncated_bytes - covered


def sample_key(text: str) -> str:
    """The name of a text, by content: sha256 of its UTF-8 bytes, 64 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def encode_with_spans(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    max_length: int | None = None,
    *,
    add_special_tokens: bool = True,
) -> EncodedText:
    """Token ids of ``text`` and the UTF-8 byte span of each.

    Args:
        tokenizer: a fast tokenizer of transformers.
        text: not empty.
        max_length: most tokens to keep, special tokens included. Text tokens are dropped from the right until it
            fits; special tokens stay. Default: keep all.
        add_special_tokens: whether the tokenizer adds its BOS, EOS and the like. Special tokens written in the text
            itself are text, with a span.

    Raises:
        AlignmentError: the tokenizer gives no offsets, or ``max_length`` leaves no room for text.
        DataError: the text is empty, cannot be encoded as UTF-8, or gives no token.
    """
    name = _tokenizer_name(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise AlignmentError(
            f"tokenizer {name} gives no offsets, so its tokens cannot be aligned with another tokenizer's. Use its "
            "fast version: one with a tokenizer.json, loaded by transformers.AutoTokenizer."
        )
    text_utf8 = _utf8(text)
    # Cut by hand below: spans of the whole text decide what is cut, and BOS and EOS stay on either truncation side.
    encoded = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    input_ids: list[int] = encoded["input_ids"]
    is_text = np.logical_not(np.asarray(encoded["special_tokens_mask"], dtype=bool))
    if not is_text.any():
        raise DataError(f"tokenizer {name} gives no token for the text {text[:40]!r}; leave this text out")
    characters = np.asarray(encoded["offset_mapping"], dtype=np.int64)[is_text]
    tokens = [token for token, keep in zip(encoded.tokens(), is_text, strict=True) if keep]
    spans = _text_spans(tokens, characters, text, text_utf8)

    kept = _kept_tokens(is_text, max_length, name)
    spans = spans[: int(is_text[kept].sum())]
    return EncodedText(
        input_ids=[input_ids[index] for index in kept],
        spans=_with_special_tokens(spans, is_text[kept]),
        truncated_bytes=len(text_utf8) - int(spans[-1, 1]) if len(kept) < len(input_ids) else 0,
        text_bytes=len(text_utf8),
        sample_key=sample_key(text),
    )


def _tokenizer_name(tokenizer: object) -> str:
    name = getattr(tokenizer, "name_or_path", "")
    return f"{name!r} ({type(tokenizer).__name__})" if name else type(tokenizer).__name__


def _utf8(text: str) -> bytes:
    if not text:
        raise DataError("the text is empty; leave this sample out")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds half of a surrogate pair at character {error.start} and is not valid Unicode; "
            "read the file as UTF-8 or replace that character"
        ) from error


def _kept_tokens(is_text: NDArray[np.bool_], max_length: int | None, name: str) -> NDArray[np.int64]:
    """Indices of the tokens that fit into ``max_length``: all special tokens and the first text tokens."""
    excess = 0 if max_length is None else max(0, len(is_text) - max_length)
    text_tokens = np.flatnonzero(is_text)
    if excess >= len(text_tokens):
        raise AlignmentError(
            f"max_length {max_length} leaves no room for text: tokenizer {name} adds "
            f"{len(is_text) - len(text_tokens)} special tokens; give at least one more than that"
        )
    return np.delete(np.arange(len(is_text)), text_tokens[len(text_tokens) - excess :])


def _with_special_tokens(spans: NDArray[np.int64], is_text: NDArray[np.bool_]) -> Spans:
    """Spans of all tokens: a special token is empty, at the end of the text token before it."""
    ends = np.concatenate([[0], spans[:, 1]])[np.cumsum(is_text)]
    complete = np.stack([ends, ends], axis=1)
    complete[is_text] = spans
    return complete.astype(np.int32)


def _text_spans(tokens: Sequence[str], characters: NDArray[np.int64], text: str, text_utf8: bytes) -> NDArray[np.int64]:
    """Byte spans ``[tokens, 2]`` of the text tokens, in order and disjoint; the module's docstring gives the rules."""
    spelled = _spelled_ends(tokens, text_utf8)
    if spelled is not None:
        return np.stack([np.concatenate([[0], spelled[:-1]]), spelled], axis=1)

    first_bytes = _first_bytes(text)
    # Normalizers that reorder combining marks may give offsets that step back.
    starts = first_bytes[np.maximum.accumulate(characters[:, 0])]
    ends = first_bytes[np.maximum.accumulate(characters[:, 1])]
    _separate_shared(tokens, starts, ends, text_utf8)
    _attach_whitespace(starts, ends, text_utf8)
    return np.stack([starts, ends], axis=1)


def _first_bytes(text: str) -> NDArray[np.int64]:
    """Byte at which each character starts, then the length of the text: ``[characters + 1]``."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])


def _spelled_ends(tokens: Sequence[str], expected: bytes) -> NDArray[np.int64] | None:
    """End of each token in ``expected``, or None where no reading of the tokens spells exactly these bytes.

    The readings need not know the kind of tokenizer: where two of them spell the same bytes they agree token by token.
    """
    readings: tuple[Callable[[str], bytes | None], ...] = (_read_byte_level, _read_plain)
    for reading in readings:
        pieces = [piece for token in tokens if (piece := reading(token)) is not None]
        if len(pieces) < len(tokens):
            continue
        spelled = b"".join(pieces)
        added = int(spelled == b" " + expected)
        if added or spelled == expected:
            # A space added in front stands for no byte: it shortens the first token.
            ends: NDArray[np.int64] = np.cumsum([len(piece) for piece in pieces]) - added
            return ends.clip(min=0)
    return _spelled_one_by_one(tokens, expected)


def _spelled_one_by_one(tokens: Sequence[str], expected: bytes) -> NDArray[np.int64] | None:
    """As :func:`_spelled_ends`, each token in the reading that fits: added tokens stand among byte-level ones.

    A space that a tokenizer adds behind an added token stands for no byte, as one in front of the text.
    """
    ends, end = [], 0
    for token in tokens:
        pieces = [piece for reading in (_read_byte_level, _read_plain) if (piece := reading(token)) is not None]
        without_space = [piece[1:] for piece in pieces if piece.startswith(b" ")]
        fitting = next((piece for piece in pieces + without_space if expected.startswith(piece, end)), None)
        if fitting is None:
            return None
        end += len(fitting)
        ends.append(end)
    return np.array(ends, dtype=np.int64) if end == len(expected) else None


def _byte_alphabet() -> dict[str, int]:
    """Byte for each character of GPT-2's byte-level alphabet: printable bytes are themselves, the others follow."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


@lru_cache(maxsize=1 << 18)
def _read_byte_level(token: str) -> bytes | None:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        # Not a byte-level token, or an added one, which is stored as it is written.
        return None


@lru_cache(maxsize=1 << 18)
def _read_plain(token: str) -> bytes:
    byte = _BYTE_FALLBACK.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode("utf-8")


def _separate_shared(
    tokens: Sequence[str], starts: NDArray[np.int64], ends: NDArray[np.int64], text_utf8: bytes
) -> None:
    """Make overlapping spans disjoint, in place: exactly where the tokens tell, else inside what they share."""
    shares_with_next = starts[1:] < ends[:-1]
    edges = np.diff(np.concatenate([[False], shares_with_next, [False]]).astype(np.int8))
    for first, last in zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True):
        start, end = int(starts[first]), int(ends[last])
        spelled = _spelled_ends(tokens[first : last + 1], text_utf8[start:end])
        if spelled is not None:
            ends[first : last + 1] = start + spelled
        else:
            previous = start
            for index in range(first, last):
                previous = min(max(previous, int(starts[index + 1])) + 1, int(ends[index]) - 1)
                ends[index] = previous
        starts[first + 1 : last + 1] = ends[first:last]


def _attach_whitespace(starts: NDArray[np.int64], ends: NDArray[np.int64], text_utf8: bytes) -> None:
    """Move starts back, in place, over the whitespace directly before them that no token covers."""
    before = np.concatenate([[0], ends[:-1]])
    for index in np.flatnonzero(starts > before):
        gap = text_utf8[before[index] : starts[index]].decode("utf-8", errors="replace")
        starts[index] -= len(gap[len(gap.rstrip()) :].encode("utf-8"))
