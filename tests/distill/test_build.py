"""Where a projector starts before the first step of training."""

from collections.abc import Callable

import pytest
import torch

from kvgraft.distill.arms import build_arm
from kvgraft.prepare import prepare
from kvgraft.projector import closed_form
from kvgraft.projector.closed_form import DEFAULT_RIDGE, LeastSquares
from kvgraft.recipe import Recipe, StudentRecipe
from kvgraft.run import arm_data


def kv_loss_at_step_zero(recipe: Recipe) -> float:
    """Over all training texts, on which the closed form was fitted."""
    data = arm_data(prepare(recipe))
    train = data.train_set("kv", recipe.seed)
    model = build_arm(recipe, "kv", data).eval()
    with torch.no_grad():
        return float(model(**data.collator([train[index] for index in range(len(train))]))["kv_loss"])


@pytest.mark.parametrize("objective", ["student_to_teacher", "shared", "alternating"])
def test_least_squares_is_ahead_of_predicting_the_mean(tiny_recipe: Callable[..., Recipe], objective: str) -> None:
    losses = {
        init_method: kv_loss_at_step_zero(
            tiny_recipe(kv_loss={"objective": objective}, projector={"init_method": init_method})
        )
        for init_method in ("xavier", "least_squares")
    }
    # Alternating compares both ways round, so that predicting the mean costs 2.
    assert losses["least_squares"] < (2 if objective == "alternating" else 1) < losses["xavier"]


def test_the_ridge_is_chosen_on_texts_kept_out(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def choose(fit: LeastSquares, held_out: LeastSquares) -> torch.Tensor:
        seen.append((float(fit.weight_sums[0]), float(held_out.weight_sums[0])))
        return torch.full((fit.num_layers,), DEFAULT_RIDGE, dtype=torch.float64)

    monkeypatch.setattr(closed_form, "choose_ridge", choose)
    recipe = tiny_recipe(projector={"init_method": "least_squares"}, data={"train_samples": 40})
    build_arm(recipe, "kv", arm_data(prepare(recipe)))
    # Keys and values; one batch of five is kept out.
    assert len(seen) == 2
    assert all(0 < held_out < 0.4 * fitted for fitted, held_out in seen)


@pytest.mark.parametrize("objective", ["teacher_to_student", "relational"])
def test_scales_do_not_depend_on_the_dropout_of_a_new_student(
    tiny_recipe: Callable[..., Recipe], objective: str
) -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}  # dropout 0.1
    student = StudentRecipe(new=gpt2, vocab_size=300)
    recipe = tiny_recipe(kv_loss={"objective": objective}).model_copy(update={"student": student})
    data = arm_data(prepare(recipe))
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(build_arm(recipe, "kv", data))
    first, second = ((model.student_scales or model.scales)["org/teacher-1.0"] for model in models)
    assert torch.equal(first.deviation, second.deviation)
    assert all(model.student.training for model in models)
