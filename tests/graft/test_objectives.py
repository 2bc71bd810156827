"""Training through the frozen student."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvgraft.fit.data import prepare_fit
from kvgraft.fit.run import build_projector, fit
from kvgraft.graft.cache import cache_from_kv
from kvgraft.graft.grafter import Grafter
from kvgraft.graft.objectives import ContinuationModel, _steps, train_on_continuations
from kvgraft.graft.questions import Questions
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import ContinuationRecipe, Recipe

TEACHER = "org/teacher-1.0"
WHOLE = {"data": {"max_length": 250, "train_samples": 12, "held_out_samples": 4}}


@pytest.fixture
def model(fit_recipe: Callable[..., Recipe]) -> ContinuationModel:
    recipe = fit_recipe(**WHOLE, projector={"init_method": "xavier"})
    data = prepare_fit(recipe)
    projector = build_projector(recipe, data, [[0], [1], [3]])
    questions = Questions(data.train, data.examples), Questions(data.held_out, data.held_out_examples)
    return ContinuationModel(Grafter(projector, TEACHER, 2, 2), data.student.load(), *questions)


def test_a_batch_is_its_texts_one_by_one(model: ContinuationModel) -> None:
    model.eval()
    nats, tokens = 0.0, 0
    for index in (0, 5, 7):
        question = model.train_questions[index]
        inputs = cache_from_kv(model._student[0], model.grafter(question.pair)).forward_inputs(question.answer_ids)
        logits = model._student[0](**inputs).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, question.answer_ids[0, 1:], reduction="sum").item()
        tokens += len(logits)
    assert model(torch.tensor([0, 5, 7]))["loss"].item() == pytest.approx(nats / tokens, rel=1e-5)


def test_held_out_questions_are_judged_one_by_one_and_weigh_by_their_tokens(model: ContinuationModel) -> None:
    model.eval()
    sizes: list[int] = []
    loss = model._loss
    model._loss = lambda questions: sizes.append(len(questions)) or loss(questions)
    found = model.held_out_losses()["loss"]
    assert sizes == [1] * len(model.held_out_questions)
    with torch.no_grad():
        together = loss([model.held_out_questions[index] for index in range(len(model.held_out_questions))])
    assert found == pytest.approx(float(together), rel=1e-5)


def test_the_gradient_is_the_slope(model: ContinuationModel) -> None:
    model.eval()
    weight = model.grafter.projector.adapters(TEACHER)[1].down.weight
    questions = torch.tensor([0, 1])
    model(questions)["loss"].backward()
    direction = weight.grad / weight.grad.norm()
    slope = float((weight.grad * direction).sum())
    losses = []
    with torch.no_grad():
        for step in (1e-2, -2e-2):
            weight += step * direction
            losses.append(float(model(questions)["loss"]))
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(slope, rel=0.02)
    assert all(parameter.grad is None for parameter in model._student[0].parameters())


def test_own_reading_is_the_target_that_the_own_cache_meets(model: ContinuationModel) -> None:
    model.eval()
    model.target = "own_reading"
    questions = torch.tensor([0, 1])
    assert model(questions)["loss"].item() > 1e-4
    model.grafter.forward = lambda pair: pair.target
    assert model(questions)["loss"].item() == pytest.approx(0, abs=1e-6)


def test_training_makes_answers_likelier_and_resumes(model: ContinuationModel, tmp_path: Path) -> None:
    settings = ContinuationRecipe(steps=8, texts_per_step=3, learning_rate=3e-2, evaluate_every=4, save_every=4)
    grafter, student = model.grafter, model._student[0]
    before = {name: tensor.clone() for name, tensor in grafter.state_dict().items()}
    started = model.eval().held_out_losses()["loss"]

    def train(folder: Path) -> None:
        questions = model.train_questions, model.held_out_questions
        train_on_continuations(grafter, student, *questions, settings, folder, 0, "training")

    train(tmp_path / "whole")
    assert model.held_out_losses()["loss"] < started - 0.01
    after = {name: tensor.clone() for name, tensor in grafter.state_dict().items()}
    # From the checkpoint of step 4 the last steps lead to the same place.
    last = tmp_path / "whole" / "checkpoints" / "checkpoint-8"
    for file in sorted(last.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    last.rmdir()
    grafter.load_state_dict(before)
    train(tmp_path / "whole")
    assert all(torch.equal(after[name], tensor) for name, tensor in grafter.state_dict().items())


def test_bf16_trains_in_bfloat16_to_much_the_same_place(model: ContinuationModel, tmp_path: Path) -> None:
    grafter, student = model.grafter, model._student[0]
    before = {name: tensor.clone() for name, tensor in grafter.state_dict().items()}
    seen: set[torch.dtype] = set()
    student.model.layers[0].mlp.register_forward_hook(lambda module, given, output: seen.add(output.dtype))
    losses = []
    for bf16 in (False, True):
        settings = ContinuationRecipe(steps=8, texts_per_step=3, learning_rate=3e-2, evaluate_every=9, bf16=bf16)
        grafter.load_state_dict(before)
        questions = model.train_questions, model.held_out_questions
        train_on_continuations(grafter, student, *questions, settings, tmp_path / str(bf16), 0, "training")
        assert (torch.bfloat16 in seen) == bf16
        losses.append(model.held_out_losses()["loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], abs=0.01)
    assert all(parameter.dtype == torch.float32 for parameter in grafter.parameters())


def test_fit_takes_every_objective(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    continuation = {"steps": 2, "texts_per_step": 2, "evaluate_every": 2, "learning_rate": 1e-2}
    found = {}
    for objective in ("regression", "attention", "continuation"):
        recipe = fit_recipe(**WHOLE, fit={"steps": 2, "objective": objective, "continuation": continuation})
        fit(recipe, tmp_path / objective)
        found[objective] = KVDimensionProjector.from_pretrained(tmp_path / objective / "projector").state_dict()
    up, linear = "value_adapters.0.up.weight", "key_adapters.0.skip.weight"
    assert not torch.equal(found["regression"][up], found["continuation"][up])
    assert not torch.equal(found["regression"][linear], found["attention"][linear])


def test_steps_take_answers_of_like_length_and_all_of_them_before_one_again() -> None:
    lengths = [10, 11, 12, 40, 41, 42, 80, 82]
    steps = _steps(lengths, 40, 2, seed=0)
    assert len(steps) == 40
    seen = [question for step in steps for question in step]
    assert sorted(seen[: len(lengths)]) == list(range(len(lengths)))
    padded = [max(lengths[question] for question in step) * len(step) for step in steps]
    assert max(padded) == 82
    assert sum(lengths[question] for question in seen) > 0.9 * sum(padded)
    assert steps != _steps(lengths, 40, 2, seed=1)
