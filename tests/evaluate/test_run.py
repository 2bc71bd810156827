"""``kvgraft evaluate`` on a finished run of a tiny random teacher."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvgraft.errors import DataError, RecipeError, ResultError
from kvgraft.evaluate.gsm8k import AnswerSettings
from kvgraft.evaluate.run import EvaluationSettings, evaluate
from kvgraft.prepare import read_texts
from kvgraft.recipe import Recipe, StudentRecipe
from kvgraft.report.evaluation import EVALUATION_FOLDER, evaluation_tables, read_evaluation
from kvgraft.run import run
from tests.conftest import fields_of_tiny_recipe

TEACHER = "org/teacher-1.0"
FEW_TOKENS = AnswerSettings(max_new_tokens=6)


@pytest.fixture(scope="module")
def trained(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run(Recipe.model_validate(fields_of_tiny_recipe(tiny_teacher, folder / "stores")), folder / "run")
    return folder / "run"


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """A run folder of each test's own."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_everything_is_measured_and_written_without_touching_the_run(finished: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    output = tmp_path / "evaluation"
    report = evaluate(finished, EvaluationSettings(answers=FEW_TOKENS), output)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    for arm in report.arms:
        trained = json.loads((finished / arm.arm / "arm.json").read_text())["evaluations"][-1]["metrics"]
        assert arm.quality == pytest.approx(trained, rel=1e-5)
        assert len(arm.similarity[TEACHER]) == 2 * 2
        assert arm.problems.problems == 4
    baseline, kv = report.arms
    assert baseline.similarity[TEACHER][0].projector_r2 is None
    r2 = [layer.projector_r2 for layer in kv.similarity[TEACHER] if layer.kind == "keys"]
    assert sum(r2) / len(r2) == pytest.approx(kv.quality[f"keys_r2/{TEACHER}"], rel=1e-4)

    assert set(json.loads((output / "quality.json").read_text())["arms"]) == {"baseline", "kv"}
    assert (output / "similarity.png").read_bytes().startswith(b"\x89PNG")
    asked = json.loads((output / "gsm8k.json").read_text())["asked"]
    assert (asked["data"], asked["problems"], asked["shots"]) == ("word_problems", 4, 0)
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    assert samples[0]["prompt"].endswith("\n")
    assert samples[0]["answer"].endswith(f"#### {samples[0]['expected_number']}")
    titles = " ".join(str(table.title) for table in evaluation_tables(report))
    assert all(part in titles for part in ("4 held-out texts", TEACHER, "problems of word_problems, 0-shot"))


def test_one_part_leaves_the_others_alone(finished: Path) -> None:
    evaluate(finished, EvaluationSettings(only=["quality"]))
    # Exact match needs neither the teacher nor its store.
    recipe = finished / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("model: /", "model: /nowhere/"))
    quality = (finished / "evaluation" / "quality.json").read_bytes()
    report = evaluate(finished, EvaluationSettings(only=["gsm8k"], problems=2, answers=FEW_TOKENS))
    assert report.arms[0].quality is None
    assert not report.arms[0].similarity
    assert report.arms[0].problems.problems == 2
    assert (finished / "evaluation" / "quality.json").read_bytes() == quality


def test_solved_problems_come_from_the_training_text(finished: Path) -> None:
    settings = EvaluationSettings(only=["gsm8k"], problems=1, answers=AnswerSettings(shots=1, max_new_tokens=4))
    with pytest.raises(DataError, match=r"none of 1 prompts leaves room for 4 tokens.*context of 256"):
        evaluate(finished, settings)
    with pytest.raises(DataError, match="--shots 17, and word_problems has 16 training problems"):
        evaluate(finished, EvaluationSettings(answers=AnswerSettings(shots=17)))


def test_a_run_without_problems(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    source = tmp_path / "data.jsonl"
    source.write_text("".join(json.dumps({"text": f"a text of {n} words"}) + "\n" for n in range(12)))
    folder = tmp_path / "run"
    data = {"train": str(source), "held_out": str(source), "train_samples": 8, "held_out_samples": None}
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "another text of some words"}) + "\n")
    run(tiny_recipe(arms=["baseline"], data=data | {"held_out": str(other)}, training={"steps": 1}), folder)
    assert evaluate(folder, EvaluationSettings(only=["quality"])).arms[0].quality is not None
    assert evaluate(folder).arms[0].problems is None
    with pytest.raises(DataError, match=r"other.jsonl holds no problems in GSM8K's form.*--data"):
        evaluate(folder, EvaluationSettings(only=["gsm8k"]))
    report = evaluate(folder, EvaluationSettings(only=["gsm8k"], data="word_problems", problems=2, answers=FEW_TOKENS))
    assert report.arms[0].problems.problems == 2


def test_a_teacher_that_answers_for_no_held_out_token_is_left_out(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    lines = [json.dumps({"question": f"{n} and {n}?", "answer": f"#### {2 * n}"}) + "\n" for n in range(4)]
    held_out.write_text("".join(lines))
    folder = tmp_path / "run"
    run(
        tiny_recipe(
            arms=["baseline"],
            data={"held_out": str(held_out)},
            alignment={"skip_first_tokens": 40},
            training={"steps": 1},
        ),
        folder,
    )
    report = evaluate(folder, EvaluationSettings(answers=FEW_TOKENS))
    assert f"KV is not compared: teacher {TEACHER} answers for no token of the held-out text" in caplog.text
    assert report.arms[0].quality is not None
    assert report.arms[0].problems.problems == 4
    assert {path.name for path in (folder / "evaluation").iterdir()} == {"quality.json", "gsm8k.json", "samples.jsonl"}
    with pytest.raises(DataError, match=r"alignment\.skip_first_tokens"):
        evaluate(folder, EvaluationSettings(only=["similarity"]))


def test_what_is_no_finished_run_is_named(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no run folder"):
        evaluate(tmp_path)
    result = json.loads((finished / "result.json").read_text())
    (finished / "result.json").write_text(json.dumps(result | {"format_version": 99}))
    with pytest.raises(ResultError, match=r"written by a newer kvgraft \(format 99"):
        evaluate(finished)
    (finished / "result.json").unlink()
    with pytest.raises(RecipeError, match=r"is not finished.*kvgraft train .*recipe\.yaml --output .* --resume"):
        evaluate(finished)


def test_unknown_parts_and_tasks_that_are_not_named(finished: Path) -> None:
    with pytest.raises(DataError, match="nothing called qualities can be measured; there are quality, similarity"):
        evaluate(finished, EvaluationSettings(only=["qualities"]))
    with pytest.raises(DataError, match="none is named; give --tasks"):
        evaluate(finished, EvaluationSettings(only=["tasks"]))


TEMPLATE = (
    "{% for m in messages %}<|{{m['role']}}|>\n{{m['content']}}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_problems_are_asked_in_the_template_that_was_trained(
    tiny_fields: dict, tiny_student: Path, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_student), AutoTokenizer.from_pretrained(tiny_student)
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(student)
    tokenizer.save_pretrained(student)
    messages = [
        [{"role": "user", "content": f"{n} and {n}?"}, {"role": "assistant", "content": f"It is #### {2 * n}"}]
        for n in range(40)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in messages))
    data = {"train": str(tmp_path / "d.jsonl"), "max_length": 90, "chat_template": "own"}
    # Baseline alone: the teacher needs no template then but is read all the same.
    teacher = tmp_path / "student"
    fields = tiny_fields | {"data": data, "arms": ["baseline"], "teachers": [{"name": TEACHER, "model": str(teacher)}]}
    fields["training"] = {**fields["training"], "steps": 1}
    recipe = Recipe.model_validate(fields).model_copy(update={"student": StudentRecipe(model=str(student))})
    run(recipe, tmp_path / "run")
    texts = read_texts(recipe)
    settings = EvaluationSettings(only=["gsm8k"], answers=AnswerSettings(shots=1, max_new_tokens=2))
    evaluate(tmp_path / "run", settings)
    samples = [json.loads(line) for line in (tmp_path / "run/evaluation/samples.jsonl").read_text().splitlines()]
    shot = texts.tokenizer.decode(texts.train[0].input_ids).rstrip() + "\n\n"
    for sample, example in zip(samples, texts.held_out, strict=True):
        assert (shot + texts.tokenizer.decode(example.input_ids)).startswith(sample["prompt"])


def test_a_student_that_diverged_is_measured_as_far_as_it_can_be(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    diverging = {"steps": 4, "learning_rate": 1e30, "warmup_steps": 0}
    run(tiny_recipe(arms=["baseline"], training=diverging), tmp_path / "run")
    evaluate(tmp_path / "run", EvaluationSettings(answers=FEW_TOKENS))
    assert "KV is not compared: x of layer 0 has NaN" in caplog.text
    read = read_evaluation(tmp_path / "run" / EVALUATION_FOLDER)
    assert math.isnan(read.quality.arms["baseline"]["loss"])
    assert read.similarity is None
    assert read.problems.arms["baseline"].correct == 0
