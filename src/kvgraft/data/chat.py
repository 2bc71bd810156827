"""Conversations inside a model's own chat template: its tokens, and which of them stand for what was said.

Two models wrap one conversation in different words. They are aligned over its plain form, ``Example.text``; a token
that stands for the template alone has an empty span there, like BOS and EOS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from kvgraft.data.datasets import Example, Turn, as_lines, common_characters
from kvgraft.data.spans import EncodedText, encode_with_spans, sample_key
from kvgraft.errors import DataError

# In place of what was said, to see what a template puts around it: characters that no text uses.
_MARK = "\ue000{}\ue001"


def encode_text(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> EncodedText:
    """``example`` as the model of ``tokenizer`` reads it, in its own chat template where the example has turns.

    Spans are bytes of ``example.text``. A token that stands for words of the template and of a turn has those of the
    turn.

    Raises:
        DataError: the tokenizer has no template, or one that refuses the turns or changes their text.
        AlignmentError: as :func:`kvgraft.data.spans.encode_with_spans`.
    """
    if not example.turns:
        return encode_with_spans(tokenizer, example.text, max_length)
    rendered, places = render(example.turns, tokenizer)
    # A template holds its model's special tokens itself.
    encoded = encode_with_spans(tokenizer, rendered, max_length, add_special_tokens=False)
    spans = _moved(encoded.spans, _byte_ranges(rendered, places), _byte_ranges(example.text, example.contents))
    text_bytes = len(example.text.encode())
    return replace(
        encoded,
        spans=spans.astype(np.int32),
        truncated_bytes=text_bytes - int(spans[-1, 1]) if encoded.truncated_bytes else 0,
        text_bytes=text_bytes,
        sample_key=sample_key(example.text),
    )


def template_fingerprint(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the template that :func:`encode_text` puts around ``examples``; empty where none is used."""
    if not any(example.turns for example in examples):
        return ""
    return hashlib.sha256(require_template(tokenizer).encode()).hexdigest()


def require_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of ``tokenizer``; DataError where it has none."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or not template:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise DataError(
            f"tokenizer {name} has no chat template, which data.chat_template: own asks for. Name a model or tokenizer "
            "that has one, or set data.chat_template: student, where both models read the same text"
        )
    return template


def render(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """A conversation in the template of ``tokenizer``, and the characters that each turn's text takes in it."""
    from jinja2 import TemplateError  # transformers needs jinja2 only where there is a chat template

    require_template(tokenizer)
    marked = [turn._replace(content=_MARK.format(number)) for number, turn in enumerate(turns)]
    try:
        rendered, around = (
            str(tokenizer.apply_chat_template([turn._asdict() for turn in version], tokenize=False))
            for version in (turns, marked)
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses the turns of {turns[0].content[:40]!r}: {error}") from error
    expected, places = "", []
    for number, turn in enumerate(turns):
        before, _, around = around.partition(_MARK.format(number))
        first = len(expected) + len(before)
        places.append((first, first + len(turn.content)))
        expected += before + turn.content
    if expected + around != rendered:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path or type(tokenizer).__name__} changes or drops the text of a "
            f"turn of {turns[0].content[:40]!r}, so that its tokens cannot be told from the template's; use "
            "data.chat_template: student"
        )
    return rendered, places


def earlier_answers(example: Example, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """The bytes of ``example.text`` that turns of the assistant before the completion take, ``[answers, 2]``.

    A turn is what changes in the text where it says something else. One that the template leaves out takes none, nor
    does one in whose place it refuses anything else, as some do with the call of a tool.
    """
    from jinja2 import TemplateError

    ranges = []
    bos = tokenizer.bos_token
    for number, message in enumerate(example.messages[:-1]):
        if message["role"] != "assistant":
            continue
        changed = list(example.messages)
        changed[number] = {"role": "assistant", "content": _MARK.format(number)}
        try:
            has_template = bool(tokenizer.chat_template)
            other = str(tokenizer.apply_chat_template(changed, tokenize=False)) if has_template else as_lines(changed)
        except (TemplateError, TypeError, ValueError, LookupError):
            continue
        if isinstance(bos, str) and not example.text.startswith(bos):
            other = other.removeprefix(bos)
        first = common_characters(example.text, other)
        last = len(example.text) - common_characters(example.text[::-1], other[::-1])
        if first < last:
            ranges.append((first, last))
    return _byte_ranges(example.text, ranges)


def _byte_ranges(text: str, ranges: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Ranges of characters as ranges of bytes, ``[ranges, 2]``."""
    sizes = [[len(text[:edge].encode()) for edge in pair] for pair in ranges]
    return np.asarray(sizes, dtype=np.int64).reshape(-1, 2)


def _moved(spans: NDArray[np.int32], places: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """``spans [tokens, 2]`` cut to ``places`` and moved to where ``targets`` has the same bytes."""
    moved = np.zeros(spans.shape, dtype=np.int64)
    inside = np.zeros(len(spans), dtype=bool)
    for (first, last), (target, _) in zip(places, targets, strict=True):
        cut = spans.astype(np.int64).clip(first, last)
        here = (cut[:, 1] > cut[:, 0]) & ~inside
        moved[here] = cut[here] - first + target
        inside |= here
    # The others are empty, at the end of what was said before them.
    ends = np.maximum.accumulate(np.where(inside, moved[:, 1], 0))
    moved[~inside] = ends[~inside, None]
    return moved
