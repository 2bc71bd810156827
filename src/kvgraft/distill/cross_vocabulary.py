"""Logit losses between models that cut text differently: sorted probabilities, and likelihoods of shared byte spans."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvgraft.distill.logits import FullTarget, TopTarget, chunked_loss, default_chunk_tokens
from kvgraft.errors import KVGraftError
from kvgraft.models.head import Head, as_the_head_reads


def sorted_probability_loss(
    hidden: Tensor,
    head: Head,
    target: FullTarget | TopTarget,
    *,
    temperature: float = 1.0,
    num_tokens: Tensor | int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Summed distance of both sides' probabilities, each sorted (ULD, arXiv 2402.12030): a scalar.

    The shorter vocabulary is filled up with zeros. Against a :class:`TopTarget` the student's own most likely tokens
    meet the teacher's, and the masses of both rests each other; that is a lower bound of the whole distance.

    Args:
        hidden: the student's ``[tokens, hidden_size]`` where both models predict the same byte.
        head: the student's.
        target: the teacher's distribution there; its token ids are not looked at.

    The other arguments are those of :func:`kvgraft.distill.logits.divergence_loss`.
    """
    if not temperature > 0:
        raise KVGraftError(f"temperature must be positive; got {temperature}")

    def compare(logits: Tensor, rows: slice) -> Tensor:
        probabilities = logits.div_(temperature).softmax(-1)
        if isinstance(target, FullTarget):
            expected = target.logits(rows, logits.device).div_(temperature).softmax(-1).sort(-1, descending=True).values
            found, order = probabilities.sort(-1, descending=True)
        else:
            width = min(target.log_probs.shape[-1], head.vocabulary)
            expected = torch.cat([target.log_probs[rows], target.rest[rows, None]], -1).float().exp()
            # What the student has no token for is part of the teacher's rest.
            expected = torch.cat([expected[:, :width], expected[:, width:].sum(-1, keepdim=True)], -1)
            found, order = probabilities.topk(width, -1)
            found = torch.cat([found, 1 - found.sum(-1, keepdim=True)], -1)
        surplus = expected.shape[-1] - found.shape[-1]
        difference = F.pad(found, (0, max(surplus, 0))) - F.pad(expected, (0, max(-surplus, 0)))
        sign = difference.sign()[:, : found.shape[-1]]
        if isinstance(target, FullTarget):
            signs = logits.scatter_(-1, order, sign)
        else:
            # Tokens of the rest pull together.
            signs = logits.copy_(sign[:, -1:].expand_as(logits)).scatter_(-1, order, sign[:, :-1])
        mean_sign = torch.linalg.vecdot(signs, probabilities)
        signs.sub_(mean_sign[:, None]).mul_(probabilities).div_(temperature)
        return difference.abs().sum(-1)

    return chunked_loss(hidden, head, compare, num_tokens, chunk_tokens)


def token_log_likelihood(hidden: Tensor, head: Head, token_ids: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Log-probability ``[tokens]`` of ``token_ids [tokens]`` after ``hidden [tokens, hidden_size]``, with its gradient.

    Logits are made a chunk at a time, and once more for the gradient.
    """
    if hidden.shape[0] != token_ids.shape[0]:
        raise KVGraftError(f"{hidden.shape[0]} hidden states cannot go with {token_ids.shape[0]} token ids")
    chunk_tokens = chunk_tokens or default_chunk_tokens(head.vocabulary)
    hidden = as_the_head_reads(hidden)
    parameters = (hidden, head.weight) if head.bias is None else (hidden, head.weight, head.bias)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in parameters)):
        return head.log_likelihood_in_chunks(hidden, token_ids, chunk_tokens)
    found_with_gradient: Tensor = _TokenLogLikelihood.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head, token_ids, chunk_tokens
    )
    return found_with_gradient


def chunk_likelihood_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, num_chunks: Tensor | int | None = None
) -> Tensor:
    """KL between teacher and student on whether a chunk of text comes next (ALM, arXiv 2503.20083): a scalar.

    Each chunk of bytes that both models cut at both ends has a likelihood ``p`` under each. Compared are the two
    outcomes ``p ** (1 / temperature)`` and one minus it. The paper uses a temperature of 100, where the long chunks
    count too; at 1 the likelihood of a long chunk is about 0 on both sides.

    Args:
        student, teacher: log-likelihoods ``[chunks]``.
        num_chunks: what to divide by; default the chunks given.
    """
    if student.shape != teacher.shape or not temperature > 0:
        raise KVGraftError(
            f"student and teacher need one likelihood for each chunk and a positive temperature; got "
            f"{list(student.shape)}, {list(teacher.shape)} and {temperature}"
        )
    count = student.shape[0] if num_chunks is None else num_chunks
    # Likelihood 1 has no gradient that is finite; nothing is as certain as that.
    highest = -torch.finfo(torch.float32).eps
    own = (student.float() / temperature).clamp_max(highest)
    target = (teacher.detach().float() / temperature).clamp_max(highest)
    loss = target.exp() * (target - own) - torch.expm1(target) * (_log1mexp(target) - _log1mexp(own))
    return loss.sum() / torch.as_tensor(count, device=student.device).clamp_min(1)


def _log1mexp(value: Tensor) -> Tensor:
    """``log(1 - exp(value))`` for negative ``value``."""
    return torch.log(-torch.expm1(value))


class _TokenLogLikelihood(torch.autograd.Function):
    """:func:`token_log_likelihood`; each chunk's graph is made again in backward and thrown away."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        token_ids: Tensor,
        chunk_tokens: int,
    ) -> Tensor:
        ctx.head, ctx.chunk_tokens = head, chunk_tokens
        ctx.save_for_backward(hidden, weight, bias, token_ids)
        with torch.autocast(hidden.device.type, enabled=False):
            return token_log_likelihood(hidden, head, token_ids, chunk_tokens)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, token_ids = ctx.saved_tensors
        wanted = [index for index in range(3) if ctx.needs_input_grad[index]]
        gradients: list[Tensor | None] = [
            torch.zeros_like(tensor, dtype=torch.float32) if index in wanted else None
            for index, tensor in enumerate((hidden, weight, bias))
        ]
        projection = weight.to(hidden.dtype)
        with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, hidden.shape[0], ctx.chunk_tokens):
                rows = slice(first, first + ctx.chunk_tokens)
                inputs = [
                    None if tensor is None else tensor.detach().requires_grad_(index in wanted)
                    for index, tensor in enumerate((hidden[rows], projection, bias))
                ]
                chunk, chunk_weight, chunk_bias = inputs
                assert chunk is not None
                assert chunk_weight is not None
                head = Head(chunk_weight, chunk_bias, ctx.head.scale, ctx.head.softcap)
                found = head.log_likelihood(chunk, token_ids[rows])
                leaves = [tensor for index, tensor in enumerate(inputs) if index in wanted and tensor is not None]
                parts = torch.autograd.grad(found, leaves, upstream[0][rows])
                for index, part in zip(wanted, parts, strict=True):
                    total = gradients[index]
                    assert total is not None
                    (total[rows] if index == 0 else total).add_(part)
        cast = [
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, (hidden, weight, bias), strict=True)
        ]
        return (*cast, None, None, None)
