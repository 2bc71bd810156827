"""What one teacher says about the next tokens of each text, on the student's tokens: part of a training batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvgraft.align.predictions import PredictionPairs, same_tokens, shared_boundaries
from kvgraft.data.batching import IGNORED, EncodedExample
from kvgraft.data.spans import EncodedText
from kvgraft.errors import AlignmentError
from kvgraft.store.logits import LogitStore

LogitTargets = dict[str, Tensor]
# What fills a batch up: no chunk, and otherwise a masked zero.
_PADDING = {"chunk": -1, "teacher_chunk": -1}


@dataclass(frozen=True)
class LogitSource:
    """One teacher's distributions over the texts of a run.

    Args:
        name: the teacher.
        texts: every text as the teacher reads it, by sample key.
        shared: whether both models use one tokenizer; otherwise tokens are matched by the bytes at which they end.
        chunks: give likelihoods of chunks of text in place of distributions.
        store: where they are kept; None where the teacher runs beside the student.
    """

    name: str
    texts: Mapping[str, EncodedText]
    shared: bool
    chunks: bool
    store: LogitStore | None

    def targets(self, example: EncodedExample) -> LogitTargets:
        """Tensors of one text; ``mask`` counts what the loss is a mean over.

        With distributions: ``mask [tokens]`` is true where the student's prediction after that token is compared, and
        ``words [tokens, top_k]`` or ``teacher_index [tokens]`` say with what. With chunks: ``chunk [tokens]`` is the
        chunk of the token that the student predicts there (-1 for none), ``mask [chunks]`` says which count, and
        ``chunk_log_likelihood [chunks]`` or ``teacher_chunk [teacher tokens]`` how likely they are. Without a store
        there are the teacher's ``input_ids`` and ``attention_mask [teacher tokens]`` too.
        """
        text = self.texts[example.sample_key]
        pairs = self._pairs(example, text)
        targets = self._chunks(example, text, pairs) if self.chunks else self._distributions(example, pairs)
        if self.store is None:
            targets["input_ids"] = torch.tensor(text.input_ids)
            targets["attention_mask"] = torch.ones(len(text.input_ids), dtype=torch.long)
        return targets

    def coverage(self, examples: Sequence[EncodedExample]) -> float:
        """Share of the student's labelled tokens that a target answers for."""
        labelled = sum(_predicts(example).sum() for example in examples)
        matched = 0
        for example in examples:
            targets = self.targets(example)
            if self.chunks:
                chunk = targets["chunk"]
                matched += int(targets["mask"][chunk[chunk >= 0]].sum())
            else:
                matched += int(targets["mask"].sum())
        return matched / max(int(labelled), 1)

    def _pairs(self, example: EncodedExample, text: EncodedText) -> PredictionPairs:
        if self.shared:
            return same_tokens(example.input_ids, text.input_ids)
        return shared_boundaries(example.spans, text.spans)

    def _distributions(self, example: EncodedExample, pairs: PredictionPairs) -> LogitTargets:
        chosen = _predicts(example)[pairs.student]
        student, teacher = (torch.from_numpy(side[chosen]) for side in (pairs.student, pairs.teacher))
        tokens = len(example.input_ids)
        mask = torch.zeros(tokens, dtype=torch.bool).index_fill(0, student, True)
        if self.store is None:
            return {
                "mask": mask,
                "teacher_index": torch.zeros(tokens, dtype=torch.long).index_copy(0, student, teacher),
            }
        stored = self.store.words(example.sample_key)
        words = stored.new_zeros(tokens, stored.shape[1]).index_copy(0, student, stored[teacher])
        return {"mask": mask, "words": words}

    def _chunks(self, example: EncodedExample, text: EncodedText, pairs: PredictionPairs) -> LogitTargets:
        tokens, count = len(example.input_ids), max(len(pairs.student) - 1, 0)
        own = pairs.chunks(tokens, pairs.student)
        theirs = torch.from_numpy(pairs.chunks(len(text.input_ids), pairs.teacher))
        # Position t predicts token t + 1; the last predicts nothing.
        chunk = np.concatenate([own[1:], [-1]])
        unlabelled = chunk[(chunk >= 0) & ~_predicts(example)]
        mask = torch.ones(count, dtype=torch.bool)
        mask[torch.from_numpy(unlabelled)] = False
        targets = {"chunk": torch.from_numpy(chunk), "mask": mask}
        if self.store is None:
            return {**targets, "teacher_chunk": theirs}
        likelihood = self.store.token_log_likelihood(example.sample_key)
        return {**targets, "chunk_log_likelihood": sum_by_chunk(likelihood, theirs, count)}


def sum_by_chunk(values: Tensor, chunk: Tensor, count: int) -> Tensor:
    """Sum of ``values [tokens]`` over each chunk ``[count]``; tokens of chunk -1 are left out."""
    inside = chunk >= 0
    return values.new_zeros(count).index_add(0, chunk[inside], values[inside])


def collate_targets(samples: Sequence[Mapping[str, LogitTargets]]) -> dict[str, LogitTargets]:
    """One batch of each teacher's targets, filled up to the longest text."""
    return {
        name: {
            field: torch.nn.utils.rnn.pad_sequence(
                [sample[name][field] for sample in samples], batch_first=True, padding_value=_PADDING.get(field, 0)
            )
            for field in first
        }
        for name, first in samples[0].items()
    }


def require_logit_coverage(teacher: str, coverage: float) -> None:
    """Raise AlignmentError where ``teacher`` answers for none of the student's predictions."""
    if coverage == 0:
        raise AlignmentError(
            f"teacher {teacher} answers for none of the student's predictions; check that both read the same text and "
            "that data.max_length leaves room for it"
        )


def _predicts(example: EncodedExample) -> np.ndarray:
    """bool ``[tokens]``: whether the token after each is one that the loss is taken on."""
    labels = np.asarray(example.labels)
    return np.concatenate([labels[1:] != IGNORED, [False]])
