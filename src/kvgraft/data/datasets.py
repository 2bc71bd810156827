"""Text to train and test on: the built-in word problems, files, folders and data sets of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from kvgraft.data import word_problems
from kvgraft.data.columns import in_known_form
from kvgraft.data.sources import KNOWN_FORMS, KNOWN_SOURCES, Row, Split, has_parts, numbered, read_rows
from kvgraft.errors import DataError

WORD_PROBLEM_COUNTS: dict[Split, int] = {"train": 4000, "held_out": 400}

logger = logging.getLogger(__name__)


class Turn(NamedTuple):
    """One message of a conversation, as chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One text; the completion starts at character ``prompt_characters`` (0: there is no prompt, all of it counts).

    ``turns`` is a conversation that each model reads in its own chat template; ``text`` is then its plain form, lines
    of ``role: content``. ``messages`` are what ``text`` was made of where answers before the completion count too.
    """

    text: str
    prompt_characters: int = 0
    turns: tuple[Turn, ...] = field(default=(), compare=False)
    messages: tuple[Mapping[str, Any], ...] = field(default=(), compare=False, repr=False)

    @property
    def contents(self) -> list[tuple[int, int]]:
        """The characters of ``text`` that each turn's content takes."""
        ranges, start = [], 0
        for role, content in self.turns:
            start += len(f"{role}: ")
            ranges.append((start, start + len(content)))
            start += len(content) + 1
        return ranges


def load_examples(
    source: str,
    split: Split = "train",
    limit: int | None = None,
    seed: int = 0,
    *,
    shuffle: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep_turns: bool = False,
    streaming: bool = False,
    shuffle_buffer: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Example]:
    """The texts of ``source``, in its own order.

    Args:
        source: ``word_problems`` (built in), a JSONL file or one that ``datasets`` reads (CSV, Parquet, a JSON list;
            read whole, whatever ``split`` says), a folder with ``train.jsonl`` and ``test.jsonl`` (or another of its
            part's names) or with files that ``datasets`` reads, one that ``Dataset.save_to_disk`` wrote (read whole
            too), ``gsm8k``, or a hub data set as ``owner/name`` or ``owner/name:config``, with ``[part]`` behind it for
            that part alone.
        split: which part; ``held_out`` is the first of its names in :mod:`kvgraft.data.sources` that the source has.
        limit: keep the first so many (all by default; 4000 and 400 for ``word_problems``).
        seed: draws the word problems, and the order if ``shuffle``.
        shuffle: take the texts in an order drawn from ``seed``, the same on every machine.
        tokenizer: its chat template renders ``messages``; without one they become lines of ``role: content``.
        keep_turns: make them lines in any case and keep their turns, for each model's own template. White space around
            a turn is left out: some templates strip it and others do not.
        streaming: read a hub data set row by row, as far as ``limit`` needs, and keep no copy on disk. A JSONL file is
            always read so.
        shuffle_buffer: read so many rows ahead, and take one of those by ``seed`` for each next text.
        columns: where rows have other columns, what stands for those below; see :mod:`kvgraft.data.columns`.

    Columns, the first form that a row has: ``messages``, or ``conversations`` as ShareGPT has them (up to the last
    assistant turn, which is the completion), ``prompt`` + ``completion`` (joined as they are; or lists of messages, the
    completion one answer), ``question`` + ``answer`` (joined by a line break), ``text``. Null is as good as no column.

    Raises DataError naming the file and line of a row that is unreadable, empty or in no such form.
    """
    if not source.strip():
        raise DataError(f"the data source is {source!r}; name {KNOWN_SOURCES}")
    _check_limit(source, limit)
    if source == "word_problems":
        count = limit or WORD_PROBLEM_COUNTS[split]
        rows: Iterable[Row] = numbered(f"word_problems ({split})", word_problems.generate(split, count, seed))
    else:
        rows = read_rows(source, split, streaming)
    examples = _examples(in_known_form(rows, columns or {}), seed, tokenizer, keep_turns, shuffle_buffer)
    chosen = _shuffled(examples, seed)[:limit] if shuffle else list(islice(examples, limit))
    if not chosen:
        raise DataError(f"{source} ({split}) holds no examples; give a source with at least one row of {KNOWN_FORMS}")
    if limit is not None and len(chosen) < limit:
        logger.warning("%s (%s) holds %d examples, fewer than the %d asked for", source, split, len(chosen), limit)
    return chosen


def load_train_and_held_out(
    train: str,
    held_out: str | None = None,
    train_limit: int | None = None,
    held_out_limit: int | None = None,
    seed: int = 0,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep_turns: bool = False,
    streaming: bool = False,
    shuffle_buffer: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Example], list[Example]]:
    """Training and held-out texts that share none.

    Without ``held_out`` it is the held-out part of ``train``. Where that has none, as a single file or a data set
    with a training part alone, one text in ten, chosen by its sha256, is held out: a text keeps its side when the file
    grows, and equal texts are on one side. A stream is read until it has ``train_limit`` texts, or ``held_out_limit``.

    A training text that is held out too is left out of training, with a warning. ``shuffle_buffer`` mixes the training
    texts.

    Raises DataError if nothing is left to train on, or as ``load_examples`` does.
    """
    if held_out is None and train != "word_problems" and not has_parts(train):
        _check_limit(train, train_limit)
        _check_limit(train, held_out_limit)
        rows = in_known_form(read_rows(train, "train", streaming), columns or {})
        examples = _examples(rows, seed, tokenizer, keep_turns, shuffle_buffer)
        return _one_in_ten_held_out(train, examples, train_limit, held_out_limit, streaming)
    ways: dict[str, Any] = {"tokenizer": tokenizer, "keep_turns": keep_turns, "streaming": streaming}
    ways["columns"] = columns
    # Held-out text first: where there is no such source, it is told before all training text is fetched.
    tested = load_examples(held_out or train, "held_out", held_out_limit, seed, **ways)
    trained = load_examples(train, "train", train_limit, seed, **ways, shuffle_buffer=shuffle_buffer)
    tested_texts = {example.text for example in tested}
    kept = [example for example in trained if example.text not in tested_texts]
    if not kept:
        raise DataError(
            f"every training text of {train} is a held-out text of {held_out or train} too, and a held-out loss over "
            "texts that were trained on measures memory; name another held_out"
        )
    if len(kept) < len(trained):
        logger.warning("left out %d training texts of %s that are held out too", len(trained) - len(kept), train)
    return kept, tested


def _one_in_ten_held_out(
    source: str, examples: Iterable[Example], train_limit: int | None, held_out_limit: int | None, streaming: bool
) -> tuple[list[Example], list[Example]]:
    train: list[Example] = []
    held_out: list[Example] = []
    for example in examples:
        side, limit = (held_out, held_out_limit) if _digest(example.text) % 10 == 0 else (train, train_limit)
        if len(side) != limit:
            side.append(example)
        # A stream is not read to its end for want of a limit.
        enough = held_out if streaming and held_out_limit is None else len(held_out) == held_out_limit
        if len(train) == train_limit and enough:
            break
    if not (train and held_out):
        found = [example.text for example in train + held_out]
        raise DataError(
            f"{source} holds {len(found)} examples of {len({*found})} texts that differ, too few to hold one in ten "
            "out; name a second file as held_out"
        )
    return train, held_out


def _check_limit(source: str, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise DataError(f"cannot take {limit} examples of {source}; give a limit of at least 1, or none to take all")


def _examples(
    rows: Iterable[Row],
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None,
    keep_turns: bool,
    shuffle_buffer: int | None,
) -> Iterator[Example]:
    if shuffle_buffer is not None:
        rows = _drawn_from_buffer(rows, shuffle_buffer, seed)
    return (_example(where, row, tokenizer, keep_turns) for where, row in rows)


def _example(
    where: str, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, keep_turns: bool
) -> Example:
    if "messages" in row:
        return _from_messages(where, row["messages"], tokenizer, keep_turns)
    if "prompt" in row and "completion" in row:
        if isinstance(row["completion"], list):
            return _from_prompt_messages(where, row["prompt"], row["completion"], tokenizer, keep_turns)
        prompt = _string(where, row, "prompt")
        return Example(prompt + _filled_string(where, row, "completion"), len(prompt))
    if "question" in row and "answer" in row:
        question = _filled_string(where, row, "question")
        return Example(f"{question}\n{_filled_string(where, row, 'answer')}", len(question) + 1)
    if "text" in row:
        return Example(_filled_string(where, row, "text"))
    raise DataError(
        f"{where}: found columns {sorted(row)} that are not null; known forms are {KNOWN_FORMS}. In a recipe, "
        "data.columns says which columns stand for those of a form"
    )


def _from_messages(where: str, messages: Any, tokenizer: PreTrainedTokenizerBase | None, keep_turns: bool) -> Example:
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(f"{where}: `messages` must be a list of {{role, content}}; got {str(messages)[:60]!r}")
    turns = [(_string(where, message, "role"), _string(where, message, "content")) for message in messages]
    last = max((index for index, (role, _) in enumerate(turns) if role == "assistant"), default=None)
    if last is None or not turns[last][1].strip():
        raise DataError(f"{where}: `messages` need an assistant turn with text; the roles are {[r for r, _ in turns]}")
    if tokenizer is not None and tokenizer.chat_template and not keep_turns:
        return _from_chat_template(where, messages[: last + 1], tokenizer)
    if any(message.get("tool_calls") for message in messages[: last + 1]):
        raise DataError(
            f"{where}: `messages` hold `tool_calls`, which only a chat template can write, with data.chat_template: "
            "student; name a student or tokenizer that has one, or put the calls into `content`"
        )
    if keep_turns:
        turns = [(role, content.strip()) for role, content in turns]
    kept = [Turn(*turn) for turn in turns[: last + 1]]
    lines = [turn._asdict() for turn in kept]
    text = as_lines(lines)
    prompt_characters = len(text) - len(f" {kept[last].content}")
    return Example(text, prompt_characters, tuple(kept) if keep_turns else (), _with_several_answers(lines))


def _from_prompt_messages(
    where: str, prompt: Any, completion: list[Any], tokenizer: PreTrainedTokenizerBase | None, keep_turns: bool
) -> Example:
    """A conversation of which the last answer alone is to be learned, as TRL has it."""
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in completion]
    if not isinstance(prompt, list) or roles != ["assistant"]:
        raise DataError(
            f"{where}: where `completion` is a list it must hold one message of the assistant, and `prompt` the list "
            f"of those before; got prompt {str(prompt)[:60]!r} and completion {str(completion)[:60]!r}. To learn "
            "several answers give all as `messages`"
        )
    return replace(_from_messages(where, [*prompt, *completion], tokenizer, keep_turns), messages=())


def as_lines(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation without a chat template."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _with_several_answers(messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    return tuple(messages) if sum(message["role"] == "assistant" for message in messages) > 1 else ()


def in_template(example: Example, tokenizer: PreTrainedTokenizerBase) -> Example:
    """A conversation that keeps its turns as the model of ``tokenizer`` reads it; other examples as they are."""
    if not example.turns:
        return example
    return _from_chat_template(example.text[:40], [turn._asdict() for turn in example.turns], tokenizer)


def _from_chat_template(where: str, messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> Example:
    from jinja2 import TemplateError  # transformers needs jinja2 only where there is a chat template

    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        prompt = ""
        if len(messages) > 1:  # transformers refuses to render an empty conversation
            prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError, LookupError) as error:  # a filter raises what Python does
        raise DataError(f"{where}: the tokenizer's chat template refuses these `messages`: {error}") from error
    # Some templates render a turn otherwise once another follows it: the prompt is what both have in common.
    prompt_characters = common_characters(text, prompt)
    # The tokenizer adds its own BOS; one in the text as well would be a second.
    bos = tokenizer.bos_token
    if isinstance(bos, str) and bos and text.startswith(bos) and _adds_bos(tokenizer):
        text, prompt_characters = text.removeprefix(bos), max(0, prompt_characters - len(bos))
    return Example(text, prompt_characters, messages=_with_several_answers(messages))


def common_characters(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    differences = (index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differences, min(len(one), len(other)))


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id in tokenizer("a")["input_ids"]


def _filled_string(where: str, row: Mapping[str, Any], column: str) -> str:
    value = _string(where, row, column)
    if not value.strip():
        raise DataError(f"{where}: `{column}` is empty; take the row out or fill it")
    return value


def _string(where: str, row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise DataError(f"{where}: `{column}` is missing; found {sorted(row)}")
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: `{column}` must be text; got {type(value).__name__} {str(value)[:60]!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell and no tokenizer reads
        raise DataError(f"{where}: `{column}` holds a character that is no valid Unicode: {error}") from error
    return value


def _drawn_from_buffer(rows: Iterable[Row], size: int, seed: int) -> Iterator[Row]:
    draw = random.Random(seed)
    held: list[Row] = []
    for row in rows:
        held.append(row)
        if len(held) == size:
            yield held.pop(draw.randrange(size))
    draw.shuffle(held)
    yield from held


def _shuffled(examples: Iterable[Example], seed: int) -> list[Example]:
    return sorted(examples, key=lambda example: _digest(f"{seed} {example.text}"))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
