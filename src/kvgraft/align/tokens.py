"""Which teacher tokens each student token learns from, by byte offsets over the same text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kvgraft.data.spans import EncodedText, Spans
from kvgraft.errors import AlignmentError
from kvgraft.kv import KV

AlignmentPolicy = Literal["cover", "causal", "mean"]


@dataclass(frozen=True)
class TokenAlignment:
    """The teacher tokens of each student token.

    Attributes:
        ranges: int32 ``[student_tokens, 2]``, half-open ranges of teacher token indices; empty where there is none.
        teacher_text: bool ``[teacher_tokens]``, false for the teacher's special tokens and others that stand for no
            byte of the text. They are never chosen: one inside a range is left out of it.
        policy: the policy that chose.
        dropped: number of student tokens without a teacher token, by reason: ``special`` (the student token stands
            for no byte of the text), ``beyond_teacher`` (the teacher's tokens end too early for it: truncation, or
            characters at the end that the teacher drops), ``no_match`` (no teacher token overlaps it, or for
            ``causal`` none ends as early).
    """

    ranges: Spans
    teacher_text: NDArray[np.bool_]
    policy: AlignmentPolicy
    dropped: Mapping[str, int]

    @property
    def aligned(self) -> NDArray[np.bool_]:
        """bool ``[student_tokens]``: which student tokens have a teacher token."""
        return self.ranges[:, 1] > self.ranges[:, 0]

    @property
    def coverage(self) -> float:
        """Share of the student's text tokens that have a teacher token; 0 where the student has no text token."""
        text_tokens = len(self.ranges) - self.dropped["special"]
        return int(self.aligned.sum()) / text_tokens if text_tokens else 0.0

    @property
    def mean_span(self) -> float:
        """Teacher tokens per aligned student token, on average; 0 where none is aligned."""
        student_index, _ = self.pairs()
        return len(student_index) / int(self.aligned.sum()) if len(student_index) else 0.0

    def pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Student index and teacher index of each chosen pair, in the student's order."""
        starts = self.ranges[:, 0].astype(np.int64)
        lengths = self.ranges[:, 1] - starts
        student_index = np.repeat(np.arange(len(starts)), lengths)
        within = np.arange(len(student_index)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        teacher_index = starts[student_index] + within
        chosen = self.teacher_text[teacher_index]
        return student_index[chosen], teacher_index[chosen]


def align_encoded(student: EncodedText, teacher: EncodedText, policy: AlignmentPolicy = "cover") -> TokenAlignment:
    """``align_tokens`` for two tokenizations of one text.

    Raises:
        AlignmentError: the two were made from different texts.
    """
    if student.sample_key != teacher.sample_key:
        raise AlignmentError(
            f"student and teacher tokens come from different texts: the student's has {student.text_bytes} bytes "
            f"(sha256 {student.sample_key[:12]}), the teacher's {teacher.text_bytes} bytes "
            f"(sha256 {teacher.sample_key[:12]}). Encode the same text with both tokenizers; if a chat template is "
            "used, apply one template before encoding."
        )
    return align_tokens(student.spans, teacher.spans, policy)


def align_tokens(
    student_spans: ArrayLike, teacher_spans: ArrayLike, policy: AlignmentPolicy = "cover"
) -> TokenAlignment:
    """Teacher tokens for each student token of the same text.

    A student token that starts where the teacher's tokens have ended, and a token of either side with an empty span,
    is matched with nothing.

    Args:
        student_spans: ``[student_tokens, 2]`` byte spans as ``encode_with_spans`` gives them; empty for special tokens.
        teacher_spans: ``[teacher_tokens, 2]``, the same for the teacher.
        policy: ``"cover"`` (default): the first teacher token that ends at or after the student token's end, so that
            its KV has seen all that the student's has. ``"causal"``: the last teacher token that ends at or before
            it, so that its KV has seen nothing more. ``"mean"``: all teacher tokens that share a byte with it.

    Raises:
        AlignmentError: an unknown policy, or spans that are not in order and disjoint.
    """
    if policy not in get_args(AlignmentPolicy):
        raise AlignmentError(f"unknown alignment policy {policy!r}; use one of {', '.join(get_args(AlignmentPolicy))}")
    student, teacher = _checked(student_spans, "student"), _checked(teacher_spans, "teacher")
    teacher_text = teacher[:, 1] > teacher[:, 0]
    text_tokens = np.flatnonzero(teacher_text)
    starts, ends = teacher[text_tokens].T
    teacher_end = ends[-1] if len(ends) else 0

    student_starts, student_ends = student.T
    if policy == "cover":
        first = np.searchsorted(ends, student_ends, side="left")
        last = np.minimum(first, len(ends) - 1)
    elif policy == "causal":
        last = np.searchsorted(ends, student_ends, side="right") - 1
        first = np.maximum(last, 0)
    else:
        first = np.searchsorted(ends, student_starts, side="right")
        last = np.searchsorted(starts, student_ends, side="left") - 1

    special = student_starts == student_ends
    reach = student_ends if policy == "cover" else student_starts + 1
    beyond = ~special & (reach > teacher_end)
    found = ~special & ~beyond & (first <= last)
    ranges = np.zeros_like(student, dtype=np.int32)
    ranges[found, 0] = text_tokens[first[found]]
    ranges[found, 1] = text_tokens[last[found]] + 1
    dropped = {
        "special": int(special.sum()),
        "beyond_teacher": int(beyond.sum()),
        "no_match": int((~special & ~beyond & ~found).sum()),
    }
    return TokenAlignment(ranges, teacher_text, policy, dropped)


def _checked(spans: ArrayLike, side: str) -> NDArray[np.int64]:
    array = np.asarray(spans, dtype=np.int64)
    if array.ndim != 2 or array.shape[1] != 2:
        raise AlignmentError(f"{side} spans must be [tokens, 2] byte offsets; got shape {list(array.shape)}")
    text = array[array[:, 0] != array[:, 1]].reshape(-1)
    if (np.diff(text) < 0).any() or (text < 0).any():
        raise AlignmentError(
            f"{side} spans must be in order and disjoint, each with start <= end; "
            "use encode_with_spans, which makes them so"
        )
    return array


def gather_aligned(kv: KV, alignment: TokenAlignment) -> KV:
    """Teacher KV on the student's tokens: the mean over each student token's teacher tokens.

    Args:
        kv: teacher KV of one text, ``[1, layers, heads, teacher_tokens, head_dim]``, keys before rotation: a rotated
            key carries the teacher's position, which is not the student's.
        alignment: from this text's two tokenizations.

    Returns:
        ``[1, layers, heads, student_tokens, head_dim]`` in the same dtype, zero where a student token has no teacher
        token; positions ``0 .. student_tokens - 1``; mask true where there is a teacher token.

    Raises:
        AlignmentError: a batch of several texts, another number of teacher tokens, rotated keys, or a chosen teacher
            token that is padding.
    """
    batch, _, _, teacher_tokens, _ = kv.keys.shape
    if batch != 1 or teacher_tokens != len(alignment.teacher_text):
        raise AlignmentError(
            f"gather_aligned takes the KV of one text with the {len(alignment.teacher_text)} teacher tokens of its "
            f"alignment; got {batch} texts of {teacher_tokens} tokens. Cut padding off and gather text by text."
        )
    if kv.rotated:
        raise AlignmentError(
            "keys are rotated to the teacher's positions and cannot move to the student's; "
            "capture with rotated=False and rotate after gathering"
        )
    students, teachers = alignment.pairs()
    if not bool(kv.mask[0, torch.from_numpy(teachers)].all()):
        raise AlignmentError("the alignment chooses teacher tokens that the KV's mask marks as padding")
    student_tokens = len(alignment.ranges)
    counts = np.bincount(students, minlength=student_tokens)
    move = _mean_over_pairs if counts.max(initial=0) > 1 or not len(teachers) else _pick
    device = kv.keys.device
    pairs = (torch.from_numpy(students).to(device), torch.from_numpy(teachers).to(device))
    numbers = torch.from_numpy(counts).to(device)
    return KV(
        keys=move(kv.keys, *pairs, numbers),
        values=move(kv.values, *pairs, numbers),
        positions=torch.arange(student_tokens, device=device)[None],
        mask=torch.from_numpy(alignment.aligned).to(device)[None],
        layers=kv.layers,
    )


def _pick(tensor: Tensor, students: Tensor, teachers: Tensor, counts: Tensor) -> Tensor:
    """As :func:`_mean_over_pairs`, where no mean is of more than one token."""
    if len(students) == len(counts):
        return tensor.index_select(3, teachers)
    # Any token where there is none: taking all and clearing a few is faster than filling zeros in.
    index = torch.zeros_like(counts).index_copy_(0, students, teachers)
    return tensor.index_select(3, index).index_fill_(3, (counts == 0).nonzero()[:, 0], 0)


def _mean_over_pairs(tensor: Tensor, students: Tensor, teachers: Tensor, counts: Tensor) -> Tensor:
    """Mean of the tokens ``teachers`` that share an entry of ``students``: ``[..., student_tokens, width]``.

    ``counts [student_tokens]`` is how many each has; zeros where none.
    """
    shape = (*tensor.shape[:3], len(counts), tensor.shape[4])
    # Sums in float32 at least: half precision would round after every token.
    wide = torch.promote_types(tensor.dtype, torch.float32)
    chosen = tensor.index_select(3, teachers).to(wide)
    sums = torch.zeros(shape, dtype=wide, device=tensor.device).index_add(3, students, chosen)
    return (sums / counts.clamp(min=1).to(wide)[:, None]).to(tensor.dtype)
