"""Training a grafter end to end: on how likely the frozen student finds what follows the text it has not read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgraft.data.batch_plan import plan_batches
from kvgraft.distill.logits import FullTarget, cross_entropy_loss, divergence_loss
from kvgraft.fit.train import FitModel, train_fit
from kvgraft.graft.cache import cache_from_kv
from kvgraft.graft.grafter import Grafter
from kvgraft.graft.questions import Question, Questions
from kvgraft.kv import KV, stack_kv
from kvgraft.models.decoder import decoder_of
from kvgraft.models.head import as_the_head_reads, head_of
from kvgraft.recipe import ContinuationRecipe

# Held-out questions that are looked at while training.
_EVALUATION_QUESTIONS = 8
_GATE_RATE = 20.0


class ContinuationModel(FitModel):
    """A grafter and its loss on the answers of some questions; the student stands beside it, frozen.

    Args:
        grafter: what is trained.
        student: goes on from the grafted KV.
        train, held_out: questions with answers.
        target: ``text``: cross-entropy of the answer; ``own_reading``: KL from what the student says of each next token
            after reading the question itself.
    """

    def __init__(
        self, grafter: Grafter, student: PreTrainedModel, train: Questions, held_out: Questions, target: str = "text"
    ) -> None:
        super().__init__()
        self.grafter, self.target = grafter, target
        self.train_questions, self.held_out_questions = train, held_out
        self._head = head_of(student)
        # Not a submodule: it is neither trained nor saved nor moved.
        self._student = (student.eval().requires_grad_(False),)

    def forward(self, questions: Tensor) -> dict[str, Tensor]:
        """Nats per answer token of the training questions at ``questions [count]``."""
        return {"loss": self._loss([self.train_questions[int(index)] for index in questions])}

    @torch.no_grad()
    def held_out_losses(self) -> dict[str, float]:
        """The same on a few held-out questions, one after the other."""
        count = min(_EVALUATION_QUESTIONS, len(self.held_out_questions))
        questions = [self.held_out_questions[index] for index in range(count)]
        tokens = [question.answer_ids.shape[1] - 1 for question in questions]
        nats = sum(float(self._loss([question])) * count for question, count in zip(questions, tokens, strict=True))
        return {"loss": nats / sum(tokens)}

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Adapters at the rate; gates, of which each is one number, at twenty times that and without decay."""
        groups: list[dict[str, Any]] = [{"params": list(self.grafter.projector.parameters()), "lr": learning_rate}]
        if self.grafter.gates is not None:
            groups.append({"params": [self.grafter.gates], "lr": _GATE_RATE * learning_rate, "weight_decay": 0.0})
        return groups

    def save_trained(self, folder: Path) -> None:
        """The grafter alone."""
        self.grafter.save_pretrained(folder)

    def load_trained(self, folder: Path) -> None:
        """What :meth:`save_trained` wrote."""
        self.grafter.load_state_dict(Grafter.from_pretrained(folder).state_dict())

    def _loss(self, questions: list[Question]) -> Tensor:
        answers, real = _joined_answers(questions)
        student, head = self._student[0], self._head
        grafted = stack_kv([self.grafter(question.pair) for question in questions])
        hidden = continuation_states(student, grafted, answers, real)
        if self.target == "text":
            return cross_entropy_loss(hidden, head, answers[:, 1:][real[:, 1:]].to(hidden.device))
        with torch.no_grad():
            own_kv = stack_kv([question.pair.target for question in questions])
            own = as_the_head_reads(continuation_states(student, own_kv, answers, real))
        # Cast once, and not for every chunk.
        own_target = FullTarget(own, replace(head, weight=head.weight.to(own.dtype)))
        return divergence_loss(hidden, head, own_target)


def continuation_states(student: PreTrainedModel, kv: KV, answer_ids: Tensor, real: Tensor) -> Tensor:
    """Hidden states ``[tokens, hidden_size]`` from which ``student`` predicts each real answer token but the first.

    Args:
        student: goes on from the cache.
        kv: of the questions, in the student's geometry.
        answer_ids: ``[batch, tokens]``.
        real: ``[batch, tokens]`` bool, false where ``answer_ids`` is padding.
    """
    inputs = cache_from_kv(student, kv).forward_inputs(answer_ids[:, :-1], real[:, :-1].long())
    states: Tensor = decoder_of(student)(**inputs).last_hidden_state
    return states[real[:, 1:].to(states.device)]


def train_on_continuations(
    grafter: Grafter,
    student: PreTrainedModel,
    train: Questions,
    held_out: Questions,
    settings: ContinuationRecipe,
    folder: Path,
    seed: int,
    label: str,
) -> None:
    """Train ``grafter`` for ``settings.steps`` steps, from the last checkpoint in ``folder`` if it holds one.

    Source: the evidence that a grafted cache can go past the student's own reading, and Cache-to-Cache
    (arXiv 2510.03215), which trains its fuser on the next token with both models frozen.

    Raises:
        TrainingInterruptedError: Ctrl-C; a checkpoint was left.
    """
    model = ContinuationModel(grafter, student, train, held_out, settings.target)
    steps = _steps(train.answer_lengths(), settings.steps, settings.texts_per_step, seed)
    train_fit(model, settings, steps, _as_questions, folder, seed, label)


def _steps(answer_lengths: Sequence[int], steps: int, texts_per_step: int, seed: int) -> list[list[int]]:
    """The questions of each step: answers of like length, in all as long as ``texts_per_step`` are on average."""
    budget = round(texts_per_step * sum(answer_lengths) / len(answer_lengths))
    batches = plan_batches(answer_lengths, budget, steps, seed)
    return [[question for row in batch for question in row] for batch in batches]


def _as_questions(steps: list[list[int]]) -> dict[str, Tensor]:
    return {"questions": torch.tensor(steps[0])}


def _joined_answers(questions: list[Question]) -> tuple[Tensor, Tensor]:
    """Answer ids ``[batch, tokens]``, padded on the right, and where they are real."""
    answers = [question.answer_ids[0] for question in questions]
    lengths = torch.tensor([len(answer) for answer in answers])
    padded = nn.utils.rnn.pad_sequence(answers, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
