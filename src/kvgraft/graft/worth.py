"""What a cache is worth: how likely a student finds the answer that follows a question it has not read itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgraft.data.spans import encode_with_spans
from kvgraft.graft.cache import cache_from_kv
from kvgraft.graft.grafter import Grafter
from kvgraft.graft.pieces import with_own_tokens
from kvgraft.graft.questions import Questions
from kvgraft.kv import KV
from kvgraft.models.cache import context_length
from kvgraft.progress import progress_bar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """A grafter to be measured, by the name it has in the report, and its teacher's KV of the questions."""

    name: str
    grafter: Grafter
    questions: Questions


@dataclass(frozen=True)
class AnswerLoss:
    """Negative log-likelihood in nats of every answer's tokens but the first: one sum and one count for each answer."""

    sums: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Nats per token over all answers."""
        return sum(self.sums) / sum(self.tokens)


@torch.no_grad()
def cache_worth(
    student: PreTrainedModel,
    questions: Questions,
    measured: Sequence[Measured],
    mean_kv: tuple[Tensor, Tensor],
    own_first_tokens: int = 4,
    layer_groups: int = 0,
) -> dict[str, AnswerLoss]:
    """The answers' likelihood from every cache: the student's own, none, each grafter's, and the controls.

    ``none`` has the student's BOS where its tokenizer puts one: without it some models are lost, whatever they read.

    Args:
        student: frozen.
        questions: with the student's own KV of all its layers as target.
        measured: each also gives ``NAME, another question``; those that replace the student's cache, ``NAME, tokens
            shuffled``. Their dropout is turned off.
        mean_kv: the mean key and value of each layer ``[layers, kv_dim]``, for the control ``mean``.
        own_first_tokens: of every question that keep the student's own KV in the controls.
        layer_groups: in so many groups of layers the first of ``measured`` is tried alone, with the student's own KV
            in all others: ``NAME in layers A to B alone``.
    """
    losses: dict[str, list[tuple[float, int]]] = {}

    def note(name: str, kv: KV | None, answer: Tensor) -> None:
        losses.setdefault(name, []).append(_answer_loss(student, kv, answer))

    for each in measured:
        each.grafter.eval()
    with progress_bar("answering from each cache", len(questions), "questions") as advance:
        for index in range(len(questions)):
            item, other_index = questions[index], questions.another(index)
            own, answer = item.pair.target, item.answer_ids
            note("own", own, answer)
            note("none", questions.before_text(index), answer)
            note("another question, own", questions[other_index].pair.target, answer)
            for name, constant in (("mean", mean_kv), ("zeros", tuple(torch.zeros_like(part) for part in mean_kv))):
                own_tokens = min(own_first_tokens, own.mask.shape[1])
                note(name, with_own_tokens(_constant(own, constant), own, own_tokens), answer)
            for each in measured:
                pair, other = each.questions[index].pair, each.questions[other_index].pair
                kv = each.grafter(pair)
                note(each.name, kv, answer)
                note(f"{each.name}, another question", each.grafter(pair, other), answer)
                if each.grafter.fusion == "none":
                    note(f"{each.name}, tokens shuffled", _shuffled(kv, own_first_tokens, index), answer)
            for first, last in _groups(own.geometry.num_layers, layer_groups):
                kv = _only_layers(measured[0].grafter(item.pair), own, slice(first, last + 1))
                note(f"{measured[0].name} in layers {first} to {last} alone", kv, answer)
            advance(1)
    return {name: AnswerLoss(*(list(part) for part in zip(*found, strict=True))) for name, found in losses.items()}


@torch.no_grad()
def teacher_alone(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Questions
) -> AnswerLoss | None:
    """What ``teacher`` makes of the same answers after reading the questions itself, per token of the student.

    Its tokens within the answer count, from where the student's first answer token ends; one that reaches over that
    place is left out. None where a question and its answer are longer than the teacher's context.
    """
    sums, counts = [], []
    with progress_bar("the teacher answers itself", len(questions), "questions") as advance:
        for index in range(len(questions)):
            text, start, end = questions.answer_span(index)
            encoded = encode_with_spans(tokenizer, text)
            spans, ids = encoded.spans[1:], torch.tensor([encoded.input_ids], device=teacher.device)
            # What follows the student's part is not looked at, and need not fit.
            spans, ids = spans[spans[:, 1] <= end], ids[:, : 1 + int((spans[:, 1] <= end).sum())]
            if ids.shape[1] > context_length(teacher):
                logger.warning("the teacher alone is left out: an answer ends beyond its context")
                return None
            # Not what its tokenizer puts behind the text, such as an end of text.
            within = torch.from_numpy((spans[:, 0] >= start) & (spans[:, 1] > spans[:, 0])).to(teacher.device)
            logits = teacher(input_ids=ids).logits[0, :-1][within].float()
            sums.append(float(F.cross_entropy(logits, ids[0, 1:][within], reduction="sum")))
            counts.append(questions[index].answer_ids.shape[1] - 1)
            advance(1)
    return AnswerLoss(sums, counts)


def _answer_loss(student: PreTrainedModel, kv: KV | None, answer: Tensor) -> tuple[float, int]:
    read, wanted = answer[:, :-1].to(student.device), answer[:, 1:].to(student.device)
    inputs = {"input_ids": read} if kv is None else cache_from_kv(student, kv).forward_inputs(read)
    logits = student(**inputs).logits[0].float()
    return float(F.cross_entropy(logits, wanted[0], reduction="sum")), wanted.shape[1]


def _groups(num_layers: int, count: int) -> list[tuple[int, int]]:
    """First and last layer of ``count`` runs of layers, about as long."""
    if not count:
        return []
    edges = [round(index * num_layers / count) for index in range(count + 1)]
    return [(first, last - 1) for first, last in pairwise(edges) if last > first]


def _only_layers(kv: KV, own: KV, layers: slice) -> KV:
    """``own`` with the KV of ``layers`` taken from ``kv`` of the same tokens."""
    keys, values = own.keys.clone(), own.values.clone()
    keys[:, layers], values[:, layers] = kv.keys[:, layers], kv.values[:, layers]
    return replace(own, keys=keys, values=values)


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
