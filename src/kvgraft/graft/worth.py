"""What a cache is worth: how likely a student finds the answer that follows a question it has not read itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgraft.errors import GraftError
from kvgraft.fit.data import FitData, KVPair
from kvgraft.fit.measure import project_pair
from kvgraft.graft.cache import cache_from_kv
from kvgraft.graft.pieces import in_order, with_own_tokens
from kvgraft.kv import KV
from kvgraft.progress import progress_bar
from kvgraft.projector.projector import KVDimensionProjector


@dataclass(frozen=True)
class Continuation:
    """A question that both models have read, and the answer's ids ``[1, tokens]`` as the student reads them."""

    question: KVPair
    answer_ids: Tensor


@dataclass(frozen=True)
class AnswerLoss:
    """Negative log-likelihood in nats of every answer's tokens but the first: one sum and one count for each answer."""

    sums: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Nats per token over all answers."""
        return sum(self.sums) / sum(self.tokens)


def continuations(data: FitData, limit: int | None = None) -> list[Continuation]:
    """Questions and answers of the held-out texts, at most ``limit`` of them.

    A question token whose teacher token reaches into the answer is left out, so that nothing of the answer is in the
    cache.

    Raises:
        GraftError: no text has a prompt and at least two tokens after it.
    """
    found = []
    for index, example in enumerate(data.held_out_examples[:limit]):
        prompt_bytes = len(example.text[: example.prompt_characters].encode())
        text = data.held_out.texts[index]
        tokens = int((text.spans[:, 1] <= prompt_bytes).sum())
        answer = torch.tensor([list(text.input_ids)[tokens:]])
        if tokens == 0 or answer.shape[1] < 2:
            continue
        alignment = data.held_out.teacher.alignment(text)
        ends = data.held_out.teacher.store.read_tokens(text.sample_key).spans[:, 1]
        last = alignment.ranges[:tokens, 1].clip(1) - 1
        within = torch.from_numpy(ends[last] <= prompt_bytes)[None]
        found.append(Continuation(_beginning(data.held_out[index], tokens, within), answer))
    if not found:
        raise GraftError(
            "no held-out text has a prompt followed by an answer of two tokens or more; a graft is measured on data "
            "with `question` and `answer`, `prompt` and `completion`, or `messages`"
        )
    return found


@torch.no_grad()
def cache_worth(
    student: PreTrainedModel,
    questions: list[Continuation],
    projectors: Mapping[str, KVDimensionProjector],
    teacher: str,
    mean_kv: tuple[Tensor, Tensor],
    own_first_tokens: int = 4,
) -> dict[str, AnswerLoss]:
    """The answers' likelihood from every cache: the student's own, none, each projector's, and the controls.

    Args:
        student: frozen.
        questions: with the student's own KV of all its layers as target.
        projectors: by name; each also gives ``NAME, another question`` and ``NAME, tokens shuffled``.
        teacher: its name in the projectors.
        mean_kv: the mean key and value of each layer ``[layers, kv_dim]``, for the control ``mean``.
        own_first_tokens: of every question that keep the student's own KV, in the controls too.
    """
    if len(questions) < 2:
        raise GraftError("the control of another question's cache needs at least two held-out questions")
    losses: dict[str, list[tuple[float, int]]] = {}

    def note(name: str, kv: KV | None, answer: Tensor) -> None:
        losses.setdefault(name, []).append(_answer_loss(student, kv, answer))

    def grafted(projector: KVDimensionProjector, question: KVPair) -> KV:
        return in_order(with_own_tokens(project_pair(projector, teacher, question), question.target, own_first_tokens))

    with progress_bar("answering from each cache", len(questions), "questions") as advance:
        for index, item in enumerate(questions):
            own, answer = item.question.target, item.answer_ids
            other = questions[(index + 1) % len(questions)].question
            note("own", own, answer)
            note("none", None, answer)
            note("another question, own", other.target, answer)
            for name, constant in (("mean", mean_kv), ("zeros", tuple(torch.zeros_like(part) for part in mean_kv))):
                note(name, with_own_tokens(_constant(own, constant), own, own_first_tokens), answer)
            for name, projector in projectors.items():
                kv = grafted(projector, item.question)
                note(name, kv, answer)
                note(f"{name}, another question", grafted(projector, other), answer)
                note(f"{name}, tokens shuffled", _shuffled(kv, own_first_tokens, index), answer)
            advance(1)
    return {name: AnswerLoss(*(list(part) for part in zip(*found, strict=True))) for name, found in losses.items()}


def _answer_loss(student: PreTrainedModel, kv: KV | None, answer: Tensor) -> tuple[float, int]:
    read, wanted = answer[:, :-1].to(student.device), answer[:, 1:].to(student.device)
    inputs = {"input_ids": read} if kv is None else cache_from_kv(student, kv).forward_inputs(read)
    logits = student(**inputs).logits[0].float()
    return float(torch.nn.functional.cross_entropy(logits, wanted[0], reduction="sum")), wanted.shape[1]


def _beginning(pair: KVPair, tokens: int, within: Tensor) -> KVPair:
    """The first ``tokens`` of a pair; those outside ``within [1, tokens]`` do not count."""

    def cut(kv: KV) -> KV:
        return replace(
            kv,
            keys=kv.keys[:, :, :, :tokens],
            values=kv.values[:, :, :, :tokens],
            positions=kv.positions[:, :tokens],
            mask=kv.mask[:, :tokens],
        )

    mask = pair.mask[:, :tokens] & within
    return KVPair(cut(pair.source), cut(pair.target), mask, pair.input_ids[:, :tokens])


def _constant(like: KV, constant: tuple[Tensor, ...]) -> KV:
    """``like``'s tokens, each with the same key and value ``[layers, kv_dim]``."""
    tokens, geometry = like.mask.shape[1], like.geometry
    keys, values = (part[None, :, None].expand(1, -1, tokens, -1) for part in constant)
    return like.unflatten(keys, values, geometry)


def _shuffled(kv: KV, first_tokens: int, seed: int) -> KV:
    """``kv`` with the tokens after the first in another order; each position keeps its rotation."""
    tokens = kv.mask.shape[1]
    generator = torch.Generator().manual_seed(seed)
    moved = torch.randperm(max(tokens - first_tokens, 0), generator=generator) + first_tokens
    order = torch.cat([torch.arange(min(first_tokens, tokens)), moved])
    return replace(kv, keys=kv.keys[:, :, :, order], values=kv.values[:, :, :, order], mask=kv.mask[:, order])
