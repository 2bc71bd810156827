"""Tokens meet by position: pieces behind each other, the student's own among them, gaps."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvgraft.errors import GraftError
from kvgraft.graft import cache_from_kv, concatenate, with_own_tokens
from kvgraft.graft.pieces import in_order
from kvgraft.kv import KV
from kvgraft.models import cache
from kvgraft.models.capture import capture
from tests.graft.students import GREEDY, plain_logits, student_of
from tests.models.test_capture import CONFIGS, VOCABULARY, padded_batch


def ids(batch: int, tokens: int, seed: int = 3) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def tokens_of(kv: KV, wanted: slice, positions_from: int) -> KV:
    """Some tokens of ``kv`` as a piece that counts its positions from ``positions_from``."""
    count = kv.mask[:, wanted].shape[1]
    return replace(
        kv,
        keys=kv.keys[..., wanted, :],
        values=kv.values[..., wanted, :],
        positions=(torch.arange(count) + positions_from).expand(len(kv.mask), -1),
        mask=kv.mask[:, wanted],
    )


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_text_cut_in_three_and_concatenated_is_the_text(family: str) -> None:
    student = student_of(family)
    input_ids, following = ids(2, 12), ids(2, 3, 4)
    with torch.no_grad():
        whole = capture(student, input_ids)
        pieces = [tokens_of(whole, part, 0) for part in (slice(0, 5), slice(5, 6), slice(6, 12))]
        joined = concatenate(pieces)
        assert torch.equal(joined.positions, whole.positions)
        logits = student(**cache_from_kv(student, joined).forward_inputs(following)).logits
    for row in range(2):
        expected = plain_logits(student, input_ids[row], following[row])
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=0)


def test_padded_pieces_run_on_row_by_row() -> None:
    student = student_of("llama")
    input_ids, mask, _ = padded_batch()
    following = ids(2, 3, 4)
    with torch.no_grad():
        piece, second = capture(student, input_ids, mask), capture(student, ids(2, 4))
        joined = in_order(concatenate([piece, second]))
        one_by_one = [
            concatenate([capture(student, input_ids[row][mask[row].bool()][None]), capture(student, ids(2, 4)[[row]])])
            for row in range(2)
        ]
        logits = student(**cache_from_kv(student, joined).forward_inputs(following)).logits
        for row in range(2):
            alone = student(**cache_from_kv(student, one_by_one[row]).forward_inputs(following[[row]])).logits
            torch.testing.assert_close(logits[row], alone[0], atol=1e-5, rtol=0)
    assert joined.positions[:, -1].tolist() == [11, 11]


@pytest.mark.parametrize("family", CONFIGS)
def test_gaps_are_hidden_and_keep_their_positions(family: str) -> None:
    """As a plain model that is told not to look at these tokens; sliding windows count them as it does."""
    student = student_of(family)
    input_ids, following = ids(2, 10), ids(2, 3, 4)
    seen = torch.ones(2, 10, dtype=torch.long)
    seen[0, [0, 3, 7]] = 0
    seen[1, [0, 8, 9]] = 0
    positions = torch.arange(10).expand(2, -1)
    with torch.no_grad():
        kv = replace(capture(student, input_ids), mask=seen.bool(), positions=positions)
        # What is hidden must not come through, whatever it is.
        hidden = ~kv.mask[:, None, None, :, None]
        kv = replace(kv, keys=kv.keys.masked_fill(hidden, torch.nan), values=kv.values.masked_fill(hidden, torch.nan))
        grafted = cache_from_kv(student, kv)
        logits = student(**grafted.forward_inputs(following)).logits
        # The reference reads all tokens and is then told to look away from some of them.
        own = student(input_ids=input_ids, use_cache=True).past_key_values
        whole = torch.cat([seen, torch.ones(2, 3, dtype=torch.long)], 1)
        later = (torch.arange(3) + 10).expand(2, -1)
        expected = student(input_ids=following, attention_mask=whole, position_ids=later, past_key_values=own).logits
    assert grafted.next_positions.tolist() == [10, 10]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(not cache._GENERATE_COUNTS_POSITIONS, reason="this transformers' generate cannot")
def test_generation_counts_on_behind_gaps() -> None:
    student = student_of("llama")
    input_ids, following = ids(1, 10), ids(1, 3, 4)
    with torch.no_grad():
        kv = capture(student, input_ids)
        kv.mask[0, [0, 3]] = False
        inputs = cache_from_kv(student, kv).generate_inputs(following)
        answer = student.generate(**inputs, max_new_tokens=6, **GREEDY)[0, inputs["input_ids"].shape[1] :]
        # Token by token through plain forward passes.
        given = following
        for _ in range(6):
            logits = student(**cache_from_kv(student, kv).forward_inputs(given)).logits
            given = torch.cat([given, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(answer, given[0, 3:])


def test_gaps_are_refused_where_generate_finds_positions_by_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_GENERATE_COUNTS_POSITIONS", False)
    student = student_of("llama")
    kv = capture(student, ids(2, 10))
    assert "position_ids" not in cache_from_kv(student, kv).generate_inputs(ids(2, 3))
    kv.mask[0, 3] = False
    with pytest.raises(GraftError, match=r"gaps.*transformers 5\.2"):
        cache_from_kv(student, kv).generate_inputs(ids(2, 3))
    beginning = replace(kv, positions=kv.positions + 1, mask=torch.ones_like(kv.mask))
    with pytest.raises(GraftError, match=r"position 0.*transformers 5\.2"):
        cache_from_kv(student, beginning).generate_inputs(ids(2, 3))


@pytest.mark.parametrize("family", CONFIGS)
def test_own_tokens_fill_gaps_and_stand_first(family: str) -> None:
    student = student_of(family)
    input_ids, mask, _ = padded_batch()
    with torch.no_grad():
        own = capture(student, input_ids, mask)
        foreign = replace(own, keys=own.keys + 1, values=own.values - 1, mask=own.mask.clone())
        foreign.mask[0, [5, 10]] = False
        foreign.mask[1, 0] = False
        mixed = in_order(with_own_tokens(foreign, own, first_tokens=2))
    for row, own_positions in enumerate([{0, 1, 2, 7}, {0, 1}]):
        real = mixed.mask[row]
        assert mixed.positions[row][real].tolist() == list(range(8))
        expected = own.keys[row][:, :, own.mask[row]].clone()
        others = [position for position in range(8) if position not in own_positions]
        expected[:, :, others] += 1
        torch.testing.assert_close(mixed.keys[row][:, :, real], expected)


def test_own_tokens_in_place_are_those_put_in_order() -> None:
    """Where slots are positions nothing is sorted; the same tokens behind each other are."""
    student = student_of("llama")
    with torch.no_grad():
        kv, own = capture(student, ids(2, 10)), capture(student, ids(2, 6, 4))
        kv.mask[0, [1, 4, 5, 8]] = False
        own.mask[1, 5] = False
        kv.mask[1, 5] = False
    reversed_order = torch.arange(9, -1, -1)
    elsewhere = replace(
        kv,
        keys=kv.keys[..., reversed_order, :],
        values=kv.values[..., reversed_order, :],
        positions=kv.positions[:, reversed_order],
        mask=kv.mask[:, reversed_order],
    )
    in_place = with_own_tokens(kv, own, first_tokens=2)
    assert in_place.mask.shape == kv.mask.shape
    assert in_order(in_place).mask.tolist() == [[True] * 8 + [False, True], [True] * 5 + [False] + [True] * 4]
    sorted_out = in_order(with_own_tokens(elsewhere, own, first_tokens=2))
    for name in ("keys", "values", "positions", "mask"):
        assert torch.equal(getattr(in_order(in_place), name), getattr(sorted_out, name))


def test_a_stored_constant_serves_every_row() -> None:
    student = student_of("llama")
    input_ids, mask, _ = padded_batch()
    with torch.no_grad():
        kv, constant = capture(student, input_ids, mask), capture(student, ids(1, 3))
        mixed = in_order(with_own_tokens(kv, constant, first_tokens=3))
    for row in range(2):
        real = mixed.mask[row]
        assert torch.equal(mixed.keys[row][:, :, real][:, :, :3], constant.keys[0])
        assert torch.equal(mixed.values[row][:, :, real][:, :, 3:], kv.values[row][:, :, kv.mask[row]][:, :, 3:])


def test_gradients_reach_what_was_grafted() -> None:
    student = student_of("gemma3_text").requires_grad_(False)
    kv = capture(student, ids(1, 8))
    keys = kv.keys.clone().requires_grad_()
    values = kv.values.clone().requires_grad_()
    grafted = cache_from_kv(student, replace(kv, keys=keys, values=values))
    student(**grafted.forward_inputs(ids(1, 3, 4))).logits.square().sum().backward()
    # The last three of a window of 4 in the sliding layers, all of them in the other.
    reached = keys.grad.abs().amax((0, 2, 4)) > 0
    assert reached.tolist() == [[False] * 5 + [True] * 3, [True] * 8, [False] * 5 + [True] * 3]
    assert values.grad.abs().sum() > 0


def bad(kv: KV, case: str) -> KV:
    if case == "two at one":
        return replace(kv, positions=kv.positions.clamp_max(3))
    if case == "below 0":
        return replace(kv, positions=kv.positions - 1)
    if case == "empty row":
        return replace(kv, mask=torch.tensor([[True] * 5, [False] * 5]))
    return tokens_of(kv, slice(0, 0), 0)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("two at one", r"row 0 has 2 tokens at position 3.*concatenate"),
        ("below 0", "position below 0"),
        ("empty row", "row 1 has no token to graft"),
        ("no token", r"empty \(batch, tokens \[2, 0\]\)"),
    ],
)
def test_tokens_without_a_place_are_refused(case: str, message: str) -> None:
    student = student_of("llama")
    with pytest.raises(GraftError, match=message):
        cache_from_kv(student, bad(capture(student, ids(2, 5)), case))


def test_pieces_that_do_not_go_together_are_refused() -> None:
    student, other = student_of("llama"), student_of("gpt2")
    kv = capture(student, ids(2, 5))
    with pytest.raises(GraftError, match="nothing to concatenate"):
        concatenate([])
    with pytest.raises(GraftError, match=r"piece 1 has .*\(2, 3, 4, 8\).*\(2, 3, 2, 8\)"):
        concatenate([kv, capture(other, ids(2, 5))])
    with pytest.raises(GraftError, match="piece 1 are rotated"):
        concatenate([kv, capture(student, ids(2, 5), rotated=True)])
    with pytest.raises(GraftError, match=r"own_kv has .*\(3, "):
        with_own_tokens(kv, capture(student, ids(3, 5)))
    with pytest.raises(GraftError, match="own_kv are rotated"):
        with_own_tokens(kv, capture(student, ids(2, 5), rotated=True))
    with pytest.raises(GraftError, match="holds 2 of the first 4 tokens in row 0"):
        with_own_tokens(kv, capture(student, ids(1, 2)), first_tokens=4)
