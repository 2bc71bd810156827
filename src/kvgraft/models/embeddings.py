"""Embeddings of a new student that start from a teacher's, through the text that both read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgraft.align.tokens import align_tokens
from kvgraft.data.spans import Spans
from kvgraft.errors import AlignmentError


class ReadText(Protocol):
    """A text as one tokenizer reads it."""

    @property
    def input_ids(self) -> Sequence[int]: ...

    @property
    def spans(self) -> Spans: ...


@dataclass(frozen=True)
class EmbeddingStart:
    """What some tokens of a student start from.

    Attributes:
        token_ids: int64 ``[tokens]``, rising.
        rows: float32 ``[tokens, columns]``, columns of falling variance around 0, not scaled yet.
    """

    token_ids: Tensor
    rows: Tensor


def aligned_embeddings(
    texts: Iterable[tuple[ReadText, ReadText]], vocabulary: int, embeddings: Tensor
) -> tuple[Tensor, Tensor]:
    """For each student token the mean embedding of the teacher tokens that share a byte with it, over all texts.

    Args:
        texts: each as the student and as the teacher reads it.
        vocabulary: tokens of the student.
        embeddings: the teacher's, ``[teacher tokens, width]``.

    Returns:
        int64 ``[tokens]``, the student tokens that stand for text that a teacher token stands for too, rising; and
        their means, float32 ``[tokens, width]``.
    """
    embeddings = embeddings.detach().float().cpu()
    sums, counts = torch.zeros(vocabulary, embeddings.shape[1]), torch.zeros(vocabulary)
    for student, teacher in texts:
        student_index, teacher_index = align_tokens(student.spans, teacher.spans, "mean").pairs()
        own = torch.tensor(student.input_ids)[student_index]
        sums.index_add_(0, own, embeddings[torch.tensor(teacher.input_ids)[teacher_index]])
        counts += torch.bincount(own, minlength=vocabulary)
    seen = counts.nonzero()[:, 0]
    return seen, sums[seen] / counts[seen, None]


def principal_rows(rows: Tensor, width: int) -> Tensor:
    """``rows [tokens, any width]`` in their first ``width`` principal components, or as many as there are.

    Raises:
        AlignmentError: the rows do not differ, so that there is no component.
    """
    centred = (rows - rows.mean(0)).double()
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    count = min(width, len(rows) - 1, rows.shape[1])
    if count < 1 or not variances[-1] > 0:
        raise AlignmentError(
            f"embeddings cannot start from a teacher's: the training text has {len(rows)} tokens of the student whose "
            "text a teacher token covers, and at least two that differ are needed; give more text"
        )
    return (centred @ directions.flip(1)[:, :count]).float()


@torch.no_grad()
def start_embeddings(model: PreTrainedModel, start: EmbeddingStart) -> None:
    """Put ``start`` into the input embeddings of ``model``, as widely spread as what it replaces.

    Columns beyond those of ``start`` and all other tokens stay as they are. A head that is tied to the embeddings
    starts with them; one of its own is left alone.
    """
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    rows = start.rows[:, : weight.shape[1]]
    replaced = weight[start.token_ids, : rows.shape[1]].float()
    rows = rows * (replaced.std() / rows.square().mean().sqrt())
    weight[start.token_ids, : rows.shape[1]] = rows.to(weight.dtype)
