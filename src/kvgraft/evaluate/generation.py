"""Greedy generation for many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from kvgraft.errors import DataError
from kvgraft.models.geometry import context_of
from kvgraft.progress import progress_bar

# Given the text that one prompt's answer has so far, what it must go on with; None leaves that to the model.
Continue = Callable[[str], str | None]


@dataclass(frozen=True)
class Generation:
    """What a model wrote after a prompt, special tokens left out, and how many tokens that took, the last included.

    ``had_room`` is false where the prompt left no room for an answer in the model's context; nothing was written then.
    """

    text: str
    tokens: int
    had_room: bool = True


@torch.no_grad()
def generate_greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    is_complete: Callable[[str], bool] | None = None,
    must_continue: Continue | None = None,
    description: str = "generating",
) -> list[Generation]:
    """The most likely continuation of each prompt, token by token, in the order of ``prompts``.

    Prompts of like length run together, padded on the left, so that the answer does not depend on the batch but for
    rounding.

    Args:
        max_new_tokens: of an answer; default 256, or half the model's context if that is less.
        is_complete: told an answer's text after each line; where it says true the answer ends.
        must_continue: told an answer's text after each ``=``; see :data:`Continue`.
        description: of the progress bar.

    Raises:
        DataError: no prompt leaves room for an answer.
    """
    context = context_of(model.config)
    budget = max_new_tokens or (256 if context is None else min(256, context // 2))
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
    fitting = [index for index in order if context is None or len(encoded[index]) + budget <= context]
    if not fitting:
        raise DataError(
            f"none of {len(prompts)} prompts leaves room for {budget} tokens of answer in the student's context of "
            f"{context} (the shortest has {min(map(len, encoded))}); give fewer --shots or a smaller --max-new-tokens"
        )
    written = [Generation("", 0, had_room=False)] * len(prompts)
    with progress_bar(description, len(fitting), "prompts") as advance:
        for start in range(0, len(fitting), batch_size):
            chosen = fitting[start : start + batch_size]
            batch = _Batch(tokenizer, [encoded[index] for index in chosen], model.device)
            for index, generation in zip(chosen, batch.run(model, budget, is_complete, must_continue), strict=True):
                written[index] = generation
            advance(len(chosen))
    return written


@contextmanager
def greedily(model: PreTrainedModel) -> Iterator[None]:
    """Without what the model's ``generation_config.json`` would change, such as a repetition penalty."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    try:
        yield
    finally:
        model.generation_config = own


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids: list[int] = list(tokenizer(prompt)["input_ids"])
    # Some tokenizers close every text, and what is closed has no continuation.
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


class _Batch:
    """Prompts that are answered together."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], device: torch.device) -> None:
        self.tokenizer = tokenizer
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.prompt_tokens = max(map(len, prompts))
        missing = [self.prompt_tokens - len(prompt) for prompt in prompts]
        self.inputs = {
            "input_ids": torch.tensor(
                [[self.pad] * pads + prompt for pads, prompt in zip(missing, prompts, strict=True)], device=device
            ),
            "attention_mask": torch.tensor(
                [[0] * pads + [1] * len(prompt) for pads, prompt in zip(missing, prompts, strict=True)], device=device
            ),
        }

    def run(
        self,
        model: PreTrainedModel,
        budget: int,
        is_complete: Callable[[str], bool] | None,
        must_continue: Continue | None,
    ) -> list[Generation]:
        """One generation for each prompt."""
        reader = _Reader(self.tokenizer, self.prompt_tokens)
        stop = _StopWhereComplete(reader, is_complete) if is_complete else None
        extra: dict[str, Any] = {}
        if stop is not None:
            extra["stopping_criteria"] = StoppingCriteriaList([stop])
        if must_continue is not None:
            extra["logits_processor"] = LogitsProcessorList([_Forced(reader, must_continue)])
        with greedily(model):
            output = model.generate(
                **self.inputs,
                max_new_tokens=budget,
                do_sample=False,
                num_beams=1,
                pad_token_id=self.pad,
                eos_token_id=self.tokenizer.eos_token_id,
                **extra,
            )
        rows: list[list[int]] = output[:, self.prompt_tokens :].tolist()
        lengths = stop.lengths if stop is not None else {}
        return [self._generation(row[: lengths.get(index)]) for index, row in enumerate(rows)]

    def _generation(self, ids: list[int]) -> Generation:
        end = self.tokenizer.eos_token_id
        tokens = ids.index(end) + 1 if end in ids else len(ids)
        return Generation(self.tokenizer.decode(ids[:tokens], skip_special_tokens=True), tokens)


class _Reader:
    """Reads what was generated; decodes a whole answer only after a token that ends in what is looked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> None:
        self.tokenizer = tokenizer
        self._prompt_tokens = prompt_tokens
        self._tokens: dict[int, str] = {}

    def written(self, row: Tensor) -> Tensor:
        return row[self._prompt_tokens :]

    def text_after(self, row: Tensor, sign: str) -> str | None:
        """The answer in ``row``, if its last token holds ``sign``."""
        written = self.written(row)
        if not len(written):
            return None
        last = int(written[-1])
        if last not in self._tokens:
            self._tokens[last] = self.tokenizer.decode([last])
        return self.tokenizer.decode(written.tolist(), skip_special_tokens=True) if sign in self._tokens[last] else None


class _StopWhereComplete(StoppingCriteria):
    """Ends the answers that are complete, and notes how many tokens each had."""

    def __init__(self, reader: _Reader, is_complete: Callable[[str], bool]) -> None:
        self._reader, self._is_complete = reader, is_complete
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        for index, row in enumerate(input_ids):
            if index not in self.lengths:
                text = self._reader.text_after(row, "\n")
                if text is not None and self._is_complete(text):
                    self.lengths[index] = len(self._reader.written(row))
        return torch.tensor([index in self.lengths for index in range(len(input_ids))], device=input_ids.device)


class _Forced(LogitsProcessor):
    """Leaves only the token that an answer must go on with."""

    def __init__(self, reader: _Reader, must_continue: Continue) -> None:
        self._reader, self._must_continue = reader, must_continue
        self._waiting: dict[int, list[int]] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for index, row in enumerate(input_ids):
            if not self._waiting.get(index):
                text = self._reader.text_after(row, "=")
                forced = None if text is None else self._must_continue(text)
                if forced:
                    self._waiting[index] = self._reader.tokenizer.encode(forced, add_special_tokens=False)
            if self._waiting.get(index):
                token = self._waiting[index].pop(0)
                scores[index] = float("-inf")
                scores[index, token] = 0.0
        return scores
