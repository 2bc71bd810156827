"""What is held against what: the four ways in which a projector lets a student's KV and a teacher's meet (SPEC R6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvgraft.kv import KV
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.projector.settings import Direction
from kvgraft.projector.sources import Pair


@dataclass(frozen=True)
class Comparison:
    """One side that has to come closer to the other: both ``[batch, layers, tokens, width]``."""

    predicted: Pair
    target: Pair


def student_to_teacher(
    projector: KVDimensionProjector, teacher: str, student_kv: KV, teacher_kv: KV
) -> list[Comparison]:
    """The student's KV, through an adapter, predicts the teacher's own KV, which never moves. The default."""
    return [Comparison(projector.project_student_kv(teacher, student_kv), teacher_kv.flatten())]


def teacher_to_student(
    projector: KVDimensionProjector, teacher: str, student_kv: KV, teacher_kv: KV
) -> list[Comparison]:
    """The student's KV is pulled to the projected teacher's; the projector is fitted before and frozen."""
    return [Comparison(student_kv.flatten(), _detach(projector.project_teacher_kv(teacher, teacher_kv)))]


def shared(projector: KVDimensionProjector, teacher: str, student_kv: KV, teacher_kv: KV) -> list[Comparison]:
    """The guide's objective: projector and student trained together on one loss between them.

    Measured to leave the student 1.1 to 1.4 nats worse than no KV at all (docs/results.md); kept for comparison.
    """
    return [Comparison(student_kv.flatten(), projector.project_teacher_kv(teacher, teacher_kv))]


def alternating(projector: KVDimensionProjector, teacher: str, student_kv: KV, teacher_kv: KV) -> list[Comparison]:
    """The guide's objective with each side fitted to the other's detached output.

    The gradients, and with them what is trained, are those of :func:`shared`; only the loss that is told is twice it.
    """
    projected, own = projector.project_teacher_kv(teacher, teacher_kv), student_kv.flatten()
    return [Comparison(own, _detach(projected)), Comparison(projected, _detach(own))]


OBJECTIVES: dict[str, Callable[[KVDimensionProjector, str, KV, KV], list[Comparison]]] = {
    "student_to_teacher": student_to_teacher,
    "teacher_to_student": teacher_to_student,
    "alternating": alternating,
    "shared": shared,
}


def projector_direction(objective: str) -> Direction:
    """Direction of the adapters that ``objective`` needs."""
    return "student_to_teacher" if objective == "student_to_teacher" else "teacher_to_student"


def _detach(pair: Pair) -> Pair:
    keys, values = pair
    return keys.detach(), values.detach()
