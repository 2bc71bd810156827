"""Several teachers, one loss: how much each teacher has to say about each token.

A teacher may have nothing to say about a token, or about a whole text: it read less of the text, or has no token there.
The others then share its part, so that every token that any teacher answers for counts the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvgraft.distill.losses import mean_error
from kvgraft.errors import KVGraftError
from kvgraft.recipe import Combination


@dataclass(frozen=True)
class FusedLoss:
    """One loss of several teachers'.

    Attributes:
        loss: the teachers' errors, weighted, over the tokens that any of them answers for.
        penalty: what keeps learned weights from falling to zero; 0 for every other combination.
        shares: for each teacher its weight, averaged over those tokens.
    """

    loss: Tensor
    penalty: Tensor
    shares: dict[str, Tensor]


class TeacherFusion(nn.Module):
    """Weighs the errors of several teachers, token by token.

    Args:
        teachers: their names.
        combine: ``mean`` (default): all alike. ``weights``: by ``weights``. ``confidence``: by the probability that
            each gives to the text that the token covers. ``learned``: by ``exp(-s)``, with one ``s`` for each teacher
            that is trained along, and ``s`` itself added to the loss (Kendall et al. 2018, arXiv 1705.07115, equation
            7): the best ``s`` is the logarithm of the teacher's error, so that a teacher who is hard to predict weighs
            less, and none can be ignored.
        weights: for each teacher, not negative and not all zero; for ``weights`` alone.
    """

    def __init__(
        self, teachers: Sequence[str], combine: Combination = "mean", weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.teachers = list(teachers)
        self.combine = combine
        self.weights = None
        if combine == "weights":
            missing = [name for name in self.teachers if name not in (weights or {})]
            if missing:
                raise KVGraftError(f"combine weights needs a weight for every teacher; none for {missing}")
            self.weights = [float((weights or {})[name]) for name in self.teachers]
            if min(self.weights) < 0 or sum(self.weights) <= 0:
                raise KVGraftError(f"weights of teachers must not be negative and not all zero; got {weights}")
        self.log_errors = nn.Parameter(torch.zeros(len(self.teachers))) if combine == "learned" else None

    def token_weights(
        self, masks: Mapping[str, Tensor], log_likelihoods: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """For each teacher what each token's error weighs, ``[batch, tokens]``, before anything learned.

        Args:
            masks: for each teacher ``[batch, tokens]`` bool, the tokens that it answers for.
            log_likelihoods: for each teacher ``[batch, tokens]``, needed for ``confidence``; NaN where unknown.
        """
        answered = torch.stack([masks[name] for name in self.teachers])
        return dict(zip(self.teachers, self._token_weights(answered, log_likelihoods), strict=True))

    def combined(
        self, losses: Mapping[str, Tensor], weights: Mapping[str, Tensor], num_tokens: Tensor | int
    ) -> FusedLoss:
        """One loss of each teacher's ``losses``, sums of errors by :meth:`token_weights` over ``num_tokens``."""
        shares = torch.stack([mean_error(weights[name].flatten(), num_tokens) for name in self.teachers])
        parts = torch.stack([losses[name] for name in self.teachers])
        penalty = shares.new_zeros(())
        if self.log_errors is not None:
            learned = torch.exp(-self.log_errors)
            penalty = (shares * self.log_errors).sum()
            parts, shares = parts * learned, shares * learned
        return FusedLoss(parts.sum(), penalty, dict(zip(self.teachers, shares.detach(), strict=True)))

    def _token_weights(self, answered: Tensor, log_likelihoods: Mapping[str, Tensor] | None) -> Tensor:
        if self.combine != "confidence":
            weights = None if self.weights is None else answered.new_tensor(self.weights, dtype=torch.float32)
            return share_by_weight(answered, weights)
        missing = [name for name in self.teachers if name not in (log_likelihoods or {})]
        if missing:
            raise KVGraftError(
                f"kv_loss.combine is confidence and teachers {missing} bring no token likelihoods; run `kvgraft cache` "
                "with this recipe, which adds one number per token and leaves the stored KV as it is"
            )
        return share_by_confidence(answered, torch.stack([(log_likelihoods or {})[name] for name in self.teachers]))


def count_answered(masks: Mapping[str, Tensor]) -> Tensor:
    """Number of tokens that any teacher answers for."""
    return torch.stack(list(masks.values())).any(0).sum()


def share_by_weight(answered: Tensor, weights: Tensor | None = None) -> Tensor:
    """Each teacher's part in each token, ``[teachers, batch, tokens]``: 0 where it has no answer, 1 in sum elsewhere.

    Args:
        answered: ``[teachers, batch, tokens]`` bool, where each teacher has an answer.
        weights: ``[teachers]``, not negative; default equal. A token that only teachers of weight 0 answer gets none.
    """
    shares = answered.float()
    if weights is not None:
        shares = shares * weights[:, None, None]
    return shares / shares.sum(0).clamp_min(torch.finfo(shares.dtype).tiny)


def share_by_confidence(answered: Tensor, log_likelihoods: Tensor) -> Tensor:
    """:func:`share_by_weight` with the probability that each teacher gives to the token's text as its weight.

    Args:
        answered: ``[teachers, batch, tokens]`` bool.
        log_likelihoods: ``[teachers, batch, tokens]``, natural logarithms; NaN where a teacher cannot tell, as at the
            start of a text. Such a token is shared equally by those who answer.
    """
    known = (log_likelihoods.isfinite() | ~answered).all(0)
    scores = torch.where(answered & known, log_likelihoods.float(), 0.0)
    scores = scores.masked_fill(~answered, torch.finfo(scores.dtype).min)
    return scores.softmax(0) * answered
