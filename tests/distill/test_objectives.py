"""What each objective does to a student that is free to move (SPEC R6): shared collapses, the default does not."""

import pytest
import torch
from torch import nn

from kvgraft.distill.losses import FORMS, KVScale, LossForm, kv_regression_loss
from kvgraft.distill.objectives import OBJECTIVES, projector_direction
from kvgraft.kv import KV
from kvgraft.projector.projector import KVDimensionProjector

LAYERS, TOKENS, TEACHER, STUDENT = 2, 96, 12, 6


def kv_of(keys: torch.Tensor, values: torch.Tensor) -> KV:
    """``[layers, tokens, width]`` as the KV of one text with one head."""
    positions = torch.arange(TOKENS)[None]
    return KV(keys[None, :, None], values[None, :, None], positions, torch.ones(1, TOKENS).bool(), tuple(range(LAYERS)))


def train(objective: str, steps: int = 400) -> tuple[float, float]:
    """Variance of a free student's KV over what it was before, and the loss's fall; no cross-entropy holds it up."""
    torch.manual_seed(0)
    inputs = torch.randn(TOKENS, 16)
    # Half of the teacher's KV follows from what the student reads, half is knowledge that the student lacks.
    readout = torch.randn(16, 2 * LAYERS * TEACHER) / 4
    followed = (inputs @ readout).reshape(TOKENS, 2, LAYERS, TEACHER).permute(1, 2, 0, 3)
    keys, values = followed + torch.randn(2, LAYERS, TOKENS, TEACHER)
    teacher = kv_of(keys, values)
    student = nn.Linear(16, 2 * LAYERS * STUDENT)

    def student_kv() -> KV:
        keys, values = student(inputs).reshape(TOKENS, 2, LAYERS, STUDENT).permute(1, 2, 0, 3)
        return kv_of(keys, values)

    projector = KVDimensionProjector(
        {"t": {"d_model": TEACHER, "num_layers": LAYERS}},
        STUDENT,
        dropout=0.0,
        per_layer=True,
        skip=True,
        direction=projector_direction(objective),
    )
    before = student_kv()
    target = teacher if objective == "student_to_teacher" else before
    scale = KVScale.from_tokens(target, target.mask)
    optimizer = torch.optim.AdamW([*student.parameters(), *projector.parameters()], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        comparisons = OBJECTIVES[objective](projector, "t", student_kv(), teacher)
        loss = sum(kv_regression_loss(c.predicted, c.target, teacher.mask, scale=scale) for c in comparisons)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    after = student_kv()
    variance = [torch.cat(kv.flatten(), 1).var(2).mean().item() for kv in (after, before)]
    return variance[0] / variance[1], losses[-1] / losses[0]


def test_the_shared_objective_collapses() -> None:
    variance, loss = train("shared")
    assert variance < 0.05  # the student's KV shrinks away,
    assert loss < 0.01  # which the loss rewards


def test_the_default_does_not_collapse() -> None:
    variance, loss = train("student_to_teacher")
    assert variance > 0.5
    assert loss < 0.7  # and it does learn what 6 numbers can tell of 12


@pytest.mark.parametrize("form", FORMS)
def test_alternating_has_the_gradients_of_shared(form: LossForm) -> None:
    torch.manual_seed(0)
    student = kv_of(*torch.randn(2, LAYERS, TOKENS, STUDENT))
    teacher = kv_of(*torch.randn(2, LAYERS, TOKENS, TEACHER))
    scale = KVScale.from_tokens(student, student.mask)
    student.keys.requires_grad_()
    projector = KVDimensionProjector({"t": {"d_model": TEACHER, "num_layers": LAYERS}}, STUDENT, dropout=0.0)
    gradients = []
    for objective in ("shared", "alternating"):
        comparisons = OBJECTIVES[objective](projector, "t", student, teacher)
        losses = [kv_regression_loss(c.predicted, c.target, teacher.mask, scale=scale, form=form) for c in comparisons]
        moved = [student.keys, *projector.parameters()]
        gradients.append(torch.autograd.grad(torch.stack(losses).sum(), moved, allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_reach_only_the_side_that_should_move(objective: str) -> None:
    torch.manual_seed(0)
    student = kv_of(*torch.randn(2, LAYERS, TOKENS, STUDENT))
    student.keys.requires_grad_()
    teacher = kv_of(*torch.randn(2, LAYERS, TOKENS, TEACHER))
    projector = KVDimensionProjector(
        {"t": {"d_model": TEACHER, "num_layers": LAYERS}}, STUDENT, direction=projector_direction(objective)
    )
    comparisons = OBJECTIVES[objective](projector, "t", student, teacher)
    moved = set()
    for comparison in comparisons:
        assert comparison.predicted[0].shape == comparison.target[0].shape
        for tensor, role in ((comparison.predicted[0], "predicted"), (comparison.target[0], "target")):
            if tensor.requires_grad:
                moved.add(role)
    # Only the shared objective lets the target move.
    assert ("target" in moved) == (objective == "shared")
