"""The relational loss against plain loops, across head counts, and what must not reach it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvgraft.distill.losses import KVScale
from kvgraft.distill.relations import relation_errors
from kvgraft.errors import KVGraftError, RecipeError
from kvgraft.evaluate.run import EvaluationSettings, evaluate
from kvgraft.kv import KV
from kvgraft.recipe import Recipe
from kvgraft.run import run

BATCH, LAYERS, TOKENS = 2, 2, 5
MASK = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]]).bool()


def kv_of(seed: int, heads: int, head_dim: int) -> KV:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, BATCH, LAYERS, heads, TOKENS, head_dim, generator=generator) * 2 + 3
    return KV(keys, values, torch.arange(TOKENS).expand(BATCH, TOKENS), MASK, tuple(range(LAYERS)))


def scale_of(kv: KV) -> KVScale:
    return KVScale.from_tokens(kv, MASK)


def relations(row: Tensor, others: list[Tensor]) -> list[float]:
    scores = [math.exp(float(row @ other) / math.sqrt(len(row))) for other in others]
    return [score / sum(scores) for score in scores]


def reference(student: KV, teacher: KV, heads: int, weights: tuple[float, float], layer_weights: list[float]) -> list:
    scales = [scale_of(student), scale_of(teacher)]
    errors = []
    for b, t in MASK.nonzero().tolist():
        before = [j for j in range(t + 1) if MASK[b, j]]
        total = 0.0
        for kind in range(2):
            for layer in range(LAYERS):
                for head in range(heads):
                    rows = []
                    for kv, scale in zip((student, teacher), scales, strict=True):
                        states = (kv.flatten()[kind][b, layer] - scale.mean[kind, layer]) / scale.deviation[kind, layer]
                        width = states.shape[1] // heads
                        piece = states[:, head * width : (head + 1) * width]
                        rows.append(relations(piece[t], [piece[j] for j in before]))
                    divergence = sum(p * math.log(p / q) for q, p in zip(*rows, strict=True))
                    total += weights[kind] * layer_weights[layer] / sum(layer_weights) * divergence / heads
        errors.append(total / sum(weights))
    return errors


@pytest.mark.parametrize(("weights", "layer_weights"), [((1.0, 1.0), [1, 1]), ((0.0, 2.0), [1, 3])])
def test_equals_loops_across_head_counts(weights: tuple[float, float], layer_weights: list[float]) -> None:
    student, teacher = kv_of(0, heads=1, head_dim=6), kv_of(1, heads=2, head_dim=4)
    found = relation_errors(
        student,
        teacher,
        scale_of(student),
        scale_of(teacher),
        relation_heads=2,
        keys_weight=weights[0],
        values_weight=weights[1],
        layer_weights=layer_weights,
    )
    expected = torch.tensor(reference(student, teacher, 2, weights, layer_weights))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_masked_tokens_give_no_loss_and_no_gradient_and_no_nan() -> None:
    student, teacher = kv_of(0, 1, 6), kv_of(1, 2, 4)
    scales = scale_of(student), scale_of(teacher)
    before = relation_errors(student, teacher, *scales, relation_heads=1)
    ignored = ~MASK[:, None, None, :, None]
    student = replace(student, keys=student.keys.masked_fill(ignored, 9.0).requires_grad_())
    teacher = replace(teacher, values=teacher.values.masked_fill(ignored, 0.0))
    errors = relation_errors(student, teacher, *scales, relation_heads=1)
    torch.testing.assert_close(errors, before)
    errors.sum().backward()
    gradient = student.keys.grad.transpose(2, 3).transpose(1, 2)
    assert torch.isfinite(gradient).all()
    assert gradient[~MASK].abs().max() == 0
    assert gradient[MASK].abs().max() > 0


def test_the_same_relations_cost_nothing_whatever_the_rotation() -> None:
    teacher = kv_of(0, 1, 6)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))
    student = replace(teacher, keys=teacher.keys @ turn, values=teacher.values @ turn)
    errors = relation_errors(student, teacher, scale_of(student), scale_of(teacher), relation_heads=1)
    torch.testing.assert_close(errors, torch.zeros_like(errors), atol=1e-5, rtol=0)


def test_heads_that_do_not_divide_are_refused_with_those_that_do() -> None:
    student, teacher = kv_of(0, 1, 6), kv_of(1, 2, 4)
    with pytest.raises(KVGraftError, match=r"relation_heads 4 does not divide .* 6 .* 8; use one of \[1, 2\]"):
        relation_errors(student, teacher, scale_of(student), scale_of(teacher), relation_heads=4)


def test_a_run_trains_without_a_projector(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    changes = {"objective": "relational", "relation_heads": 2}
    recipe = tiny_recipe(arms=["kv"], kv_loss=changes, training={"steps": 12, "evaluate_every": 12})
    result = run(recipe, tmp_path / "run")
    arm = result.arms[0]
    assert arm.projector_parameters == 0
    assert arm.last["kv_loss"] < arm.first["kv_loss"]
    assert "keys_r2/org/teacher-1.0" not in arm.last
    again = evaluate(tmp_path / "run", EvaluationSettings(only=["quality"])).arms[0]
    assert again.quality["kv_loss"] == pytest.approx(arm.last["kv_loss"], rel=1e-5)
    assert result.read(tmp_path / "run" / "result.json").arms[0].last == arm.last


def test_a_recipe_whose_widths_do_not_fit_is_refused_before_anything_runs(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="relation_heads 3 does not divide"):
        run(tiny_recipe(kv_loss={"objective": "relational", "relation_heads": 3}), tmp_path / "run")
