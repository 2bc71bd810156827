"""Which teacher layer each student layer learns from."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from kvgraft.align.layers import map_layers, uniform_layer_map
from kvgraft.errors import AlignmentError


@pytest.mark.parametrize(
    ("students", "teachers", "expected"),
    [
        (1, 1, [0]),
        (1, 24, [23]),
        (4, 4, [0, 1, 2, 3]),
        (2, 9, [0, 8]),
        (3, 6, [0, 3, 5]),  # 2.5 is rounded up
        (4, 12, [0, 4, 7, 11]),
        (5, 2, [0, 0, 1, 1, 1]),
        (3, 1, [0, 0, 0]),
    ],
)
def test_ratio_spreads_teacher_layers_and_keeps_both_ends(students: int, teachers: int, expected: list[int]) -> None:
    assert uniform_layer_map(teachers, students) == expected
    assert map_layers("ratio", students, teachers) == list(enumerate(expected))


def test_ratio_is_the_nearest_layer_with_halves_up() -> None:
    for students in range(2, 40):
        for teachers in range(1, 90, 7):
            for layer, chosen in enumerate(uniform_layer_map(teachers, students)):
                exact = Fraction(layer * (teachers - 1), students - 1)
                assert Fraction(-1, 2) < chosen - exact <= Fraction(1, 2)


def test_ratio_goes_by_depth_where_not_all_layers_hold_kv() -> None:
    # Every third layer of six and every fourth of sixteen; in the middle two are as near, and the later is taken.
    student, teacher = [Fraction(2, 5), Fraction(1)], [Fraction(place, 15) for place in (3, 7, 11, 15)]
    assert map_layers("ratio", 2, 4, depths=(student, teacher)) == [(0, 1), (1, 3)]
    assert map_layers("ratio", 1, 2, depths=([Fraction(1, 2)], [Fraction(1, 4), Fraction(3, 4)])) == [(0, 1)]
    assert map_layers("auto", 2, 4, depths=(student, teacher)) == [(0, 1), (1, 3)]
    assert map_layers("last", 2, 4, depths=(student, teacher)) == [(0, 2), (1, 3)]


@pytest.mark.parametrize(
    ("students", "teachers", "expected"),
    [
        (3, 3, [(0, 0), (1, 1), (2, 2)]),
        (2, 5, [(0, 3), (1, 4)]),
        (5, 2, [(3, 0), (4, 1)]),
        (1, 1, [(0, 0)]),
    ],
)
def test_last_pairs_the_top_layers(students: int, teachers: int, expected: list[tuple[int, int]]) -> None:
    assert map_layers("last", students, teachers) == expected


def test_explicit_pairs_come_in_the_order_of_the_student() -> None:
    assert map_layers([[3, 0], (0, 7), [2, 7]], 4, 8) == [(0, 7), (2, 7), (3, 0)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("first", "unknown layer mapping 'first'; use 'ratio', 'last', 'origin', 'auto' or a list"),
        ("", "unknown layer mapping ''"),
        ([], r"at least one \[student, teacher\] pair; got \[\]"),
        (None, "at least one .* pair; got None"),
        (5, "at least one .* pair; got 5"),
        ([3], "layer pair 3 must be two whole numbers"),
        ([[0]], r"layer pair \[0\] must be two whole numbers"),
        ([[0, 1, 2]], r"layer pair \[0, 1, 2\] must be two"),
        ([[0, 1.0]], r"layer pair \[0, 1\.0\] must be two whole numbers"),
        ([[True, 1]], r"layer pair \[True, 1\] must be two whole numbers"),
        (["01"], "layer pair '01' must be two whole numbers"),
        ([[4, 0]], r"layer pair \[4, 0\] is out of range; student layers are 0\.\.3 and teacher layers 0\.\.7"),
        ([[0, 8]], r"layer pair \[0, 8\] is out of range"),
        ([[-1, 0]], r"layer pair \[-1, 0\] is out of range"),
        ([[0, -1]], r"layer pair \[0, -1\] is out of range"),
        ([[1, 0], [1, 5]], r"layer pair \[1, 5\] names student layer 1 again \(already paired with teacher layer 0\)"),
    ],
)
def test_bad_maps_are_refused_by_name(spec: Any, message: str) -> None:
    with pytest.raises(AlignmentError, match=message):
        map_layers(spec, 4, 8)


@pytest.mark.parametrize(("students", "teachers", "side"), [(0, 3, "student"), (3, 0, "teacher"), (-1, 3, "student")])
@pytest.mark.parametrize("spec", ["ratio", "last", [[0, 0]]])
def test_model_without_layers_is_refused(spec: Any, students: int, teachers: int, side: str) -> None:
    with pytest.raises(AlignmentError, match=f"needs a {side} of at least 1 layer"):
        map_layers(spec, students, teachers)
