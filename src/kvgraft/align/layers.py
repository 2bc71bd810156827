"""Which teacher layer each student layer learns from."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from kvgraft.align.evidence import EVIDENCE_METHODS
from kvgraft.errors import AlignmentError


def map_layers(
    spec: str | Sequence[Sequence[int]],
    num_student_layers: int,
    num_teacher_layers: int,
    origin: Sequence[int] | None = None,
    depths: tuple[Sequence[Fraction], Sequence[Fraction]] | None = None,
) -> list[tuple[int, int]]:
    """Pairs ``(student_layer, teacher_layer)`` in the order of the student's layers, each student layer at most once.

    Args:
        spec: ``"ratio"``: every student layer with the teacher layer nearest to its relative depth, so that teacher
            layers are spread evenly with both ends kept (a deeper student repeats teacher layers). ``"last"``: the top
            ``n = min(student, teacher)`` layers of both, one to one and in order, so that the two last layers meet; a
            deeper student's lowest layers get no teacher, a deeper teacher's lowest layers are not used. Or an explicit
            list of ``[student, teacher]`` pairs, in any order, layers counted from 0; a teacher layer may serve several
            student layers, but a student layer has one target per teacher and may not appear twice. ``"origin"``: the
            teacher layer that each student layer was cut from. ``"auto"``: ``origin`` where it is known, else
            ``ratio``.
        num_student_layers: number of the student's layers, at least 1.
        num_teacher_layers: number of the teacher's layers, at least 1.
        origin: for each student layer the teacher layer that it was cut from; default: it was not cut from it.
        depths: where the layers of student and teacher stand in their models, from 0 to 1, where not all layers of a
            model hold KV (:func:`kvgraft.models.geometry.relative_depths`); default: all do.

    Raises:
        AlignmentError: an unknown ``spec``, ``"origin"`` without one, an empty list, or a pair that is malformed, out
            of range or repeated.
    """
    for name, count in (("student", num_student_layers), ("teacher", num_teacher_layers)):
        if count < 1:
            raise AlignmentError(f"layer mapping needs a {name} of at least 1 layer; got {count}")
    if spec == "origin" and origin is None:
        raise AlignmentError(
            "layer mapping 'origin' needs a student cut from the teacher (`kvgraft cut`, or student.cut_from); use "
            "'ratio', 'last' or a list of [student, teacher] pairs"
        )
    if spec in ("auto", "origin") and origin is not None:
        return list(enumerate(origin))
    if spec in ("auto", "ratio"):
        student_depths, teacher_depths = depths or (even_depths(num_student_layers), even_depths(num_teacher_layers))
        return list(enumerate(_nearest(teacher_depths, student_depths)))
    if spec == "last":
        count = min(num_student_layers, num_teacher_layers)
        return [(num_student_layers - back, num_teacher_layers - back) for back in range(count, 0, -1)]
    if spec in EVIDENCE_METHODS:
        raise AlignmentError(
            f"the layer mapping {spec!r} follows from both models' KV, which `kvgraft train`, `cache` and `fit` "
            "compare; here use 'ratio', 'last' or a list of [student, teacher] pairs, such as those of a run's results"
        )
    if isinstance(spec, str):
        raise AlignmentError(
            f"unknown layer mapping {spec!r}; use 'ratio', 'last', 'origin', 'auto' or a list of [student, teacher] "
            "pairs, as [[0, 0]]"
        )
    return _explicit_pairs(spec, num_student_layers, num_teacher_layers)


def uniform_layer_map(num_teacher_layers: int, num_student_layers: int) -> list[int]:
    """Teacher layer for each student layer, spread evenly with both ends kept.

    Returns a list of length ``num_student_layers``; entry ``s`` is in ``[0, num_teacher_layers)`` and is
    ``s * (num_teacher_layers - 1) / (num_student_layers - 1)`` rounded half up. A student of one layer has no two
    ends to keep: it gets the teacher's last layer.
    """
    return _nearest(even_depths(num_teacher_layers), even_depths(num_student_layers))


def even_depths(num_layers: int) -> list[Fraction]:
    """Where each of ``num_layers`` layers stands, from 0 to 1; a single one has no two ends and counts as the last."""
    return [Fraction(layer, num_layers - 1) for layer in range(num_layers)] if num_layers > 1 else [Fraction(1)]


def _nearest(teacher_depths: Sequence[Fraction], student_depths: Sequence[Fraction]) -> list[int]:
    """For each student layer the teacher layer at the nearest depth, of two as near the later."""
    # In fractions, so that a half is never rounded down by floating point.
    return [
        min(range(len(teacher_depths)), key=lambda layer: (abs(teacher_depths[layer] - depth), -layer))
        for depth in student_depths
    ]


def _explicit_pairs(
    spec: Sequence[Sequence[int]], num_student_layers: int, num_teacher_layers: int
) -> list[tuple[int, int]]:
    legal = f"student layers are 0..{num_student_layers - 1} and teacher layers 0..{num_teacher_layers - 1}"
    if not isinstance(spec, Sequence) or not spec:
        raise AlignmentError(f"layer mapping must hold at least one [student, teacher] pair; got {spec!r}; {legal}")
    teacher_of: dict[int, int] = {}
    for pair in spec:
        if (
            not isinstance(pair, Sequence)
            or len(pair) != 2
            or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in pair)
        ):
            raise AlignmentError(f"layer pair {pair!r} must be two whole numbers [student, teacher]; {legal}")
        student, teacher = pair
        if not (0 <= student < num_student_layers and 0 <= teacher < num_teacher_layers):
            raise AlignmentError(f"layer pair [{student}, {teacher}] is out of range; {legal}")
        if student in teacher_of:
            raise AlignmentError(
                f"layer pair [{student}, {teacher}] names student layer {student} again (already paired with teacher "
                f"layer {teacher_of[student]}); give each student layer one teacher layer; {legal}"
            )
        teacher_of[student] = teacher
    return sorted(teacher_of.items())
