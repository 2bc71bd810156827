"""How far a student's next-token distribution is from its teacher's, over one vocabulary.

The losses start from hidden states and run over chunks of tokens: the gradient of a chunk is taken at once, inside the
forward pass, and its logits are forgotten. ``[tokens, vocabulary]`` is never held, whatever the number of tokens (after
Liger's fused linear distillation, arXiv 2410.10989).

Every loss is a sum over tokens divided by ``num_tokens``, so that accumulating micro-batches or processes gives the
gradient of the whole batch. No factor ``temperature ** 2`` is put on, as in GKD.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvgraft.errors import KVGraftError
from kvgraft.gradients import times_arriving
from kvgraft.models.head import Head, as_the_head_reads

# Logits of a chunk and the teacher's beside them fill about this many numbers each.
_CHUNK_NUMBERS = 6 << 20
_FEWEST_CHUNK_TOKENS = 32

# Student and teacher logits (or log-probabilities) of a chunk to the loss of each token; the gradient on the student's
# is written over them.
Compare = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class FullTarget:
    """A teacher's whole distribution, given by what makes it: ``hidden [tokens, hidden_size]`` and its head."""

    hidden: Tensor
    head: Head

    @torch.no_grad()
    def logits(self, rows: slice, device: torch.device | None = None) -> Tensor:
        """``[rows, vocabulary]``, on ``device`` where the teacher lives on another."""
        return self.head.logits(self.hidden[rows]).to(device=device)


@dataclass(frozen=True)
class TopTarget:
    """A teacher's most likely tokens and the mass of the rest.

    Attributes:
        ids: int64 ``[tokens, top]``, distinct in each row.
        log_probs: ``[tokens, top]``, at the temperature of the loss.
        rest: ``[tokens]``, log of the mass of all other tokens.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor


def divergence_loss(
    hidden: Tensor,
    head: Head,
    target: FullTarget | TopTarget,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    num_tokens: Tensor | int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of student and teacher (GKD, arXiv 2306.13649, equation 1): a scalar.

    ``beta * KL(teacher | mixture) + (1 - beta) * KL(student | mixture)`` with the mixture ``beta * teacher +
    (1 - beta) * student``. 0 is the forward KL(teacher | student), 1 the reverse KL(student | teacher). Against a
    :class:`TopTarget` all other tokens count as one outcome, on both sides; that is a lower bound, exact where the
    student agrees on how the rest is shared out.

    Args:
        hidden: the student's ``[tokens, hidden_size]``, those that count only.
        head: the student's, of the vocabulary that both share (:meth:`Head.cut`).
        target: the teacher's distribution of the same tokens. Nothing of it gets a gradient.
        temperature: divides both sides' logits. A :class:`TopTarget` has to be made at the same one.
        num_tokens: what to divide by; default the tokens given.
        chunk_tokens: tokens whose logits are held at once; default by the vocabulary.

    Raises:
        KVGraftError: shapes or vocabularies that do not go together, or settings out of range.
    """
    if not 0 <= beta <= 1 or not temperature > 0:
        raise KVGraftError(f"beta must lie in [0, 1] and temperature be positive; got {beta} and {temperature}")
    _require_target(hidden, head, target)

    def compare(logits: Tensor, rows: slice) -> Tensor:
        _divide(logits, temperature)
        if isinstance(target, FullTarget):
            loss = divergence_and_gradient(logits, _divide(target.logits(rows, logits.device), temperature), beta)
        else:
            loss = _top_divergence(logits, target, rows, beta)
        _divide(logits, temperature)
        return loss

    return chunked_loss(hidden, head, compare, num_tokens, chunk_tokens)


def cross_entropy_loss(hidden: Tensor, head: Head, token_ids: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Mean negative log-likelihood of ``token_ids [tokens]`` after ``hidden [tokens, hidden_size]``: a scalar."""

    def compare(logits: Tensor, rows: slice) -> Tensor:
        ids = token_ids[rows, None]
        logits.sub_(logits.logsumexp(-1, keepdim=True))
        loss = -logits.gather(-1, ids)[:, 0]
        logits.exp_().scatter_add_(-1, ids, logits.new_full(ids.shape, -1.0))
        return loss

    return chunked_loss(hidden, head, compare, chunk_tokens=chunk_tokens)


def chunked_loss(
    hidden: Tensor,
    head: Head,
    compare: Compare,
    num_tokens: Tensor | int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sum of ``compare`` over all tokens divided by ``num_tokens``, with the gradient of ``hidden`` and head.

    Args:
        compare: gets a chunk's logits ``[rows, vocabulary]`` and which rows they are; returns each token's loss and
            writes its gradient over the logits.

    The other arguments are those of :func:`divergence_loss`.
    """
    count = hidden.shape[0] if num_tokens is None else num_tokens
    chunk_tokens = chunk_tokens or default_chunk_tokens(head.vocabulary)
    hidden = as_the_head_reads(hidden)
    total: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head, compare, chunk_tokens
    )
    return total / torch.as_tensor(count, device=hidden.device).clamp_min(1)


def default_chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits are held at once: about 25 MB of them."""
    return max(_FEWEST_CHUNK_TOKENS, _CHUNK_NUMBERS // vocabulary)


def divergence_and_gradient(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Divergence of each row; see :func:`divergence_loss` for ``beta``.

    Args:
        student, teacher: logits ``[rows, outcomes]``, normalised or not. Both are overwritten: ``student`` with the
            gradient of the divergence on the student's logits, ``teacher`` with nothing of use.

    Returns:
        ``[rows]``.
    """
    student.sub_(student.logsumexp(-1, keepdim=True))
    teacher.sub_(teacher.logsumexp(-1, keepdim=True))
    if beta == 0:
        probabilities = teacher.exp()
        log_ratio = teacher.sub_(student)
        loss = torch.linalg.vecdot(probabilities, _finite(log_ratio))
        student.exp_().sub_(probabilities)
        return loss
    # log of student over mixture; the mixture is the teacher itself for the reverse KL.
    if beta == 1:
        mixture = teacher
        teacher_loss: Tensor | float = 0.0
    else:
        mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
        log_ratio = teacher - mixture
        probabilities = teacher.exp_()
        teacher_loss = beta * torch.linalg.vecdot(probabilities, _finite(log_ratio))
    log_ratio = torch.sub(student, mixture, out=mixture)
    probabilities = student.exp_()
    student_loss = torch.linalg.vecdot(probabilities, _finite(log_ratio))
    weight = 1.0 if beta == 1 else 1 - beta
    student.mul_(log_ratio.sub_(student_loss[:, None])).mul_(weight)
    return teacher_loss + weight * student_loss


def _divide(logits: Tensor, temperature: float) -> Tensor:
    """``logits`` over ``temperature``, in place; a pass over them is spared where that is 1."""
    return logits if temperature == 1.0 else logits.div_(temperature)


def _finite(log_ratio: Tensor) -> Tensor:
    """``log_ratio`` without infinities, in place: an impossible outcome then adds 0 and not 0 times infinity."""
    return log_ratio.nan_to_num_(nan=0.0)


def _top_divergence(logits: Tensor, target: TopTarget, rows: slice, beta: float) -> Tensor:
    """Divergence over the teacher's top tokens and one outcome for the rest; the gradient is written on ``logits``."""
    ids = target.ids[rows]
    top = logits.gather(-1, ids)
    others = logits.scatter_(-1, ids, -torch.inf)
    rest = others.logsumexp(-1, keepdim=True)
    outcomes = torch.cat([top, rest], -1)
    teacher = torch.cat([target.log_probs[rows], target.rest[rows, None]], -1).float()
    if torch.isneginf(rest).any():
        # The top tokens are the whole vocabulary. A mass that nothing can take must not count on either side.
        outcomes, teacher = outcomes[:, :-1].contiguous(), teacher[:, :-1].contiguous()
    loss = divergence_and_gradient(outcomes, teacher, beta)
    gradient = outcomes
    if gradient.shape[-1] > ids.shape[-1]:
        # The logit of the rest is a log-sum over its tokens: each takes its share of that outcome's gradient.
        others.sub_(rest).exp_().mul_(gradient[:, -1:])
    others.scatter_(-1, ids, gradient[:, : ids.shape[-1]])
    return loss


def _require_target(hidden: Tensor, head: Head, target: FullTarget | TopTarget) -> None:
    rows = target.hidden.shape[0] if isinstance(target, FullTarget) else target.ids.shape[0]
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1] or rows != hidden.shape[0]:
        raise KVGraftError(
            f"hidden states must be [tokens, {head.weight.shape[1]}] with a teacher's distribution for each token; got "
            f"{list(hidden.shape)} and {rows} distributions"
        )
    if isinstance(target, FullTarget) and target.head.vocabulary != head.vocabulary:
        raise KVGraftError(
            f"the student's vocabulary has {head.vocabulary} tokens and the teacher's {target.head.vocabulary}: cut "
            "both heads to the tokens of the shared tokenizer, or use a loss for different vocabularies"
        )
    if isinstance(target, TopTarget) and target.ids.numel() and int(target.ids.max()) >= head.vocabulary:
        raise KVGraftError(
            f"the teacher's distribution names token {int(target.ids.max())} and the student's vocabulary has "
            f"{head.vocabulary}; both must use one tokenizer"
        )


class _ChunkedLoss(torch.autograd.Function):
    """Sum of a loss over chunks of tokens; gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        compare: Compare,
        chunk_tokens: int,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        hidden_gradient = torch.empty_like(hidden) if wanted[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # Autocast would choose a dtype for each product; all are in that of the hidden states.
        with torch.autocast(hidden.device.type, enabled=False):
            projection = weight.to(hidden.dtype)
            head = replace(head, weight=projection)
            for first in range(0, hidden.shape[0], chunk_tokens):
                rows = slice(first, first + chunk_tokens)
                logits = head.logits(hidden[rows])
                kept = logits.clone() if head.softcap is not None and any(wanted) else None
                total += compare(logits, rows).sum()
                if any(wanted):
                    gradient = _raw_gradient(logits, kept, head).to(hidden.dtype)
                    if hidden_gradient is not None:
                        torch.mm(gradient, projection, out=hidden_gradient[rows])
                    if weight_gradient is not None:
                        _add_product(weight_gradient, gradient, hidden[rows])
                    if bias_gradient is not None:
                        bias_gradient += gradient.sum(0, dtype=torch.float32)
                    del gradient
                # Let go before the next chunk's are made, which would stand beside them.
                del logits, kept
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(times_arriving(ctx.saved_tensors, arriving), ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None)


def _raw_gradient(gradient: Tensor, logits: Tensor | None, head: Head) -> Tensor:
    """The gradient on what the linear map gave, from the one on the logits; in place."""
    if logits is not None and head.softcap is not None:
        gradient.mul_(1 - logits.div_(head.softcap).square_())
    return gradient.mul_(head.scale) if head.scale != 1.0 else gradient


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    if gradient.dtype == torch.float32:
        total.addmm_(gradient.T, hidden)
    else:
        total += gradient.T @ hidden
