import json
import weakref
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvgraft.align.evidence import LayerEvidence
from kvgraft.align.tokens import gather_aligned
from kvgraft.errors import RecipeError
from kvgraft.fit.data import KVRows, PairDataset, TokenBatches, ablation_data, prepare_fit
from kvgraft.models import loading
from kvgraft.models.capture import capture
from kvgraft.prepare import existing_tokenizer
from kvgraft.recipe import AlignmentRecipe, Recipe, StudentRecipe


def test_pairs_are_both_models_kv_of_the_same_tokens(fit_recipe: Callable[..., Recipe]) -> None:
    data = prepare_fit(fit_recipe(store={"dtype": "float32"}, data={"max_length": 250}))
    pair, text = data.train[3], data.train.texts[3]
    own = capture(data.student.load(), pair.input_ids)
    torch.testing.assert_close(pair.target.keys, own.keys)
    torch.testing.assert_close(pair.target.values, own.values)
    teacher_ids = data.teacher.tokenizer(data.student.tokenizer.decode(text.input_ids), return_tensors="pt")
    theirs = capture(data.teacher.load(), teacher_ids["input_ids"])
    aligned = gather_aligned(theirs, data.train.teacher.alignment(text))
    torch.testing.assert_close(pair.source.values[:, :, :, 2:], aligned.values[:, :, :, 2:])
    assert not pair.mask[0, :2].any()
    assert pair.mask[0, 2:].all()


def test_the_student_reads_text_by_the_tokenizer_that_the_recipe_names(
    fit_recipe: Callable[..., Recipe], tiny_teacher: Path, tiny_student: Path
) -> None:
    student = StudentRecipe(model=str(tiny_teacher), tokenizer=str(tiny_student))
    data = prepare_fit(fit_recipe(store={"dtype": "float32"}, student=student))
    pair, text = data.train[0], data.examples[0].text
    assert pair.input_ids[0].tolist() == loading.load_tokenizer(str(tiny_student))(text)["input_ids"][:96]
    torch.testing.assert_close(pair.target.keys, capture(data.student.load(), pair.input_ids).keys)


def test_a_tokenizer_of_more_tokens_than_the_student_has_embeddings_is_refused(
    fit_recipe: Callable[..., Recipe], tiny_teacher: Path, tiny_student: Path
) -> None:
    student = StudentRecipe(model=str(tiny_student), tokenizer=str(tiny_teacher))
    with pytest.raises(RecipeError, match=r"has 400 tokens and .* embeddings of 300"):
        prepare_fit(fit_recipe(student=student))


def test_the_revision_is_of_the_model_and_not_of_another_tokenizer(
    fit_recipe: Callable[..., Recipe], tiny_teacher: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(loading, "load_tokenizer", lambda name, revision: asked.append(revision) or range(300))
    for name in (tiny_student, tiny_teacher):
        student = StudentRecipe(model=str(tiny_teacher), revision="abc", tokenizer=str(name))
        existing_tokenizer(fit_recipe(student=student))
    assert asked == [None, "abc"]


def test_the_teacher_is_not_held_while_what_it_said_is_fitted(
    fit_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = loading.load_model, []

    def load_and_note(*args: Any, **options: Any) -> PreTrainedModel:
        model = load(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load_model", load_and_note)
    data = prepare_fit(fit_recipe())
    assert [model() for model in loaded] == [None, data.student.load()]


def test_direction_turns_the_pair_around(fit_recipe: Callable[..., Recipe]) -> None:
    recipes = [fit_recipe(fit={"direction": name}) for name in ("teacher_to_student", "student_to_teacher")]
    layers = [teacher for _, teacher in prepare_fit(recipes[0]).layer_map]
    pairs = [prepare_fit(recipe).train[0] for recipe in recipes]
    forwards, backwards = pairs
    assert torch.equal(forwards.source.keys[:, layers], backwards.target.keys)
    assert torch.equal(forwards.target.keys, backwards.source.keys)


def test_held_out_text_too_short_to_measure_is_refused(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    for part, words in (("train", 20), ("test", 1)):
        lines = [json.dumps({"text": f"{part} {n}, " + "and more " * words}) for n in range(6)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    changes = {"data": {"train": str(tmp_path)}, "alignment": {"skip_first_tokens": 40}}
    with pytest.raises(RecipeError, match=r"6 held-out texts leave 0 tokens .*skip_first_tokens"):
        prepare_fit(fit_recipe(**changes))


@pytest.mark.parametrize(("method", "direction"), [("cka", "student_to_teacher"), ("predictive", "teacher_to_student")])
def test_layers_by_evidence_are_found_once(
    fit_recipe: Callable[..., Recipe],
    tiny_teacher: Path,
    method: str,
    direction: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A student that is its own teacher: the map is known.
    changes = {
        "student": StudentRecipe(model=str(tiny_teacher)),
        "alignment": AlignmentRecipe(layers=method),
    }
    recipe = fit_recipe(fit={"direction": direction}).model_copy(update=changes)
    data = prepare_fit(recipe)
    assert data.layer_map == [(layer, layer) for layer in range(4)]
    (path,) = recipe.store.path.glob("layers-*.json")
    assert LayerEvidence.model_validate_json(path.read_text()).method == method
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("a model was loaded again"))
    assert prepare_fit(recipe).layer_map == data.layer_map


def test_batches_hold_so_many_tokens_and_repeat_with_their_seed(fit_recipe: Callable[..., Recipe]) -> None:
    pairs = prepare_fit(fit_recipe()).train
    first, again, other = (list(islice(TokenBatches(pairs, 50, seed), 12)) for seed in (0, 0, 1))
    assert {len(batch) for batch in first} == {50}
    assert all(torch.equal(one.source, two.source) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0].source, other[0].source)
    rows = first[0]
    known = pairs.rows(10**6)
    # Every token comes from the texts, source and target still together.
    for index in range(5):
        same = (known.source[0, 0] == rows.source[0, 0, index]).all(1)
        assert same.any()
        assert (known.target[1, 1][same] == rows.target[1, 1, index]).all(1).any()


def test_all_texts_are_drawn_from(fit_recipe: Callable[..., Recipe]) -> None:
    pairs = prepare_fit(fit_recipe()).train
    total = len(pairs.rows(10**6))
    seen = torch.cat([batch.target[1, 0] for batch in islice(TokenBatches(pairs, 64, 0), 4 * total // 64)])
    assert len(torch.unique(seen, dim=0)) > 0.9 * len(torch.unique(pairs.rows(10**6).target[1, 0], dim=0))


def test_texts_longer_than_the_buffer_are_drawn_whole(fit_recipe: Callable[..., Recipe]) -> None:
    pairs, read = prepare_fit(fit_recipe()).train, []

    class Noting(PairDataset):
        def rows_of(self, index: int) -> KVRows:
            read.append(len(pairs.rows_of(index)))
            return super().rows_of(index)

    batches = list(islice(TokenBatches(Noting(**vars(pairs)), 2, 0), 300))
    assert min(read) > 8 * 2
    # What was read and not given is at most a buffer and the last text.
    assert sum(read) - sum(map(len, batches)) < 8 * 2 + max(read)


def test_ablation_data_is_keys_and_values_of_real_models(fit_recipe: Callable[..., Recipe]) -> None:
    data = ablation_data(fit_recipe())
    assert data.x.shape[1] == data.y.shape[1] == 6
    assert (data.x.shape[3], data.y.shape[3]) == (16, 12)
    assert not data.synthetic
    keys, values = (ablation_data(fit_recipe(), kind) for kind in ("keys", "values"))
    assert torch.equal(data.x, torch.cat([keys.x, values.x], 1))
    assert torch.equal(data.held_out_y, torch.cat([keys.held_out_y, values.held_out_y], 1))


def test_a_new_student_is_refused(tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"student\.model"):
        prepare_fit(tiny_recipe())


def test_several_teachers_are_refused(fit_recipe: Callable[..., Recipe]) -> None:
    recipe = fit_recipe()
    two = [recipe.teachers[0], recipe.teachers[0].model_copy(update={"name": "other"})]
    with pytest.raises(RecipeError, match="one teacher"):
        prepare_fit(recipe.model_copy(update={"teachers": two}))


def test_texts_beyond_the_students_context_are_refused(fit_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"data\.max_length 600 is longer than the student's context 512"):
        prepare_fit(fit_recipe(data={"max_length": 600}))


def test_a_teacher_of_a_short_context_is_refused(fit_recipe: Callable[..., Recipe], short_teacher: Path) -> None:
    teacher = {"name": "org/teacher-1.0", "model": str(short_teacher)}
    with pytest.raises(RecipeError, match="reads 64 tokens"):
        prepare_fit(fit_recipe(teachers=[teacher], data={"max_length": 300}))
    prepare_fit(fit_recipe(teachers=[teacher | {"long_texts": "cut"}], data={"max_length": 300}))
