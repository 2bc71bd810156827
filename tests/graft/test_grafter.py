"""What the student goes on from, by kind of fusion."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvgraft.errors import GraftError
from kvgraft.fit.data import FitData, prepare_fit
from kvgraft.graft.cache import cache_from_kv
from kvgraft.graft.grafter import Fusion, Grafter
from kvgraft.graft.joint import joint_grafter
from kvgraft.graft.own import own_grafter, student_as_its_own_teacher
from kvgraft.graft.questions import Question, Questions
from kvgraft.kv import KV
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import Recipe

TEACHER = "org/teacher-1.0"


@pytest.fixture
def data(fit_recipe: Callable[..., Recipe]) -> FitData:
    return prepare_fit(
        fit_recipe(data={"max_length": 250, "train_samples": 20, "held_out_samples": 3}, store={"dtype": "float32"})
    )


@pytest.fixture
def questions(data: FitData) -> Questions:
    return Questions(data.held_out, data.held_out_examples)


def grafter(fusion: Fusion) -> Grafter:
    torch.manual_seed(0)
    config = {TEACHER: {"d_model": 16, "num_layers": 4}}
    projector = KVDimensionProjector(config, 12, dropout=0.5, source_layers={TEACHER: [[0], [1], [3]]})
    return Grafter(projector, TEACHER, 2, own_first_tokens=2, fusion=fusion)


def joint(fit_recipe: Callable[..., Recipe], data: FitData) -> Grafter:
    recipe = fit_recipe(fit={"sources": 2, "source_kinds": "both"}, projector={"mlp_ratio": 0.5})
    return joint_grafter(recipe, data, [[0, 1], [1, 2], [3, 2]])


def logits(data: FitData, question: Question, kv) -> torch.Tensor:
    student = data.student.load()
    with torch.no_grad():
        return student(**cache_from_kv(student, kv).forward_inputs(question.answer_ids)).logits


@pytest.mark.parametrize("training", [True, False])
def test_closed_gates_leave_the_student_as_it_is(data: FitData, questions: Questions, training: bool) -> None:
    gated = grafter("gated").train(training)
    question = questions[0]
    kv = gated(question.pair)
    assert torch.equal(kv.keys, question.pair.target.keys)
    assert torch.equal(kv.values, question.pair.target.values)
    assert torch.equal(logits(data, question, kv), logits(data, question, question.pair.target))
    # A gate that is open in one head of one layer changes that one alone.
    with torch.no_grad():
        gated.gates[0, 1, 0] = 0.5
    changed = gated(question.pair).keys != question.pair.target.keys
    assert changed[:, 1, 0].any()
    changed[:, 1, 0] = False
    assert not changed.any()
    assert torch.equal(gated(question.pair).values, question.pair.target.values)


@pytest.mark.parametrize("training", [True, False])
def test_joint_adapters_start_at_the_student_as_it_is(
    fit_recipe: Callable[..., Recipe], data: FitData, questions: Questions, training: bool
) -> None:
    changed, question = joint(fit_recipe, data).train(training), questions[0]
    kv = changed(question.pair)
    assert torch.equal(kv.keys, question.pair.target.keys)
    assert torch.equal(kv.values, question.pair.target.values)
    # They learn from the first step on; a closed gate then is as exact.
    kv.keys.square().sum().backward()
    assert changed.projector.adapters(TEACHER)[0].skip.weight.grad.abs().sum() > 0
    with torch.no_grad():
        torch.nn.init.normal_(changed.projector.adapters(TEACHER)[0].skip.weight)
        changed.gates[0, 1] = 0
    moved = changed(question.pair).keys != question.pair.target.keys
    assert not moved[:, 1].any()
    assert moved[:, [0, 2], :, 2:].any()


def test_joint_adapters_read_both_models(
    fit_recipe: Callable[..., Recipe], data: FitData, questions: Questions
) -> None:
    grafter, pair = joint(fit_recipe, data).eval(), questions[0].pair
    torch.nn.init.normal_(grafter.projector.adapters(TEACHER)[1].skip.weight)

    def reads(layer: int, **sides: KV) -> bool:
        with torch.no_grad():
            given = [grafter(each).values - each.target.values for each in (pair, replace(pair, **sides))]
        return bool(((given[0] - given[1])[:, layer].abs() > 1e-3).any())

    for layer, teacher_layers in enumerate([[0, 1], [1, 2], [3, 2]]):
        for other in range(4):
            source = pair.source.keys.clone()
            source[:, other] += 1
            assert reads(layer, source=replace(pair.source, keys=source)) == (other in teacher_layers)
        for other in range(3):
            own = pair.target.keys.clone()
            own[:, other] += 1
            assert reads(layer, target=replace(pair.target, keys=own)) == (other == layer)


@pytest.mark.parametrize("mlp_ratio", [0.5, "auto"])
def test_joint_adapters_are_no_larger_than_the_control(
    fit_recipe: Callable[..., Recipe], data: FitData, mlp_ratio: float | str
) -> None:
    recipe = fit_recipe(fit={"sources": 2, "source_kinds": "both"}, projector={"mlp_ratio": mlp_ratio})
    sizes = [
        grafter.projector.count_parameters()
        for grafter in (
            joint_grafter(recipe, data, [[0], [1], [3]]),
            own_grafter(recipe, student_as_its_own_teacher(data), data.teacher.geometry.kv_dim),
        )
    ]
    # A hidden unit of each of six adapters is the least that there can be between them.
    assert 0 <= sizes[1] - sizes[0] < 6 * (2 * (12 + 16) + 12 + 1)


def test_joint_adapters_may_be_linear(fit_recipe: Callable[..., Recipe], data: FitData, questions: Questions) -> None:
    changed = joint_grafter(fit_recipe(projector={"mlp_ratio": "linear"}), data, [[0], [1], [3]])
    assert changed.projector.adapters(TEACHER)[0].up is None
    assert torch.equal(changed(questions[0].pair).keys, questions[0].pair.target.keys)


def test_gates_and_then_adapters_learn(questions: Questions) -> None:
    gated = grafter("gated").eval()
    gated(questions[0].pair).keys.square().sum().backward()
    assert gated.gates.grad[0].abs().min() > 0
    with torch.no_grad():
        gated.gates += 0.1
    gated(questions[0].pair).keys.square().sum().backward()
    assert gated.projector.adapters(TEACHER)[0].up.weight.grad.abs().sum() > 0


def test_a_gate_mixes_own_and_projected(questions: Questions) -> None:
    pair = questions[0].pair
    gated, alone = grafter("gated").eval(), grafter("none").eval()
    with torch.no_grad():
        gated.gates.fill_(1.0)
        mixed, projected = gated(pair), alone(pair)
    share = torch.tanh(torch.tensor(1.0))
    expected = pair.target.values + share * (projected.values - pair.target.values)
    torch.testing.assert_close(mixed.values, expected)
    assert torch.equal(mixed.values[:, :, :, :2], pair.target.values[:, :, :, :2])


def test_both_stand_one_after_the_other(questions: Questions) -> None:
    pair = questions[0].pair
    tokens = pair.mask.shape[1]
    kv = grafter("both").eval()(pair)
    assert kv.positions.tolist() == [list(range(2 * tokens))]
    assert torch.equal(kv.keys[:, :, :, tokens:], pair.target.keys)


@pytest.mark.parametrize("fusion", ["none", "gated", "both"])
def test_another_text_is_read_instead_whatever_its_length(questions: Questions, fusion: Fusion) -> None:
    grafted = grafter(fusion).eval()
    if grafted.gates is not None:
        torch.nn.init.ones_(grafted.gates)
    shortest, longest = (pick(range(3), key=lambda i: questions.lengths()[i]) for pick in (min, max))
    assert questions.lengths()[shortest] < questions.lengths()[longest]
    for text, read in ((shortest, longest), (longest, shortest)):
        one, other = questions[text].pair, questions[read].pair
        changed = grafted(one, other)
        tokens = {"none": [other], "gated": [one], "both": [one, other]}[fusion]
        assert changed.mask.sum() == sum(pair.mask.shape[1] for pair in tokens)


@pytest.mark.parametrize("fusion", ["none", "gated", "joint"])
def test_saved_and_loaded_gives_the_same(
    fit_recipe: Callable[..., Recipe], data: FitData, questions: Questions, tmp_path: Path, fusion: Fusion
) -> None:
    one = (joint(fit_recipe, data) if fusion == "joint" else grafter(fusion)).eval()
    torch.nn.init.normal_(one.projector.adapters(TEACHER)[0].down.weight)
    if one.gates is not None:
        torch.nn.init.normal_(one.gates)
    one.save_pretrained(tmp_path)
    other = Grafter.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(one(questions[0].pair).keys, other(questions[0].pair).keys)
    (tmp_path / "grafter.json").write_text("{}")
    with pytest.raises(GraftError, match="no grafter"):
        Grafter.from_pretrained(tmp_path)


def test_the_control_starts_at_the_students_own_cache(fit_recipe: Callable[..., Recipe], data: FitData) -> None:
    own = student_as_its_own_teacher(data)
    recipe = fit_recipe(fit={"sources": 2}, projector={"mlp_ratio": 0.5})
    control = own_grafter(recipe, own, data.teacher.geometry.kv_dim).eval()
    # As many hidden units as adapters that read the teacher's 16 channels, of two layers, keys and values.
    assert control.projector.adapters("student")[0].up.weight.shape[1] == 0.5 * 16 * 2 * 2
    question = Questions(own.held_out, own.held_out_examples)[0]
    with torch.no_grad():
        kv = control(question.pair)
    difference = (logits(data, question, kv) - logits(data, question, question.pair.target)).abs().max()
    assert difference < 1e-3
