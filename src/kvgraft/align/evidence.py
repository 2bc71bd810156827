"""Which layers of two models go together, told from their KV of the same text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from kvgraft.errors import AlignmentError

EvidenceMethod = Literal["cka", "predictive"]
EVIDENCE_METHODS: tuple[EvidenceMethod, ...] = ("cka", "predictive")


class LayerEvidence(BaseModel):
    """Scores of every pair of layers and the map that follows from them.

    Attributes:
        method: ``cka``: linear CKA; ``predictive``: R2 of least squares on texts kept out; means of keys and values.
        tokens: of calibration text.
        scores: ``[student layers][teacher layers]``, 1 is best.
        layer_map: pairs of (student layer, teacher layer), by :func:`monotone_map`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: EvidenceMethod
    tokens: int
    scores: list[list[float]]
    layer_map: list[tuple[int, int]]


def monotone_map(scores: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Pairs (student layer, teacher layer) with the highest sum of ``scores [student][teacher]``.

    Every student layer gets one teacher layer and a deeper one never gets an earlier one; among maps of equal sum that
    of the earliest teacher layers.

    Raises:
        AlignmentError: there are no scores.
    """
    if not scores or not scores[0]:
        raise AlignmentError("a layer map needs scores of at least one student layer and one teacher layer")
    # best[t]: highest sum of the layers so far where none goes past teacher layer t.
    best = [0.0] * len(scores[0])
    ends: list[list[int]] = []
    for row in scores:
        sums = [before + score for before, score in zip(best, row, strict=True)]
        end = [0] * len(sums)
        for teacher in range(1, len(sums)):
            end[teacher] = teacher if sums[teacher] > sums[end[teacher - 1]] else end[teacher - 1]
        best = [sums[teacher] for teacher in end]
        ends.append(end)
    teacher = len(best) - 1
    chosen = []
    for student in reversed(range(len(ends))):
        teacher = ends[student][teacher]
        chosen.append((student, teacher))
    return chosen[::-1]


def evidence_path(folder: Path, method: str, *identity: object) -> Path:
    """Where the evidence is kept that follows from ``identity``: both models, tokenizers, text and settings."""
    digest = hashlib.sha256(json.dumps([method, *identity], default=str).encode()).hexdigest()[:16]
    return folder / f"layers-{method}-{digest}.json"
