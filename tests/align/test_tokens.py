"""Teacher tokens for each student token, against a search over all pairs of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgraft.align.tokens import (
    AlignmentPolicy,
    TokenAlignment,
    align_encoded,
    align_tokens,
    gather_aligned,
)
from kvgraft.data.spans import encode_with_spans
from kvgraft.errors import AlignmentError
from kvgraft.kv import KV
from tests.data.test_spans import NAMES, encode_or_none, nonempty_texts, sample_tokenizers

POLICIES: tuple[AlignmentPolicy, ...] = get_args(AlignmentPolicy)
Span = tuple[int, int]


def reference_teachers(student: Span, teachers: list[Span], policy: AlignmentPolicy) -> list[int]:
    """The teacher tokens of one student token, by looking at each of them."""
    start, end = student
    text = [index for index, (first, last) in enumerate(teachers) if first < last]
    teacher_end = max((teachers[index][1] for index in text), default=0)
    if start == end or start >= teacher_end:
        return []
    if policy == "cover":
        return [index for index in text if teachers[index][1] >= end][:1]
    if policy == "causal":
        return [index for index in text if teachers[index][1] <= end][-1:]
    return [index for index in text if teachers[index][0] < end and teachers[index][1] > start]


def assert_matches_reference(alignment: TokenAlignment, students: list[Span], teachers: list[Span]) -> None:
    chosen: list[list[int]] = [[] for _ in students]
    for student, teacher in zip(*alignment.pairs(), strict=True):
        chosen[student].append(int(teacher))
    expected = [reference_teachers(student, teachers, alignment.policy) for student in students]
    assert chosen == expected
    assert alignment.aligned.tolist() == [bool(tokens) for tokens in expected]
    assert alignment.teacher_text.tolist() == [first < last for first, last in teachers]

    text_tokens = [index for index, (first, last) in enumerate(students) if first < last]
    teacher_end = max((last for first, last in teachers if first < last), default=0)
    unmatched = [index for index in text_tokens if not expected[index]]
    reached = [students[i][1] if alignment.policy == "cover" else students[i][0] + 1 for i in unmatched]
    beyond = sum(byte > teacher_end for byte in reached)
    assert dict(alignment.dropped) == {
        "special": len(students) - len(text_tokens),
        "beyond_teacher": beyond,
        "no_match": len(unmatched) - beyond,
    }
    matched = len(text_tokens) - len(unmatched)
    assert alignment.coverage == (matched / len(text_tokens) if text_tokens else 0.0)
    assert alignment.mean_span == pytest.approx(sum(map(len, expected)) / matched if matched else 0.0)


@st.composite
def spans(draw: st.DrawFn) -> list[Span]:
    """Ordered, disjoint spans with gaps and with empty spans anywhere."""
    position, made = 0, []
    for gap, length, special in draw(
        st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, 2]), st.integers(1, 4), st.booleans()), max_size=12)
    ):
        if special:
            made.append((position, position))
        else:
            made.append((position + gap, position + gap + length))
            position += gap + length
    return made


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(students=spans(), teachers=spans())
def test_any_spans_match_the_reference(policy: AlignmentPolicy, students: list[Span], teachers: list[Span]) -> None:
    alignment = align_tokens(as_array(students), as_array(teachers), policy)
    assert_matches_reference(alignment, students, teachers)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    text=nonempty_texts,
    names=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
    lengths=st.tuples(st.none() | st.integers(3, 9), st.none() | st.integers(3, 9)),
)
def test_any_two_tokenizers_match_the_reference(
    policy: AlignmentPolicy, text: str, names: tuple[str, str], lengths: tuple[int | None, int | None]
) -> None:
    tokenizers = sample_tokenizers()
    student, teacher = (
        encode_or_none(tokenizers[name], text, length) for name, length in zip(names, lengths, strict=True)
    )
    if student is not None and teacher is not None:
        alignment = align_encoded(student, teacher, policy)
        as_lists = [[(int(start), int(end)) for start, end in side.spans] for side in (student, teacher)]
        assert_matches_reference(alignment, *as_lists)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_with_itself_is_one_to_one(name: str, policy: AlignmentPolicy) -> None:
    encoded = encode_with_spans(sample_tokenizers()[name], "Maya has 12 apples.\n你好 😀")
    alignment = align_encoded(encoded, encoded, policy)
    is_text = np.flatnonzero(encoded.spans[:, 0] < encoded.spans[:, 1])
    for side in alignment.pairs():
        np.testing.assert_array_equal(side, is_text)
    assert alignment.coverage == 1.0
    assert alignment.mean_span == 1.0


# Student:  |ab|c|def|gh|      Teacher: <s> |a|bcd|e|<x>|f|gh|
STUDENT = [(0, 2), (2, 3), (3, 6), (6, 8)]
TEACHER = [(0, 0), (0, 1), (1, 4), (4, 5), (5, 5), (5, 6), (6, 8)]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("cover", [[2], [2], [5], [6]]),
        ("causal", [[1], [1], [5], [6]]),
        ("mean", [[1, 2], [2], [2, 3, 5], [6]]),
    ],
)
def test_policies_on_a_worked_example(policy: AlignmentPolicy, expected: list[list[int]]) -> None:
    student_index, teacher_index = align_tokens(STUDENT, TEACHER, policy).pairs()
    assert [teacher_index[student_index == token].tolist() for token in range(4)] == expected


def test_cover_is_the_default() -> None:
    assert align_tokens(STUDENT, TEACHER).policy == "cover"


@pytest.mark.parametrize("policy", POLICIES)
def test_student_tokens_behind_a_truncated_teacher_get_nothing(policy: AlignmentPolicy) -> None:
    alignment = align_tokens(STUDENT, TEACHER[:3], policy)
    assert alignment.aligned.tolist() == [True, True, policy != "cover", False]
    assert alignment.dropped["beyond_teacher"] == (2 if policy == "cover" else 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_teacher_without_text_tokens_gives_nothing(policy: AlignmentPolicy) -> None:
    alignment = align_tokens(STUDENT, [(0, 0)], policy)
    assert not alignment.aligned.any()
    assert (alignment.coverage, alignment.mean_span) == (0.0, 0.0)


def test_different_texts_are_refused() -> None:
    tokenizer = sample_tokenizers()["byte_bpe"]
    with pytest.raises(AlignmentError, match=r"different texts: the student's has 3 bytes .* the teacher's 4 bytes"):
        align_encoded(encode_with_spans(tokenizer, "abc"), encode_with_spans(tokenizer, "abcd"))


def test_unknown_policy_is_refused() -> None:
    policy: Any = "nearest"
    with pytest.raises(AlignmentError, match="'nearest'; use one of cover, causal, mean"):
        align_tokens(STUDENT, TEACHER, policy)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([0, 1, 2], r"must be \[tokens, 2\] byte offsets; got shape \[3\]"),
        ([(0, 1, 2)], r"got shape \[1, 3\]"),
        ([(2, 4), (0, 2)], "in order and disjoint"),
        ([(0, 3), (2, 4)], "in order and disjoint"),
        ([(3, 1)], "in order and disjoint"),
        ([(-1, 1)], "in order and disjoint"),
    ],
)
def test_bad_spans_are_refused_on_either_side(bad: Any, message: str) -> None:
    with pytest.raises(AlignmentError, match=f"student spans .*{message}"):
        align_tokens(bad, TEACHER)
    with pytest.raises(AlignmentError, match=f"teacher spans .*{message}"):
        align_tokens(STUDENT, bad)


def as_array(pairs: list[Span]) -> np.ndarray[Any, Any]:
    return np.array(pairs, dtype=np.int32).reshape(-1, 2)


def teacher_kv(tokens: int, dtype: torch.dtype = torch.float32) -> KV:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 3, 2, tokens, 4, generator=generator).to(dtype)
    return KV(keys, values, torch.arange(tokens)[None] + 5, torch.ones(1, tokens, dtype=torch.bool), (1, 4, 6))


def loop_gather(tensor: torch.Tensor, alignment: TokenAlignment) -> torch.Tensor:
    gathered = torch.zeros(*tensor.shape[:3], len(alignment.ranges), tensor.shape[4])
    pairs = list(zip(*alignment.pairs(), strict=True))
    for student in range(len(alignment.ranges)):
        chosen = [int(teacher) for of, teacher in pairs if of == student]
        for teacher in chosen:
            gathered[:, :, :, student] += tensor[:, :, :, teacher].float() / len(chosen)
    return gathered


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(students=spans(), teachers=spans())
def test_gather_matches_a_loop(policy: AlignmentPolicy, students: list[Span], teachers: list[Span]) -> None:
    alignment = align_tokens(as_array(students), as_array(teachers), policy)
    kv = teacher_kv(len(teachers))
    gathered = gather_aligned(kv, alignment)
    assert gathered.keys.shape == (1, 3, 2, len(students), 4)
    torch.testing.assert_close(gathered.keys, loop_gather(kv.keys, alignment), rtol=0, atol=1e-6)
    torch.testing.assert_close(gathered.values, loop_gather(kv.values, alignment), rtol=0, atol=1e-6)
    assert gathered.positions.tolist() == [list(range(len(students)))]
    assert gathered.mask.tolist() == [alignment.aligned.tolist()]
    assert gathered.layers == kv.layers
    assert not gathered.rotated


def test_gather_keeps_the_dtype_and_averages_in_float32() -> None:
    alignment = align_tokens([(0, 64)], [(byte, byte + 1) for byte in range(64)], "mean")
    kv = teacher_kv(64, torch.bfloat16)
    gathered = gather_aligned(kv, alignment)
    assert gathered.keys.dtype == torch.bfloat16
    torch.testing.assert_close(gathered.keys[:, :, :, 0], kv.keys.float().mean(3).to(torch.bfloat16), rtol=1e-2, atol=0)


@pytest.mark.parametrize("policy", POLICIES)
def test_gather_of_float16_goes_on_under_autocast(policy: AlignmentPolicy) -> None:
    # The student's first token stands for no byte and has no teacher token.
    alignment = align_tokens([(0, 0), (0, 1), (1, 2)], [(0, 1), (1, 2)], policy)
    kv = teacher_kv(2, torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        gathered = gather_aligned(kv, alignment)
    assert gathered.mask.tolist() == [[False, True, True]]
    assert torch.equal(gathered.keys[:, :, :, 1:], kv.keys)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_reach_the_chosen_teacher_tokens_alone(policy: AlignmentPolicy) -> None:
    alignment = align_tokens(STUDENT, TEACHER, policy)
    kv = teacher_kv(len(TEACHER))
    keys = kv.keys.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(gather_aligned(replace(kv, keys=keys), alignment).keys.sum(), keys)
    reached = gradient.abs().sum((0, 1, 2, 4)) > 0
    assert reached.nonzero()[:, 0].tolist() == sorted(set(alignment.pairs()[1].tolist()))


def test_gather_refuses_rotated_keys() -> None:
    kv = replace(teacher_kv(len(TEACHER)), rotated=True)
    with pytest.raises(AlignmentError, match="rotated to the teacher's positions"):
        gather_aligned(kv, align_tokens(STUDENT, TEACHER))


def test_gather_refuses_several_texts() -> None:
    kv = teacher_kv(len(TEACHER))
    two = KV(
        kv.keys.repeat(2, 1, 1, 1, 1),
        kv.values.repeat(2, 1, 1, 1, 1),
        kv.positions.repeat(2, 1),
        kv.mask.repeat(2, 1),
        kv.layers,
    )
    with pytest.raises(AlignmentError, match=r"one text with the 7 teacher tokens .* got 2 texts of 7 tokens"):
        gather_aligned(two, align_tokens(STUDENT, TEACHER))


def test_gather_refuses_another_number_of_tokens() -> None:
    with pytest.raises(AlignmentError, match="got 1 texts of 9 tokens"):
        gather_aligned(teacher_kv(9), align_tokens(STUDENT, TEACHER))


def test_gather_refuses_padding_that_is_chosen_and_allows_the_rest() -> None:
    alignment = align_tokens(STUDENT, TEACHER)
    kv = teacher_kv(len(TEACHER))
    unused, used = kv.mask.clone(), kv.mask.clone()
    unused[0, 3], used[0, 5] = False, False
    assert gather_aligned(replace(kv, mask=unused), alignment).mask.all()
    with pytest.raises(AlignmentError, match="mask marks as padding"):
        gather_aligned(replace(kv, mask=used), alignment)
