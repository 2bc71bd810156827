"""The fused loss against the plain way: project all, then compare. Loss and every gradient to 1e-5 of their norm."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvgraft.distill import model as distillation
from kvgraft.distill.fused import can_fuse, fused_kv_loss
from kvgraft.distill.losses import KVScale, kv_regression_loss, kv_token_errors
from kvgraft.distill.objectives import OBJECTIVES, projector_direction
from kvgraft.errors import ProjectorError
from kvgraft.kv import KV
from kvgraft.projector.dropout import TILE_TOKENS, draw_dropout, draw_seed, num_tiles
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import Recipe
from tests.distill.gradients import gradients
from tests.distill.test_trainer import relative_difference

BATCH, TOKENS, LAYERS = 2, TILE_TOKENS + 40, 4
STUDENT_LAYERS = (0, 2, 2, 3)  # one student layer may answer to two of the teacher's


def kv(seed: int, heads: int, width: int, num_layers: int = LAYERS) -> KV:
    keys, values = torch.randn(
        2, BATCH, num_layers, heads, TOKENS, width, generator=torch.Generator().manual_seed(seed)
    )
    mask = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(9)) < 0.8
    mask[1, -60:] = False
    return KV(keys + 0.5, values, torch.arange(TOKENS).expand(BATCH, TOKENS), mask, tuple(range(num_layers)))


def make(objective: str = "student_to_teacher", **settings: Any) -> KVDimensionProjector:
    torch.manual_seed(0)
    settings = {"mlp_ratio": 2.0, "dropout": 0.0, "sharing": "per_layer", **settings}
    projector = KVDimensionProjector(
        {"t": {"d_model": 6, "num_layers": LAYERS}}, 4, direction=projector_direction(objective), **settings
    )
    with torch.no_grad():  # what starts at zero would hide a wrong gradient
        for parameter in projector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return projector


class Case:
    """A student and a teacher, both leaves, and one loss between them made in two ways."""

    def __init__(self, projector: KVDimensionProjector, objective: str = "student_to_teacher", **options: Any) -> None:
        self.projector, self.objective, self.options = projector, objective, options
        self.student, self.teacher = kv(1, 2, 2), kv(2, 3, 2)
        moved = kv(3, 2, 2) if objective != "student_to_teacher" else self.teacher
        self.scale = KVScale.from_tokens(moved, moved.mask)

    def fused(self, **options: Any) -> Tensor:
        return self.both(**options)[0]

    def both(self, **options: Any) -> tuple[Tensor, Tensor]:
        return fused_kv_loss(
            self.projector,
            "t",
            self.student,
            self.teacher,
            objective=self.objective,
            student_layers=STUDENT_LAYERS,
            scale=self.scale,
            **self.options,
            **options,
        )

    def plain(self) -> Tensor:
        student = self.student.select_layers(STUDENT_LAYERS)
        comparisons = OBJECTIVES[self.objective](self.projector, "t", student, self.teacher)
        return sum(
            kv_regression_loss(c.predicted, c.target, self.teacher.mask, scale=self.scale, **self.options)
            for c in comparisons
        )

    def gradients(self, make_loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        """The loss and what 3 times the loss gives every leaf; leaves that it does not move are left out."""
        leaves = {"keys": self.student.keys, "values": self.student.values, **dict(self.projector.named_parameters())}
        for leaf in (self.student.keys, self.student.values):
            leaf.requires_grad_()
        loss = make_loss()
        found = torch.autograd.grad(3 * loss, list(leaves.values()), allow_unused=True)
        named = {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}
        return {"loss": loss.detach(), **named}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("rows", [TILE_TOKENS, None, 100 * TILE_TOKENS])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_however_they_are_cut(objective: str, rows: int | None) -> None:
    case = Case(make(objective), objective)
    assert_equal(case.gradients(lambda: case.fused(piece_rows=rows)), case.gradients(case.plain))


ADAPTERS: list[dict[str, Any]] = [
    {"sharing": "shared", "activation": "gelu"},
    {"sharing": "grouped", "num_groups": 3, "activation": "relu", "skip": True},
    {"sharing": "trunk", "num_groups": 3, "init_method": "least_squares"},
    {"sharing": "trunk", "num_groups": 1, "layer_norm": False, "skip": True},
    {"sharing": "per_layer", "mlp_ratio": "linear"},
]


@pytest.mark.parametrize("rows", [TILE_TOKENS, 100 * TILE_TOKENS])
@pytest.mark.parametrize("settings", ADAPTERS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_every_kind_of_adapter(settings: dict[str, Any], rows: int) -> None:
    case = Case(make(**settings))
    assert_equal(case.gradients(lambda: case.fused(piece_rows=rows)), case.gradients(case.plain))


OPTIONS: list[dict[str, Any]] = [
    {"form": "l1"},
    {"form": "smooth_l1", "layer_weights": [1.0, 0.5, 2.0, 3.0]},
    {"form": "cosine", "keys_weight": 3.0},
    {"values_weight": 0.0, "num_tokens": 1234},
]


@pytest.mark.parametrize("objective", ["student_to_teacher", "shared"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_form_and_weight(options: dict[str, Any], objective: str) -> None:
    case = Case(make(objective), objective, **options)
    assert_equal(case.gradients(case.fused), case.gradients(case.plain))


@pytest.mark.parametrize("rows", [TILE_TOKENS, 100 * TILE_TOKENS])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_token_weights_multiply_each_tokens_error(objective: str, rows: int) -> None:
    case = Case(make(objective), objective)
    mask = case.teacher.mask
    weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(5))

    def plain() -> Tensor:
        student = case.student.select_layers(STUDENT_LAYERS)
        comparisons = OBJECTIVES[objective](case.projector, "t", student, case.teacher)
        errors = sum(kv_token_errors(c.predicted, c.target, mask, scale=case.scale) for c in comparisons)
        return (weights[mask] * errors).sum() / mask.sum()

    found = case.gradients(lambda: case.fused(piece_rows=rows, token_weights=weights))
    assert_equal(found, case.gradients(plain))
    unweighted = case.both(piece_rows=rows, token_weights=weights)[1]
    assert not unweighted.requires_grad
    torch.testing.assert_close(unweighted, case.plain().detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("same_scale", [True, False])
def test_standardised_outputs_and_a_teacher_in_half_precision(same_scale: bool) -> None:
    case = Case(make())
    case.projector.standardise_outputs("t", case.scale.mean, case.scale.deviation * (1 if same_scale else 1.5))
    case.teacher = case.teacher.to(torch.float16)
    assert_equal(case.gradients(case.fused), case.gradients(case.plain))


@pytest.mark.parametrize("rows", [TILE_TOKENS, None, 100 * TILE_TOKENS])
@pytest.mark.parametrize("settings", [{}, {"sharing": "shared"}, {"sharing": "trunk"}], ids=str)
def test_dropout_of_the_same_seed(settings: dict[str, Any], rows: int | None) -> None:
    case = Case(make(dropout=0.3, **settings))
    projector = case.projector.train()

    def plain() -> Tensor:
        """One mask for all texts, drawn whole; layers that have no weights in common take the first one's."""
        sources = projector.sources_of("t", case.student.select_layers(STUDENT_LAYERS))
        outputs = []
        for adapter, source in zip(projector.adapters("t"), sources, strict=True):
            seed, units = draw_seed(), adapter.up.weight.shape[1]
            places = torch.arange(LAYERS * BATCH).view(LAYERS, BATCH).T * num_tiles(TOKENS)
            kept = draw_dropout(0.3, seed, places.flatten().tolist(), TOKENS, units)
            kept = kept.view(BATCH, LAYERS, TOKENS, units)
            if projector.sharing == "per_layer":
                kept = kept[:, :1].expand(-1, LAYERS, -1, -1)
            outputs.append(adapter(source, kept))
        return kv_regression_loss(tuple(outputs), case.teacher, case.teacher.mask, scale=case.scale)

    torch.manual_seed(4)
    expected = case.gradients(plain)
    torch.manual_seed(4)
    assert_equal(case.gradients(lambda: case.fused(piece_rows=rows)), expected)
    # It is there at all, and gone in evaluation mode.
    torch.manual_seed(5)
    assert float(case.fused().detach()) != pytest.approx(float(expected["loss"]), rel=1e-5)
    projector.eval()
    assert float(case.fused().detach()) == pytest.approx(float(case.plain().detach()), rel=1e-5)


def test_padding_may_hold_anything() -> None:
    case = Case(make())
    expected = case.gradients(case.plain)
    outside = ~case.teacher.mask[:, None, None, :, None]
    case.teacher = KV(
        case.teacher.keys.masked_fill(outside, float("nan")),
        case.teacher.values.masked_fill(outside, float("inf")),
        case.teacher.positions,
        case.teacher.mask,
        case.teacher.layers,
    )
    assert_equal(case.gradients(case.fused), expected)


def test_nothing_to_compare_is_zero_with_zero_gradient() -> None:
    case = Case(make())
    case.teacher.mask[:] = False
    found = case.gradients(case.fused)
    assert {"keys", "values"} < found.keys()
    assert all(float(tensor.abs().max()) == 0 for tensor in found.values())


def test_one_loss_may_be_differentiated_twice_and_none_without_gradients() -> None:
    case = Case(make())
    case.student.keys.requires_grad_()
    loss = case.fused()
    first, second = (torch.autograd.grad(loss, case.student.keys, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        assert not case.fused().requires_grad
        assert float(case.fused()) == pytest.approx(float(loss.detach()), rel=1e-6)


def test_nothing_but_gradients_is_kept() -> None:
    case = Case(make())
    for leaf in (case.student.keys, case.student.values):
        leaf.requires_grad_()
    loss = case.fused()
    nodes, waiting = [], [loss.grad_fn]
    while waiting:
        nodes.append(waiting.pop())
        waiting += [node for node, _ in nodes[-1].next_functions if node is not None]
    assert {type(node).__name__ for node in nodes} == {
        "SumBackward0",
        "StackBackward0",
        "_FusedLossBackward",
        "AccumulateGrad",
    }
    held = [
        tensor.numel()
        for node in nodes
        if "Fused" in type(node).__name__
        for tensor in node.saved_tensors
        if tensor is not None
    ]
    assert sum(held) == 2 * case.student.keys.numel() + case.projector.count_parameters()


@pytest.mark.parametrize("settings", [{}, {"skip": True}, {"sharing": "shared", "layer_norm": False}])
def test_bf16_autocast_stays_close(settings: dict[str, Any]) -> None:
    case = Case(make(**settings))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = case.gradients(case.fused), case.gradients(case.plain)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.03 * gradient.norm(), name


def test_what_is_not_covered_is_said() -> None:
    assert can_fuse(make(), "t")
    assert not can_fuse(make(source_kinds="both"), "t")
    assert not can_fuse(make(context_tokens=1), "t")
    assert not can_fuse(make(source_layers={"t": [[layer] for layer in range(LAYERS)]}), "t")
    standardised = make()
    standardised.standardise_inputs("t", torch.zeros(2, LAYERS, 4), torch.ones(2, LAYERS, 4))
    assert not can_fuse(standardised, "t")
    hooked = make()
    hooked.key_adapters[0].up.register_forward_pre_hook(lambda module, inputs: None)
    assert not can_fuse(hooked, "t")


def test_what_does_not_fit_is_named() -> None:
    case = Case(make())
    case.student = kv(1, 3, 2)
    with pytest.raises(ProjectorError, match="width 4 to 6; got 6 and 6"):
        case.fused()
    case = Case(make())
    case.teacher = case.teacher.select_layers([0, 1])
    with pytest.raises(ProjectorError, match="4 layers are compared for teacher 't'"):
        case.fused()


@pytest.mark.parametrize("objective", ["student_to_teacher", "teacher_to_student"])
def test_a_training_step_is_that_of_the_plain_way(
    tiny_recipe: Callable[..., Recipe],
    tiny_teacher: Path,
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
) -> None:
    recipe = tiny_recipe(
        teachers=[
            {"name": "org/teacher-1.0", "model": str(tiny_teacher), "weight": 0.75},
            {"name": "second", "model": str(tiny_student), "weight": 0.25},
        ],
        kv_loss={"objective": objective, "combine": "weights", "schedule": "linear_decay"},
        training={"steps": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 1e9},
    )
    fused, trainer = gradients(recipe, tmp_path / "fused")
    monkeypatch.setattr(distillation, "can_fuse", lambda *_: False)
    plain, plain_trainer = gradients(recipe, tmp_path / "plain")
    for one, other in zip(fused, plain, strict=True):
        assert relative_difference(one, other) < 1e-5
        assert any("projector" in name for name in other) == (objective == "student_to_teacher")
    logged, expected = (
        next(record for record in history.state.log_history if "kv_loss" in record)
        for history in (trainer, plain_trainer)
    )
    for part in ("loss", "ce_loss", "kv_loss", "kv_loss/org/teacher-1.0", "kv_loss/second"):
        assert logged[part] == pytest.approx(expected[part], rel=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("settings", "form"), [({"dropout": 0.3}, "mse"), ({"init_method": "least_squares", "sharing": "shared"}, "cosine")]
)
def test_compiled_is_the_same_loss_with_the_same_gradients(settings: dict[str, Any], form: str) -> None:
    case = Case(make(**settings), form=form)
    moved = [case.student.keys, case.student.values, *case.projector.parameters()]
    for tensor in moved[:2]:
        tensor.requires_grad_()
    found = []
    for compiled in (False, True):
        torch.manual_seed(5)
        loss = case.fused(compiled=compiled)
        found.append([loss.detach(), *torch.autograd.grad(loss, moved)])
    for eager, made in zip(*found, strict=True):
        assert (made - eager).norm() <= 1e-5 * eager.norm()
