"""Teachers that run beside the student: the same training as from a store, and what needs a store is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvgraft.cli import app
from kvgraft.distill.dataset import DistillationDataset
from kvgraft.errors import RecipeError, StoreError
from kvgraft.fit.data import prepare_fit
from kvgraft.identify import identify
from kvgraft.models.capture import capture
from kvgraft.plan import make_plan
from kvgraft.prepare import prepare
from kvgraft.recipe import Recipe
from kvgraft.run import arm_data, run
from kvgraft.store.online import OnlineKV
from tests.distill.gradients import gradients

# All of the tiny recipe's training texts, so that both know the same centre and spread.
ONLINE = {"source": "online", "calibration_texts": 16}


def test_first_steps_are_those_of_a_float32_store(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    found = []
    for place, changes in (("store", {"store": {"dtype": "float32"}}), ("online", {"kv_loss": ONLINE})):
        stores = str(tmp_path / place)
        settings = {**changes, "store": {**changes.get("store", {}), "path": stores}}
        recipe = tiny_recipe(arms=["kv"], training={"steps": 3, "gradient_accumulation_steps": 2}, **settings)
        steps, trainer = gradients(recipe, tmp_path / f"{place}-checkpoints")
        metrics = trainer.evaluate()
        found.append((steps, metrics["eval_loss"], metrics[f"eval_kv_loss/{recipe.teachers[0].name}"]))
        assert (tmp_path / place).exists() == (place == "store")
    (stored, *stored_losses), (online, *online_losses) = found
    assert len(stored) == 3
    for expected, own in zip(stored, online, strict=True):
        assert expected.keys() == own.keys()
        for name in expected:
            assert (own[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
    assert online_losses == pytest.approx(stored_losses, rel=1e-4)


def test_a_batch_is_one_pass_and_statistics_are_a_stores(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(tiny_recipe(kv_loss=ONLINE))
    (teacher,) = prepared.teachers
    stored = prepare(tiny_recipe(store={"dtype": "float32"})).teachers[0]
    assert teacher.alignment == stored.alignment
    own, expected = teacher.train.store.statistics(), stored.train.store.statistics()
    assert own.count == expected.count
    torch.testing.assert_close(own.mean, expected.mean, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(own.variance, expected.variance, atol=1e-6, rtol=1e-4)

    teacher.train.hold([])
    passes: list[int] = []

    def counted(model, input_ids, *rest, **options):
        passes.append(len(input_ids))
        return capture(model, input_ids, *rest, **options)

    monkeypatch.setattr("kvgraft.store.fill.capture", counted)
    # Of other texts, as the control reads them.
    train, pairs = (
        DistillationDataset(prepared.texts.train, [source], mismatch_seed=0) for source in (teacher.train, stored.train)
    )
    samples = train.__getitems__([3, 0, 5])
    assert passes == [3]
    name = teacher.recipe.name
    for sample, index in zip(samples, (3, 0, 5), strict=True):
        kv, expected_kv = sample["teacher_kv"][name], pairs[index]["teacher_kv"][name]
        torch.testing.assert_close(kv.keys, expected_kv.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(kv.values, expected_kv.values, atol=1e-5, rtol=1e-5)
        assert torch.equal(kv.mask, expected_kv.mask)
    # Alone, a text that is not held is read for itself.
    assert train[7]["teacher_kv"][name].mask.any()
    assert passes == [3, 1]
    with pytest.raises(StoreError, match=r"text 0+ is none of the 16 that teacher"):
        teacher.train.store.read("0" * 64)


def test_fewer_calibration_texts_are_the_first(tiny_recipe: Callable[..., Recipe]) -> None:
    store = prepare(tiny_recipe(kv_loss={"source": "online", "calibration_texts": 2})).teachers[0].train.store
    assert isinstance(store, OnlineKV)
    first = [len(text.input_ids) - 2 for text in list(store.texts.values())[:2]]
    assert store.statistics().count == sum(first)


def test_a_run_without_a_store(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe(
        arms=["kv_logits"],
        kv_loss={"source": "online"},
        logit_loss={"source": "online", "form": "sorted_probability"},
        training={"steps": 2},
    )
    result = run(recipe, tmp_path / "run")
    assert not (tmp_path / "stores").exists()
    assert result.teachers[0].store_bytes == 0
    assert "run in every step" in (tmp_path / "run" / "results.md").read_text()
    plan, stored = make_plan(recipe), make_plan(tiny_recipe())
    assert plan.store_bytes == 0
    assert plan.training_memory_bytes == stored.training_memory_bytes + plan.teachers[0].model.weight_bytes


def test_one_teacher_is_loaded_once_for_kv_and_logits(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(
        arms=["kv_logits"],
        kv_loss={"source": "online"},
        logit_loss={"source": "online", "form": "sorted_probability"},
    )
    loaded = []

    def identify_and_count(teacher):
        loaded.append(teacher.name)
        return identify(teacher)

    monkeypatch.setattr("kvgraft.prepare.identify", identify_and_count)
    monkeypatch.setattr("kvgraft.prepare_logits.identify", identify_and_count)
    data = arm_data(prepare(recipe))
    assert len(loaded) == 1
    store = data.train_sources[0].store
    assert isinstance(store, OnlineKV)
    assert data.logits is not None
    assert data.logits.teachers[recipe.teachers[0].name].model is store.load()


def test_what_needs_a_store_is_refused_by_name(
    tiny_recipe: Callable[..., Recipe], fit_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"combine: confidence reads likelihoods .* source: online keeps none"):
        tiny_recipe(kv_loss={"source": "online", "combine": "confidence"})
    with pytest.raises(RecipeError, match=r"leave kv_loss\.source: online out"):
        prepare_fit(fit_recipe(kv_loss={"source": "online"}))
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny_recipe(kv_loss={"source": "online"}).to_yaml())
    result = CliRunner().invoke(app, ["cache", str(path)])
    assert isinstance(result.exception, RecipeError)
    assert "--set kv_loss.source=store" in str(result.exception)
