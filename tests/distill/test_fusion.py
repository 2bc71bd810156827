"""One loss from several teachers' against plain loops, and what each combination may not do."""

import math

import pytest
import torch
from torch import Tensor

from kvgraft.distill.fusion import FusedLoss, TeacherFusion, count_answered
from kvgraft.distill.losses import mean_error
from kvgraft.errors import KVGraftError

BATCH, TOKENS = 2, 6
NAMES = ["a", "b", "c"]


def made_up() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Errors, masks and log-likelihoods; teacher c is missing for the second text, nobody answers the last token."""
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(BATCH, TOKENS, generator=generator) < 0.7 for name in NAMES}
    masks["c"][1] = False
    for mask in masks.values():
        mask[:, -1] = False
    errors = {name: torch.rand(int(mask.sum()), generator=generator) for name, mask in masks.items()}
    likelihoods = {name: -5 * torch.rand(BATCH, TOKENS, generator=generator) for name in NAMES}
    return errors, masks, likelihoods


def fuse(fusion: TeacherFusion, errors, masks, log_likelihoods=None, num_tokens=None) -> FusedLoss:
    """The errors ``[true entries of its mask]`` of all teachers as one loss."""
    weights = fusion.token_weights(masks, log_likelihoods)
    if num_tokens is None:
        num_tokens = count_answered({name: masks[name] for name in fusion.teachers})
    losses = {name: mean_error(weights[name][masks[name]] * errors[name], num_tokens) for name in fusion.teachers}
    return fusion.combined(losses, weights, num_tokens)


def reference(weight_of) -> tuple[float, float]:
    """Loss and summed weights over the tokens that any teacher answers; ``weight_of(name, b, t, answering)``."""
    errors, masks, _ = made_up()
    total, weights, count = 0.0, 0.0, 0
    for b in range(BATCH):
        for t in range(TOKENS):
            answering = [name for name in NAMES if masks[name][b, t]]
            count += bool(answering)
            for name in answering:
                place = int(masks[name].flatten()[: b * TOKENS + t].sum())
                weight = weight_of(name, b, t, answering)
                total += weight * float(errors[name][place])
                weights += weight
    return total / count, weights / count


def test_mean_shares_each_token_among_the_teachers_that_answer() -> None:
    errors, masks, _ = made_up()
    fused = fuse(TeacherFusion(NAMES), errors, masks)
    expected, _ = reference(lambda name, b, t, answering: 1 / len(answering))
    assert float(fused.loss) == pytest.approx(expected, rel=1e-5)
    assert sum(float(share) for share in fused.shares.values()) == pytest.approx(1, rel=1e-5)
    assert float(fused.penalty) == 0


def test_fixed_weights_are_renormalised_where_a_teacher_is_missing() -> None:
    errors, masks, _ = made_up()
    weights = {"a": 0.5, "b": 0.2, "c": 0.3}
    fused = fuse(TeacherFusion(NAMES, "weights", weights), errors, masks)
    expected, summed = reference(lambda name, b, t, answering: weights[name] / sum(weights[n] for n in answering))
    assert float(fused.loss) == pytest.approx(expected, rel=1e-5)
    assert summed == pytest.approx(1)


def test_confidence_weighs_by_the_probability_of_the_text() -> None:
    errors, masks, likelihoods = made_up()
    likelihoods["a"][0, 1] = float("nan")  # unknown: all who answer count alike there
    masks["a"][0, 1] = masks["b"][0, 1] = True
    likelihoods["c"][0, 0] = float("nan")  # of a teacher that does not answer: no matter
    masks["c"][0, 0] = False
    errors = {name: torch.rand(int(mask.sum())) for name, mask in masks.items()}
    fused = fuse(TeacherFusion(NAMES, "confidence"), errors, masks, likelihoods)
    total, count = 0.0, 0
    for b in range(BATCH):
        for t in range(TOKENS):
            answering = [name for name in NAMES if masks[name][b, t]]
            count += bool(answering)
            scores = [float(likelihoods[name][b, t]) for name in answering]
            if any(math.isnan(score) for score in scores):
                scores = [0.0] * len(answering)
            for name, score in zip(answering, scores, strict=True):
                place = int(masks[name].flatten()[: b * TOKENS + t].sum())
                total += math.exp(score) / sum(map(math.exp, scores)) * float(errors[name][place])
    assert float(fused.loss) == pytest.approx(total / count, rel=1e-5)


def test_learned_weights_start_as_the_mean_and_settle_at_one_over_each_error() -> None:
    masks = {"easy": torch.ones(1, 4).bool(), "hard": torch.ones(1, 4).bool()}
    errors = {"easy": torch.full((4,), 0.2), "hard": torch.full((4,), 2.0)}
    fusion = TeacherFusion(["easy", "hard"], "learned")
    first = fuse(fusion, errors, masks)
    assert first.loss.item() == pytest.approx(1.1)
    optimizer = torch.optim.Adam(fusion.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        fused = fuse(fusion, errors, masks)
        (fused.loss + fused.penalty).backward()
        optimizer.step()
    # Neither is ignored: half of each teacher's 1 / error, since two share every token.
    assert float(fused.shares["easy"]) == pytest.approx(0.5 / 0.2, rel=0.02)
    assert float(fused.shares["hard"]) == pytest.approx(0.5 / 2.0, rel=0.02)


@pytest.mark.parametrize("combine", ["mean", "weights", "learned", "confidence"])
def test_parts_of_a_batch_add_up_and_one_teacher_is_itself(combine: str) -> None:
    errors, masks, likelihoods = made_up()
    fusion = TeacherFusion(NAMES, combine, {"a": 0.5, "b": 0.2, "c": 0.3})
    if fusion.log_errors is not None:
        fusion.log_errors.data = torch.tensor([0.3, -0.2, 0.1])
    whole = fuse(fusion, errors, masks, likelihoods)
    count = sum(mask for mask in masks.values()).bool().sum()
    parts = []
    for row in range(BATCH):
        before = {name: int(masks[name][:row].sum()) for name in NAMES}
        own = {name: errors[name][before[name] :][: int(masks[name][row].sum())] for name in NAMES}
        rows = ({name: side[name][row : row + 1] for name in NAMES} for side in (masks, likelihoods))
        parts.append(fuse(fusion, own, *rows, num_tokens=count))
    for field in ("loss", "penalty"):
        torch.testing.assert_close(sum(getattr(part, field) for part in parts), getattr(whole, field))
    alone = fuse(TeacherFusion(["a"], combine, {"a": 1.0}), errors, masks, likelihoods)
    torch.testing.assert_close(alone.loss, errors["a"].mean())


def test_nobody_answering_is_zero_with_zero_gradient() -> None:
    masks = dict.fromkeys(NAMES, torch.zeros(1, 3).bool())
    errors = dict.fromkeys(NAMES, torch.zeros(0, requires_grad=True))
    for combine in ("mean", "learned", "confidence"):
        fusion = TeacherFusion(NAMES, combine)
        fused = fuse(fusion, errors, masks, dict.fromkeys(NAMES, torch.full((1, 3), float("nan"))))
        (fused.loss + fused.penalty).backward()
        assert float(fused.loss) == float(fused.penalty) == 0
        assert all(float(parameter.grad.abs().max()) == 0 for parameter in fusion.parameters())


def test_what_cannot_be_combined_is_named() -> None:
    with pytest.raises(KVGraftError, match="not be negative"):
        TeacherFusion(["a", "b"], "weights", {"a": -0.5, "b": 1.5})
    with pytest.raises(KVGraftError, match=r"none for \['b'\]"):
        TeacherFusion(["a", "b"], "weights", {"a": 1.0})
    errors, masks, likelihoods = made_up()
    del likelihoods["b"]
    with pytest.raises(KVGraftError, match=r"\['b'\] bring no token likelihoods; run `kvgraft cache`.*leaves"):
        fuse(TeacherFusion(NAMES, "confidence"), errors, masks, likelihoods)
