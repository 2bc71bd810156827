"""The layer map that two models' KV of the same text speaks for, found once and kept beside the stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kvgraft.align.cka import pairwise_cka
from kvgraft.align.evidence import EvidenceMethod, LayerEvidence, monotone_map
from kvgraft.align.tokens import AlignmentPolicy, align_tokens, gather_aligned
from kvgraft.data.batching import EncodedExample
from kvgraft.data.spans import EncodedText
from kvgraft.errors import AlignmentError
from kvgraft.fit.data import KVRows, join_rows
from kvgraft.fit.scan import scan_rows
from kvgraft.kv import KV
from kvgraft.models.capture import capture
from kvgraft.progress import progress_bar
from kvgraft.projector.settings import Direction
from kvgraft.store.atomic_file import write_text_atomically

CALIBRATION_TOKENS = 4096
_KEPT_OUT_EVERY = 5


def find_layers(
    path: Path,
    method: EvidenceMethod,
    load_student: Callable[[], PreTrainedModel],
    load_teacher: Callable[[], PreTrainedModel],
    student_texts: Sequence[EncodedExample],
    teacher_texts: Sequence[EncodedText],
    policy: AlignmentPolicy,
    skip_first_tokens: int,
    direction: Direction,
) -> LayerEvidence:
    """What ``path`` holds; where there is nothing, both models read the texts and the result is written there.

    Args:
        path: see :func:`kvgraft.align.evidence.evidence_path`.
        method: ``cka``, or ``predictive``: least squares in ``direction``, R2 on every fifth text.
        student_texts, teacher_texts: the same texts as each reads them; as many are taken as make 4096 tokens.

    Raises:
        AlignmentError: fewer than two texts have a token that both models answer for.
    """
    if path.is_file():
        return LayerEvidence.model_validate_json(path.read_text(encoding="utf-8"))
    student, teacher = load_student().eval(), load_teacher()
    found: list[KVRows] = []
    tokens = 0
    with progress_bar(f"which layers go together ({method})", CALIBRATION_TOKENS, "tokens") as advance:
        for own, other in zip(student_texts, teacher_texts, strict=True):
            found.append(_rows(student, teacher, own, other, policy, skip_first_tokens))
            tokens += len(found[-1])
            advance(len(found[-1]))
            if tokens >= CALIBRATION_TOKENS:
                break
    found = [rows for rows in found if len(rows)]
    if len(found) < 2:
        raise AlignmentError(f"alignment.layers {method} needs two training texts with aligned tokens; use ratio")
    scores = _cka(join_rows(found)) if method == "cka" else _predictive(found, direction)
    evidence = LayerEvidence(method=method, tokens=tokens, scores=scores, layer_map=monotone_map(scores))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, evidence.model_dump_json(indent=1))
    return evidence


def _rows(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    own: EncodedExample,
    other: EncodedText,
    policy: AlignmentPolicy,
    skip_first_tokens: int,
) -> KVRows:
    """Every layer of both models over the student's tokens of one text: teacher as source, student as target."""
    student_kv = capture(student, torch.tensor([own.input_ids])).to("cpu")
    teacher_kv = capture(teacher, torch.tensor([other.input_ids])).to("cpu")
    aligned = gather_aligned(teacher_kv, align_tokens(own.spans, other.spans, policy))
    mask = aligned.mask[0].clone()
    mask[:skip_first_tokens] = False

    def chosen(kv: KV) -> torch.Tensor:
        return torch.stack([part[0][:, mask].float() for part in replace(kv, mask=aligned.mask).flatten()])

    return KVRows(chosen(aligned), chosen(student_kv))


def _cka(rows: KVRows) -> list[list[float]]:
    by_kind = [pairwise_cka(target, source) for target, source in zip(rows.target, rows.source, strict=True)]
    scores: list[list[float]] = torch.stack(by_kind).mean(0).tolist()
    return scores


def _predictive(found: list[KVRows], direction: Direction) -> list[list[float]]:
    kept_out = join_rows(found[::_KEPT_OUT_EVERY])
    others = join_rows([rows for index, rows in enumerate(found) if index % _KEPT_OUT_EVERY])
    if direction == "student_to_teacher":
        kept_out, others = (KVRows(rows.target, rows.source) for rows in (kept_out, others))
    scan = scan_rows(others, kept_out)
    r2 = (scan.keys_r2 + scan.values_r2) / 2
    scores: list[list[float]] = (r2.T if direction == "student_to_teacher" else r2).tolist()
    return scores
