from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvgraft.errors import GraftError, RecipeError
from kvgraft.fit.data import prepare_fit
from kvgraft.graft.run import graft
from kvgraft.graft.worth import cache_worth, continuations
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import Recipe
from kvgraft.report.graft import GraftReport

WHOLE = {"data": {"max_length": 250, "train_samples": 20, "held_out_samples": 5}}


def test_questions_end_where_the_answer_begins(fit_recipe: Callable[..., Recipe]) -> None:
    data = prepare_fit(fit_recipe(**WHOLE))
    items = continuations(data)
    assert len(items) == 5
    for item, example in zip(items, data.held_out_examples, strict=True):
        decode = data.student.tokenizer.decode
        question, answer = decode(item.question.input_ids[0]), decode(item.answer_ids[0])
        # Texts are cut at max_length.
        assert len(answer) > 5
        assert example.text.startswith(question + answer)
        assert example.text[: example.prompt_characters].startswith(question)
        assert item.question.source.mask.shape[1] == item.question.target.mask.shape[1] == item.question.mask.shape[1]


def test_nothing_of_the_answer_is_in_the_cache(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    # Question and answer run into each other, so that a teacher token can cover both.
    lines = [f'{{"prompt": "aa{"bc" * n}", "completion": "{"bc" * 9} and {n} more words"}}' for n in range(3, 40)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    data = prepare_fit(
        fit_recipe(data={"train": str(tmp_path / "data.jsonl"), "max_length": 250, "held_out_samples": 9})
    )
    for item, example, text in zip(continuations(data), data.held_out_examples, data.held_out.texts, strict=True):
        spans = data.held_out.teacher.store.read_tokens(text.sample_key).spans
        students, teachers = data.held_out.teacher.alignment(text).pairs()
        used = [
            t
            for s, t in zip(students, teachers, strict=True)
            if s < item.question.mask.shape[1] and item.question.mask[0, s]
        ]
        assert all(spans[token, 1] <= example.prompt_characters for token in used)


def test_own_cache_equals_reading_and_the_controls_differ(fit_recipe: Callable[..., Recipe]) -> None:
    recipe = fit_recipe(**WHOLE, store={"dtype": "float32"})
    data = prepare_fit(recipe)
    student, items = data.student.load(), continuations(data)
    config = {"org/teacher-1.0": {"d_model": 16, "num_layers": 4}}
    projector = KVDimensionProjector(config, 12, source_layers={"org/teacher-1.0": [[0], [1], [3]]})
    zero = torch.zeros(3, 12)
    losses = cache_worth(student, items, {"random": projector}, "org/teacher-1.0", (zero, zero), 2)
    with torch.no_grad():
        for index, item in enumerate(items):
            ids = torch.cat([item.question.input_ids, item.answer_ids], 1)
            logits = student(input_ids=ids).logits[0, item.question.mask.shape[1] : -1]
            read = torch.nn.functional.cross_entropy(logits, item.answer_ids[0, 1:], reduction="sum")
            assert losses["own"].sums[index] == pytest.approx(float(read), rel=1e-4)
    assert losses["mean"].sums == losses["zeros"].sums
    assert losses["none"].mean != losses["own"].mean
    for name in ("random", "random, another question", "random, tokens shuffled", "another question, own"):
        assert losses[name].mean != losses["own"].mean


def test_goes_the_whole_way_and_is_not_done_twice(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = fit_recipe(**WHOLE, fit={"steps": 2, "evaluate_every": 2})
    report = graft(recipe, tmp_path / "run")
    assert report.retention("own") == 1
    assert report.retention("none") == 0
    low, high = report.retention_interval("projector")
    assert low <= report.retention("projector") <= high
    assert (tmp_path / "run" / "graft.md").read_text().count("\n|") == len(report.nats) + 2
    assert graft(recipe, tmp_path / "run", resume=True) == GraftReport.read(tmp_path / "run" / "graft.json")


def test_what_cannot_be_grafted_is_refused(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="teacher_to_student"):
        graft(fit_recipe(fit={"direction": "student_to_teacher"}), tmp_path / "a")
    with pytest.raises(RecipeError, match=r"one for each of 0\.\.2"):
        graft(fit_recipe(alignment={"layers": [(0, 0), (2, 1)]}), tmp_path / "b")
    (tmp_path / "data.jsonl").write_text("\n".join(f'{{"text": "some text {n}"}}' for n in range(40)))
    data = prepare_fit(fit_recipe(data={"train": str(tmp_path / "data.jsonl")}))
    with pytest.raises(GraftError, match="no held-out text has a prompt"):
        continuations(data)
