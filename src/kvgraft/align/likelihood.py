"""A teacher's likelihood of a text, moved from its own tokens to the student's."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kvgraft.errors import AlignmentError


def move_log_likelihood(log_likelihood: Tensor, teacher_spans: ArrayLike, student_spans: ArrayLike) -> Tensor:
    """Log-likelihood of the bytes that each student token covers: float32 ``[student_tokens]``.

    A teacher token's log-likelihood is spread evenly over its bytes, and a student token sums those of its own, so
    that two teachers with different tokenizers are compared on the same piece of text.

    Args:
        log_likelihood: ``[teacher_tokens]``; NaN where the teacher cannot tell.
        teacher_spans: ``[teacher_tokens, 2]`` byte spans, in order and disjoint; empty for special tokens.
        student_spans: ``[student_tokens, 2]``, the same for the student.

    Returns:
        NaN where a student token stands for no byte, or for one that no teacher token with a likelihood covers.

    Raises:
        AlignmentError: there is not one number for each teacher token.
    """
    teacher, student = (np.asarray(spans, dtype=np.int64) for spans in (teacher_spans, student_spans))
    if log_likelihood.shape != (len(teacher),):
        raise AlignmentError(f"expected {len(teacher)} log-likelihoods, one a token; got {list(log_likelihood.shape)}")
    numbers = log_likelihood.double().cpu().numpy()
    lengths = teacher[:, 1] - teacher[:, 0]
    told = (lengths > 0) & np.isfinite(numbers)
    moved = _sum_over_bytes(teacher[told], numbers[told], student)
    bytes_told = _sum_over_bytes(teacher[told], lengths[told].astype(np.float64), student)
    student_bytes = student[:, 1] - student[:, 0]
    moved[(student_bytes == 0) | (bytes_told < student_bytes - 0.5)] = np.nan
    return torch.from_numpy(moved).float()


def _sum_over_bytes(
    spans: NDArray[np.int64], amounts: NDArray[np.float64], ranges: NDArray[np.int64]
) -> NDArray[np.float64]:
    """What of ``amounts``, each spread evenly over its span, lies in each range."""
    if len(spans) == 0:
        return np.zeros(len(ranges))
    total = np.concatenate([[0.0], np.cumsum(amounts)])
    # The running total by byte: it climbs inside a span and is flat between two.
    places, heights = spans.reshape(-1), np.stack([total[:-1], total[1:]], 1).reshape(-1)
    start, end = (np.interp(ranges[:, side], places, heights) for side in (0, 1))
    return np.asarray(end - start)
