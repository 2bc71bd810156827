"""The logit part of the loss: a student's predictions against what its teachers said, stored or said at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgraft.distill.cross_vocabulary import chunk_likelihood_loss, sorted_probability_loss, token_log_likelihood
from kvgraft.distill.logit_sources import LogitTargets, sum_by_chunk
from kvgraft.distill.logits import FullTarget, TopTarget, divergence_loss
from kvgraft.models.head import Head, head_of, hidden_states
from kvgraft.recipe import LogitLossRecipe
from kvgraft.store.top_log_probs import unpack_top

_BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}


@dataclass(frozen=True)
class LogitTeacher:
    """What the loss has to know of one teacher.

    Attributes:
        vocabulary: token ids that its tokenizer gives.
        shared: whether the student's tokenizer is the same.
        model: the teacher itself where it runs beside the student; None where its store is read.
    """

    vocabulary: int
    shared: bool
    model: PreTrainedModel | None = None


@dataclass(frozen=True)
class LogitPart:
    """The recipe's logit loss against every teacher.

    Attributes:
        loss: the recipe's ``logit_loss`` section.
        teachers: by name.
        student_vocabulary: token ids that the student's tokenizer gives.
    """

    loss: LogitLossRecipe
    teachers: Mapping[str, LogitTeacher]
    student_vocabulary: int

    def losses(
        self,
        student: PreTrainedModel,
        hidden: Tensor,
        input_ids: Tensor,
        targets: Mapping[str, LogitTargets],
        counts: Mapping[str, Tensor | int],
    ) -> dict[str, Tensor]:
        """Loss of each teacher.

        Args:
            hidden: the student's last hidden states ``[batch, tokens, hidden_size]``.
            input_ids: what it read ``[batch, tokens]``.
            targets: each teacher's batch of :meth:`LogitSource.targets`.
            counts: what each teacher's loss is divided by; default the true entries of its mask.
        """
        head = head_of(student).cut(self.student_vocabulary)
        found = {}
        for name, target in targets.items():
            count = counts.get(name, target["mask"].sum())
            teacher = self.teachers[name]
            if self.loss.form == "chunk_likelihood":
                found[name] = self._chunk_loss(head, hidden, input_ids, teacher, target, count)
            else:
                found[name] = self._distribution_loss(head, hidden, teacher, target, count)
        return found

    def _distribution_loss(
        self, head: Head, hidden: Tensor, teacher: LogitTeacher, target: LogitTargets, count: Tensor | int
    ) -> Tensor:
        mask, temperature = target["mask"], self.loss.temperature
        expected: FullTarget | TopTarget
        if teacher.model is None:
            expected = TopTarget(*unpack_top(target["words"][mask], teacher.vocabulary))
        else:
            states = hidden_states(teacher.model, target["input_ids"], target["attention_mask"])
            rows, index = mask.nonzero()[:, 0], target["teacher_index"][mask]
            expected = FullTarget(
                states[rows.to(states.device), index.to(states.device)],
                head_of(teacher.model).cut(teacher.vocabulary),
            )
        if self.loss.form == "sorted_probability":
            return sorted_probability_loss(hidden[mask], head, expected, temperature=temperature, num_tokens=count)
        beta = _BETAS.get(self.loss.form, self.loss.beta)
        return divergence_loss(hidden[mask], head, expected, beta=beta, temperature=temperature, num_tokens=count)

    def _chunk_loss(
        self,
        head: Head,
        hidden: Tensor,
        input_ids: Tensor,
        teacher: LogitTeacher,
        target: LogitTargets,
        count: Tensor | int,
    ) -> Tensor:
        mask, chunk = target["mask"], _over_batch(target["chunk"], target["mask"])
        inside = (chunk >= 0).flatten()
        next_ids = input_ids.roll(-1, 1).flatten()[inside]
        own = token_log_likelihood(hidden.flatten(0, 1)[inside], head, next_ids)
        likelihood = own.new_zeros(mask.numel()).index_add(0, chunk.flatten()[inside], own)
        if teacher.model is None:
            expected = target["chunk_log_likelihood"].flatten()
        else:
            # Token t + 1 of the teacher is predicted at t.
            theirs = _over_batch(target["teacher_chunk"], mask)[:, 1:].flatten()
            read = theirs >= 0
            states = hidden_states(teacher.model, target["input_ids"], target["attention_mask"])
            states = states[:, :-1].flatten(0, 1)[read.to(states.device)]
            teacher_head = head_of(teacher.model).cut(teacher.vocabulary)
            next_teacher_ids = target["input_ids"][:, 1:].flatten()[read].to(states.device)
            with torch.no_grad():
                tokens = token_log_likelihood(states, teacher_head, next_teacher_ids)
            expected = sum_by_chunk(tokens.to(mask.device), theirs[read], mask.numel())
        counted = mask.flatten()
        return chunk_likelihood_loss(
            likelihood[counted], expected[counted], temperature=self.loss.temperature, num_chunks=count
        )


def _over_batch(chunk: Tensor, mask: Tensor) -> Tensor:
    """Chunk numbers that run on from text to text; -1 stays."""
    first = torch.arange(len(mask), device=mask.device)[:, None] * mask.shape[1]
    return torch.where(chunk >= 0, chunk + first, chunk)
