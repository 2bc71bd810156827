"""Texts with a prompt and what follows it: the question that is read, and the answer that is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kvgraft.data.datasets import Example
from kvgraft.errors import GraftError
from kvgraft.fit.data import KVPair, PairDataset
from kvgraft.graft.pieces import first_tokens
from kvgraft.kv import KV


@dataclass(frozen=True)
class Question:
    """A question that both models have read, and the answer's ids ``[1, tokens]`` as the student reads them."""

    pair: KVPair
    answer_ids: Tensor


class _Place(NamedTuple):
    """Where a question stands: the number of its text, its tokens, where the answer's end, and bytes of the prompt."""

    text: int
    tokens: int
    end: int
    prompt_bytes: int


class Questions(Dataset[Question]):
    """The texts of ``pairs`` that have a prompt and an answer of two tokens or more; KV is read when asked for.

    A question token whose teacher token reaches into the answer is left out, so that nothing of the answer is in the
    cache. An answer ends with its text: what a tokenizer puts behind it, cut or not, is no part of it.

    Args:
        pairs: texts that both models have read.
        examples: the same texts, which say where their prompts end.
        limit: texts to look at, default all.

    Raises:
        GraftError: no text has a prompt and an answer.
    """

    def __init__(self, pairs: PairDataset, examples: Sequence[Example], limit: int | None = None) -> None:
        self.pairs = pairs
        self.examples = examples
        self._places: list[_Place] = []
        for index, example in enumerate(examples[:limit]):
            text = pairs.texts[index]
            prompt_bytes = len(example.text[: example.prompt_characters].encode())
            tokens = int((text.spans[:, 1] <= prompt_bytes).sum())
            end = 1 + int((text.spans[:, 1] > text.spans[:, 0]).nonzero()[0][-1])
            # What a tokenizer puts before any text, such as BOS, is no question.
            if tokens and text.spans[tokens - 1, 1] > 0 and end - tokens >= 2:
                self._places.append(_Place(index, tokens, end, prompt_bytes))
        if not self._places:
            raise GraftError(
                "no text has a prompt followed by an answer of two tokens or more; a graft is measured on data with "
                "`question` and `answer`, `prompt` and `completion`, or `messages`"
            )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> Question:
        index, tokens, end, prompt_bytes = self._places[place]
        text, teacher = self.pairs.texts[index], self.pairs.teacher
        ends = teacher.store.read_spans(text.sample_key)[:, 1]
        last = teacher.alignment(text).ranges[:tokens, 1].clip(1) - 1
        within = torch.from_numpy(ends[last] <= prompt_bytes)[None]
        answer = torch.tensor([list(text.input_ids)[tokens:end]])
        return Question(_beginning(self.pairs[index], tokens, within), answer)

    def another(self, place: int) -> int:
        """The next question that is not the same tokens.

        Raises:
            GraftError: all questions are the same.
        """
        count = len(self._places)
        for other in range(place + 1, place + count):
            if self._question_ids(other % count) != self._question_ids(place):
                return other % count
        raise GraftError(
            f"the control of another question's cache needs two held-out questions that differ; got {count} of the "
            "same tokens: raise data.held_out_samples or graft.texts, or give other text"
        )

    def _question_ids(self, place: int) -> list[int]:
        found = self._places[place]
        return list(self.pairs.texts[found.text].input_ids[: found.tokens])

    def before_text(self, place: int) -> KV | None:
        """The student's own KV of what its tokenizer puts before any text, such as BOS; None where it puts nothing."""
        index = self._places[place].text
        tokens = int((self.pairs.texts[index].spans[:, 1] == 0).sum())
        return first_tokens(self.pairs[index].target, tokens) if tokens else None

    def lengths(self) -> list[int]:
        """Tokens of each question."""
        return [place.tokens for place in self._places]

    def answer_lengths(self) -> list[int]:
        """Tokens of each answer."""
        return [place.end - place.tokens for place in self._places]

    def reaches(self, *, twice: bool, with_another: bool) -> list[int]:
        """Tokens from the start of each question's cache to the last of its answer that is read.

        Args:
            twice: the student's own cache stands behind the one that is grafted.
            with_another: the cache of another question, a control, is grafted too.
        """
        lengths, found = self.lengths(), []
        for place, (own, answer) in enumerate(zip(lengths, self.answer_lengths(), strict=True)):
            grafted = max(own, lengths[self.another(place)]) if with_another else own
            # The last token is judged and not read.
            found.append(grafted + twice * own + answer - 1)
        return found

    def answer_span(self, place: int) -> tuple[str, int, int]:
        """A whole text, and the bytes of it between which the answer stands, its first token left out."""
        index, tokens = self._places[place][:2]
        spans = self.pairs.texts[index].spans
        return self.examples[index].text, int(spans[tokens, 1]), int(spans[-1, 1])


def _beginning(pair: KVPair, tokens: int, within: Tensor) -> KVPair:
    """The first ``tokens`` of a pair; those outside ``within [1, tokens]`` do not count."""
    mask = pair.mask[:, :tokens] & within
    return KVPair(
        first_tokens(pair.source, tokens), first_tokens(pair.target, tokens), mask, pair.input_ids[:, :tokens]
    )
