"""KV similarity against a plain computation over all tokens at once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvgraft.align.cka import pairwise_cka
from kvgraft.distill.arms import build_arm
from kvgraft.distill.dataset import Batches, DistillationDataset
from kvgraft.errors import DataError
from kvgraft.evaluate.cka import effective_rank
from kvgraft.evaluate.similarity import layer_similarity
from kvgraft.models.capture import capture
from kvgraft.prepare import prepare
from kvgraft.projector.closed_form import LeastSquares
from kvgraft.recipe import Recipe
from kvgraft.run import arm_data

TEACHER = "org/teacher-1.0"
LAYER_MAP = [(0, 0), (1, 3)]


def batches(dataset: DistillationDataset, data: object, size: int = 3) -> Batches:
    return Batches(dataset, data.collator, size, torch.device("cpu"))


def cosine_about(mean: Tensor, predicted: Tensor, target: Tensor) -> float:
    return float(torch.cosine_similarity(predicted - mean, target - mean, dim=-1).mean())


def r2(predicted: Tensor, target: Tensor) -> float:
    return float(1 - (predicted - target).square().sum() / (target - target.mean(0)).square().sum())


@pytest.mark.parametrize("objective", ["student_to_teacher", "teacher_to_student"])
def test_similarity_equals_a_plain_computation(tiny_recipe: Callable[..., Recipe], objective: str) -> None:
    recipe = tiny_recipe(kv_loss={"objective": objective})
    data = arm_data(prepare(recipe))
    model = build_arm(recipe, "kv", data)
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    found = layer_similarity(
        model, TEACHER, LAYER_MAP, batches(data.train_set("kv", 0), data), batches(data.held_out_set("kv"), data)
    )
    assert [(layer.kind, layer.student_layer, layer.teacher_layer) for layer in found] == [
        (kind, *pair) for kind in ("keys", "values") for pair in LAYER_MAP
    ]

    @torch.no_grad()
    def rows(dataset: DistillationDataset, wanted: Callable) -> Tensor:
        """[2, layers, tokens, width] of every text, one at a time."""
        model.eval()
        parts = []
        for sample in (dataset[index] for index in range(len(dataset))):
            kv, teacher = capture(model.student, sample["input_ids"][None]), sample["teacher_kv"][TEACHER]
            parts.append(torch.stack([side[0][:, teacher.mask[0]] for side in wanted(kv, teacher)]).double())
        return torch.cat(parts, 2)

    train, held_out = data.train_set("kv", 0), data.held_out_set("kv")
    own, target = (rows(held_out, lambda kv, teacher, i=i: (kv, teacher)[i].flatten()) for i in (0, 1))
    fit_own, fit_target = (rows(train, lambda kv, teacher, i=i: (kv, teacher)[i].flatten()) for i in (0, 1))
    forwards = objective == "student_to_teacher"
    project = model.projector.project_student_kv if forwards else model.projector.project_teacher_kv
    sides = [
        lambda kv, teacher: project(TEACHER, kv if forwards else teacher),
        lambda kv, teacher: (teacher if forwards else kv).flatten(),
    ]
    # The projector's output is the prediction in one direction and the aim in the other.
    predicted, aim = (rows(held_out, side) for side in (sides if forwards else sides[::-1]))
    fit_aim = rows(train, sides[1] if forwards else sides[0])
    for index, layer in enumerate(found):
        kind, at = divmod(index, 2)
        assert layer.projector_r2 == pytest.approx(r2(predicted[kind, at], aim[kind, at]), abs=1e-4)
        cosine = cosine_about(fit_aim[kind, at].mean(0), predicted[kind, at], aim[kind, at])
        assert layer.projector_cosine == pytest.approx(cosine, abs=1e-4)
        assert layer.cka == pytest.approx(float(pairwise_cka(own[kind], target[kind])[at, at]), abs=1e-6)
        rank = effective_rank(torch.cov(target[kind, at].T))
        assert layer.teacher_effective_rank == pytest.approx(float(rank), rel=1e-5)
        # The ridge is chosen inside: the map must be one of those that the same tokens give.
        candidates = []
        for ridge in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
            fit = LeastSquares(1, own.shape[-1], target.shape[-1])
            fit.add(
                fit_own[kind, at][None, None], fit_target[kind, at][None, None], torch.ones(1, fit_own.shape[2]) > 0
            )
            weight, bias = fit.solve(ridge)
            mapped = own[kind, at] @ weight[0].T + bias[0]
            mean = fit_target[kind, at].mean(0)
            candidates.append((r2(mapped, target[kind, at]), cosine_about(mean, mapped, target[kind, at])))
        measured = (layer.least_squares_r2, layer.least_squares_cosine)
        assert any(measured == pytest.approx(candidate, abs=1e-5) for candidate in candidates)


def test_an_arm_without_a_projector_has_least_squares_alone(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe()
    data = arm_data(prepare(recipe))
    model = build_arm(recipe, "baseline", data)
    found = layer_similarity(
        model, TEACHER, LAYER_MAP, batches(data.train_set("kv", 0), data), batches(data.held_out_set("kv"), data)
    )
    assert all(layer.projector_r2 is None and layer.projector_cosine is None for layer in found)
    assert all(0 < layer.cka < 1 for layer in found)


def test_a_kind_that_weighs_nothing_has_no_projector(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(kv_loss={"keys_weight": 0.0})
    data = arm_data(prepare(recipe))
    train, held_out = batches(data.train_set("kv", 0), data), batches(data.held_out_set("kv"), data)
    found = layer_similarity(build_arm(recipe, "kv", data), TEACHER, LAYER_MAP, train, held_out)
    assert [layer.projector_r2 is None for layer in found] == [True, True, False, False]


def test_text_without_an_answer_of_the_teacher_is_an_error(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe()
    data = arm_data(prepare(recipe))
    for source in data.held_out_sources:
        source.skip_first_tokens = 48
    train, held_out = batches(data.train_set("kv", 0), data), batches(data.held_out_set("kv"), data)
    with pytest.raises(DataError, match=r"org/teacher-1.0 answers for no token of the held-out text"):
        layer_similarity(build_arm(recipe, "kv", data), TEACHER, LAYER_MAP, train, held_out)


def test_least_squares_does_not_depend_on_the_batch(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(data={"train_samples": 64, "held_out_samples": 8, "max_length": 24})
    data = arm_data(prepare(recipe))
    model = build_arm(recipe, "kv", data)
    found = [
        layer_similarity(
            model,
            TEACHER,
            [(0, 0), (1, 3)],
            batches(data.train_set("kv", 0), data, size),
            batches(data.held_out_set("kv"), data, size),
        )
        for size in (2, 5, 64)
    ]
    for other in found[1:]:
        assert [layer.least_squares_r2 for layer in other] == pytest.approx(
            [layer.least_squares_r2 for layer in found[0]], abs=1e-5
        )
