"""What a run will take: the arithmetic on made calibrations, and a real one against the run that follows."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvgraft.calibration import (
    ArmCalibration,
    Calibration,
    CaptureCalibration,
    StorePart,
    TeacherCalibration,
    TrainingCalibration,
    calibrate,
    few_texts,
    store_part,
)
from kvgraft.forecast import forecast_from, make_forecast
from kvgraft.memory import PeakMemory
from kvgraft.prepare import prepare, read_texts
from kvgraft.recipe import Recipe
from kvgraft.run import arm_data, run
from kvgraft.store.fill import store_folder
from kvgraft.store.format import write_manifest
from kvgraft.store.reader import KVStore

TEACHER = TeacherCalibration(
    load_seconds=5.0,
    tokens_per_second=100.0,
    bytes_per_token=1_000,
    once_bytes=7,
    captured_tokens=(200, 100),
    whole=(StorePart(2_000, 1_000), StorePart(400, 400)),
)
ARM = ArmCalibration(setup=1.0, evaluation=0.5, first_step=3.0, step=2.0, checkpoint=0.25, closing=0.125)
CALIBRATION = Calibration(
    capture=CaptureCalibration(
        text_seconds=2.0,
        phase_seconds={
            "read text": 0.0,
            "identify T": 0.5,
            "capture T (training text)": 9.0,
            "capture T (held-out text)": 1.0,
            "align T": 0.2,
        },
        text_share=0.1,
        teachers={"T": TEACHER},
        peak=PeakMemory(host_bytes=3_000_000, device_bytes=10),
    ),
    training=TrainingCalibration(
        arms={"baseline": ARM, "kv": ARM},
        phase_seconds={"read text": 0.0, "log-probabilities of T (training text)": 0.3},
        evaluation_share=0.5,
        peak=PeakMemory(host_bytes=1_000_000, device_bytes=20),
    ),
    seconds=1.0,
)


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe(training={"steps": 21, "evaluate_every": 10, "save_every": 20})


def test_seconds_of_each_phase(recipe: Recipe) -> None:
    # 4 evaluations of 1 s, 21 steps of 2 s, 2 checkpoints; the kv arm measures shares 10 times for 1 s more.
    baseline = 1.0 + 4 * 1.0 + 42.0 + 0.5 + 0.125
    assert forecast_from(recipe, CALIBRATION).seconds == pytest.approx(
        {
            "read text": 2.0,
            "identify T": 0.5,
            "capture T (training text)": 5.0 + 10.0,
            "capture T (held-out text)": 4.0,
            "align T": 2.0,
            "log-probabilities of T (training text)": 3.0,
            "train baseline": baseline,
            "train kv": baseline + 10.0,
        }
    )


def test_a_store_that_is_there_costs_no_time(recipe: Recipe) -> None:
    whole = (StorePart(2_000, 0), StorePart(400, 400))
    teachers = {"T": replace(TEACHER, whole=whole)}
    calibration = replace(CALIBRATION, capture=replace(CALIBRATION.capture, teachers=teachers))
    forecast = forecast_from(recipe, calibration)
    assert forecast.seconds["capture T (training text)"] == 0.0
    assert forecast.seconds["capture T (held-out text)"] == 5.0 + 4.0
    assert forecast.store_bytes == 2_400 * 1_000 + 2 * 7
    # Log-probabilities of all of it are missing: the teacher reads it again, and nothing more is counted for them.
    whole = (StorePart(2_000, 2_000), StorePart(400, 400))
    teachers = {"T": replace(TEACHER, whole=whole)}
    calibration = replace(CALIBRATION, capture=replace(CALIBRATION.capture, teachers=teachers))
    assert forecast_from(recipe, calibration).seconds["capture T (training text)"] == 5.0 + 20.0


def test_what_the_recipes_own_store_holds_is_found(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe()
    prepared = prepare(recipe)
    source, examples = prepared.teachers[0].train, prepared.texts.train_examples
    teacher, tokens = recipe.teachers[0], source.store.num_tokens
    assert store_part(recipe, teacher, source, examples) == StorePart(tokens, 0)
    # Log-probabilities are asked for where arms need them; one pass gives them with the KV, or alone.
    logits = tiny_recipe(arms=["kv_logits"], logit_loss={"form": "sorted_probability"})
    assert store_part(logits, teacher, source, examples) == StorePart(tokens, tokens)
    arm_data(prepare(logits))
    assert store_part(logits, teacher, source, examples) == StorePart(tokens, 0)
    elsewhere = tiny_recipe(store={"path": str(tmp_path / "elsewhere")})
    assert store_part(elsewhere, teacher, source, examples) == StorePart(tokens, tokens)


def test_likelihoods_that_a_store_lacks_take_a_pass(
    tiny_recipe: Callable[..., Recipe], tiny_fields: dict, tmp_path: Path
) -> None:
    teachers = [*tiny_fields["teachers"], {**tiny_fields["teachers"][0], "name": "second"}]
    recipe = tiny_recipe(teachers=teachers, kv_loss={"combine": "confidence"}, store={"path": str(tmp_path / "whole")})
    prepared = prepare(recipe)
    source, examples = prepared.teachers[0].train, prepared.texts.train_examples
    tokens = source.store.num_tokens
    assert store_part(recipe, recipe.teachers[0], source, examples) == StorePart(tokens, 0)
    for path in source.store.folder.glob("likelihoods-*"):
        path.unlink()
    assert store_part(recipe, recipe.teachers[0], source, examples) == StorePart(tokens, tokens)
    assert store_part(recipe, recipe.teachers[0], replace(source, likelihoods=None), examples) == StorePart(tokens, 0)


def test_a_store_of_other_found_layers_and_of_an_older_format_is_found(
    fit_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = fit_recipe()
    recipe = recipe.model_copy(update={"alignment": recipe.alignment.model_copy(update={"layers": "cka"})})
    prepared = prepare(recipe)
    source, examples = prepared.teachers[0].train, prepared.texts.train_examples
    assert isinstance(source.store, KVStore)
    tokens = source.store.num_tokens
    others = replace(source.store.identity, layers=(0,))
    few = replace(
        source, store=replace(source.store, manifest=source.store.manifest.model_copy(update={"identity": others}))
    )
    assert store_part(recipe, recipe.teachers[0], few, examples) == StorePart(tokens, 0)
    old = replace(source.store.identity, format_version=1)
    manifest = source.store.manifest.model_copy(update={"identity": old})
    write_manifest(source.store.folder, manifest)
    source.store.folder.rename(store_folder(recipe.store.path, "org/teacher-1.0", old))
    assert store_part(recipe, recipe.teachers[0], source, examples) == StorePart(tokens, 0)


@pytest.mark.parametrize("batching", ["buckets", "packed"])
def test_the_few_steps_read_whole_batches(batching: str, tiny_recipe: Callable[..., Recipe]) -> None:
    data, training = {"train_samples": 60}, {"batch_size": 2, "batching": batching}
    recipe = tiny_recipe(data=data, training=training | {"tokens_per_batch": 500})
    few = few_texts(read_texts(recipe), recipe).train
    assert 4 * 500 <= sum(len(text.input_ids) for text in few) < 5 * 500
    recipe = tiny_recipe(data=data, training=training)
    assert len(few_texts(read_texts(recipe), recipe).train) == 4 * 2


def test_memory_counts_the_files_that_are_mapped_while_training(recipe: Recipe) -> None:
    peak = forecast_from(recipe, CALIBRATION).peak_memory
    assert peak == PeakMemory(host_bytes=1_000_000 + (2_400 - 300) * 1_000, device_bytes=20)
    alone = replace(CALIBRATION.training, arms={"baseline": ARM})
    assert forecast_from(recipe, replace(CALIBRATION, training=alone)).peak_memory.host_bytes == 3_000_000


@pytest.mark.parametrize("writable", [True, False])
def test_calibration_leaves_stores_alone_that_are_only_read(
    writable: bool, tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    monkeypatch.setattr("kvgraft.calibration._in_fresh_process", lambda measure, recipe, folder: folders.append(folder))
    monkeypatch.setattr("kvgraft.calibration.os.access", lambda path, mode: writable)
    calibrate(tiny_recipe())
    assert {folder.parent for folder in folders} == {tmp_path if writable else Path(tempfile.gettempdir())}


def test_a_real_calibration_before_the_run(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    # Every arm starts a process, which takes longer than all that it measures here.
    recipe = tiny_recipe(arms=["kv"], data={"train_samples": 30, "held_out_samples": 40})
    forecast = make_forecast(recipe)
    assert not (tmp_path / "stores").exists()
    assert not list(tmp_path.glob("kvgraft-plan-*"))
    result = run(recipe, tmp_path / "run")
    assert forecast.seconds.keys() == result.seconds.keys()
    assert all(seconds > 0 for seconds in forecast.seconds.values())
    on_disk = sum(path.stat().st_size for path in (tmp_path / "stores").rglob("*.safetensors"))
    assert forecast.store_bytes == pytest.approx(on_disk, rel=0.1)
    # Python and its libraries; a plan for a teacher of a few thousand parameters needs little beside.
    assert 1e8 < forecast.peak_memory.host_bytes < 4e9
    assert result.peak_memory is not None
