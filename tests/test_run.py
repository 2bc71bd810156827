"""Whole runs on a tiny random teacher: what is left in the folder, resuming, and what a user may get wrong."""

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from kvgraft.distill.trainer import KVTrainer
from kvgraft.errors import DataError, KVGraftError, RecipeError, ResultError
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import Recipe, load_recipe
from kvgraft.report.log import read_metrics
from kvgraft.run import _finish_arm, run
from tests.conftest import fields_of_tiny_recipe

GUIDE_TEMPLATE = {
    "experiment": {"name", "date"},
    "model": {"teacher", "student"},
    "projector": {"mlp_ratio", "dropout", "init_method", "params"},
    "training": {"learning_rate", "batch_size", "steps"},
    "results": {"initial_loss", "final_loss", "reduction", "convergence_step"},
}


@pytest.fixture(scope="module")
def finished(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    fields = fields_of_tiny_recipe(tiny_teacher, folder / "stores")
    arms = ["baseline", "kv", "mismatched", "shared_objective"]
    run(Recipe.model_validate(fields | {"arms": arms}), folder / "run")
    return folder / "run"


def test_run_folder_holds_everything(finished: Path) -> None:
    log = yaml.safe_load((finished / "experiment.yaml").read_text())
    for section, fields in GUIDE_TEMPLATE.items():
        assert fields <= set(log[section])
        assert all(log[section][field] is not None for field in fields)
    assert len(log["notes"]) >= 3
    assert load_recipe(finished / "recipe.yaml").name == "tiny"
    assert load_recipe(finished / "experiment.yaml") == load_recipe(finished / "recipe.yaml")
    assert log["results"]["convergence_rule"].startswith("first evaluated step")
    store = log["environment"]["stores"]["org/teacher-1.0"]
    assert any(path.name.endswith(store) for path in (finished.parent / "stores").iterdir())
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "| held-out loss after |" in (finished / "results.md").read_text()
    records = read_metrics(finished / "metrics.jsonl")
    assert {record["arm"] for record in records} == {"baseline", "kv", "mismatched", "shared_objective"}
    logged = [record for record in records if record["arm"] == "kv" and "kv_loss" in record]
    assert {"loss", "ce_loss", "kv_loss", "kv_loss/org/teacher-1.0", "gradient_share/kv"} <= set(logged[0])
    assert not (finished / "kv" / "checkpoints").exists()


def test_student_is_a_plain_hugging_face_model_with_the_projector_beside_it(finished: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(finished / "kv" / "student")
    tokenizer = AutoTokenizer.from_pretrained(finished / "kv" / "student")
    assert tokenizer.decode(student.generate(**tokenizer("Tom has", return_tensors="pt"), max_new_tokens=3)[0])
    names = set(load_file(finished / "kv" / "student" / "model.safetensors"))
    assert names <= set(student.state_dict())
    assert not (finished / "kv" / "student" / "projector").exists()
    projector = KVDimensionProjector.from_pretrained(finished / "kv" / "projector")
    assert projector.direction == "student_to_teacher"
    assert list(projector.teachers) == ["org/teacher-1.0"]


def test_arms_start_from_the_same_weights(finished: Path) -> None:
    arms = [json.loads((finished / arm / "arm.json").read_text()) for arm in ("baseline", "kv", "mismatched")]
    assert len({arm["evaluations"][0]["metrics"]["loss"] for arm in arms}) == 1
    assert len({arm["evaluations"][-1]["metrics"]["loss"] for arm in arms}) == 3
    assert [point["step"] for point in arms[0]["evaluations"]] == [0, 2, 4, 6]


def test_same_recipe_gives_the_same_numbers(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    results = [run(tiny_recipe(arms=["kv"]), tmp_path / name) for name in ("one", "two")]
    assert results[0].arms[0].evaluations == results[1].arms[0].evaluations
    assert results[1].teachers[0].captured_tokens == 0


def test_existing_folder_is_not_touched_unless_asked(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe(arms=["baseline"], training={"steps": 2})
    folder = tmp_path / "run"
    first = run(recipe, folder)
    with pytest.raises(RecipeError, match=r"run holds a run already.*--resume.*--output.*--overwrite"):
        run(recipe, folder)
    with pytest.raises(RecipeError, match=r"differs in training.steps: 2 there, 4 given"):
        run(tiny_recipe(arms=["baseline"], training={"steps": 4}), folder, resume=True)
    weights = (folder / "baseline" / "student" / "model.safetensors").read_bytes()
    # An arm that was finished is not trained again; another may be added.
    both = run(tiny_recipe(arms=["baseline", "kv"], training={"steps": 2}), folder, resume=True)
    assert [arm.arm for arm in both.arms] == ["baseline", "kv"]
    assert both.seconds["train baseline"] == first.seconds["train baseline"]
    assert both.seconds["train kv"] > 0
    assert (folder / "baseline" / "student" / "model.safetensors").read_bytes() == weights
    run(recipe, folder, overwrite=True)


def interrupted_run(recipe: Recipe, folder: Path) -> str:
    """Ctrl-C a run of the command line in the middle of its training; returns what it printed."""
    path = folder.parent / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "kvgraft", "train", str(path), "--output", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    log = folder / "kv" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(record["step"] >= 4 for record in read_metrics(log)):
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    return output


def test_ctrl_c_leaves_a_checkpoint_and_resuming_is_exact(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    # Dropout draws random numbers, whose state has to come back too.
    recipe = tiny_recipe(arms=["kv"], training={"steps": 30}, projector={"dropout": 0.3})
    whole = run(recipe, tmp_path / "whole")
    output = interrupted_run(recipe, tmp_path / "stopped")
    assert "a checkpoint is in" in output
    assert "--resume" in output
    resumed = run(recipe, tmp_path / "stopped", resume=True)
    assert len(resumed.arms[0].evaluations) == len(whole.arms[0].evaluations) == 16
    for one, other in zip(whole.arms[0].evaluations, resumed.arms[0].evaluations, strict=True):
        assert one == other
    # The clock goes on where it stopped, and never backwards.
    clock = list(resumed.arms[0].seconds_at.items())
    assert [step for step, _ in clock] == [point.step for point in resumed.arms[0].evaluations]
    assert clock == sorted(clock, key=lambda point: point[1])
    for part in ("student/model.safetensors", "projector/projector.safetensors"):
        first, second = (load_file(tmp_path / name / "kv" / part) for name in ("whole", "stopped"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_makes_the_student_predict_the_teachers_kv(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    result = run(tiny_recipe(arms=["kv"], training={"steps": 40, "projector_learning_rate": 1e-2}), tmp_path / "run")
    kv = result.arms[0]
    assert kv.last["kv_loss"] < 0.9 * kv.first["kv_loss"]
    assert kv.last["kv_loss/org/teacher-1.0"] == pytest.approx(kv.last["kv_loss"])
    # No collapse: the student's own KV still varies.
    assert kv.last["student_kv_deviation"] > 0.3 * kv.first["student_kv_deviation"]


@pytest.mark.parametrize("objective", ["teacher_to_student", "alternating"])
def test_other_objectives_run(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, objective: str, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(tiny_recipe(arms=["kv"], kv_loss={"objective": objective}), tmp_path / "run")
    assert ("1.4 nats worse than no KV" in caplog.text) == (objective == "alternating")
    assert all(value == value for value in result.arms[0].last.values())
    assert result.arms[0].last["kv_loss"] < result.arms[0].first["kv_loss"]


def test_a_student_most_of_whose_layers_hold_no_kv(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    new = tiny_recipe().student.new | {
        "model_type": "lfm2",
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": False,
    }
    result = run(tiny_recipe(student={"new": new}), tmp_path / "run")
    assert result.teachers[0].layer_map == [(0, 2)]
    assert result.arms[1].last["kv_loss"] < result.arms[1].first["kv_loss"]


def test_a_student_that_keeps_latents(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    new = tiny_recipe().student.new | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 2,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 2,
    }
    result = run(tiny_recipe(student={"new": new}), tmp_path / "run")
    projector = KVDimensionProjector.from_pretrained(tmp_path / "run" / "kv" / "projector")
    assert projector.student_d_model == 16
    assert result.arms[1].last["kv_loss"] < result.arms[1].first["kv_loss"]


def test_two_teachers(tiny_recipe: Callable[..., Recipe], tiny_teacher: Path, tmp_path: Path) -> None:
    teachers = [
        {"name": "first.1", "model": str(tiny_teacher)},
        {"name": "second/2", "model": str(tiny_teacher), "dtype": "bfloat16"},
    ]
    result = run(tiny_recipe(arms=["kv"], teachers=teachers, alignment={"layers": [[1, 3]]}), tmp_path / "run")
    last = result.arms[0].last
    assert last["kv_loss"] == pytest.approx((last["kv_loss/first.1"] + last["kv_loss/second/2"]) / 2)
    assert [teacher.layer_map for teacher in result.teachers] == [[(1, 3)], [(1, 3)]]


def test_truncated_texts_are_counted_and_said(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(tiny_recipe(arms=["baseline"], training={"steps": 1}, data={"max_length": 16}), tmp_path / "run")
    assert "20 texts were cut to data.max_length 16 tokens" in caplog.text
    assert result.teachers[0].truncated_texts == 16
    assert result.truncated_train_texts == result.train_texts == 16


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("text", ["", " "])
def test_empty_text_is_named_before_anything_runs(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, text: str
) -> None:
    source = jsonl(tmp_path / "data.jsonl", [{"text": "fine"}, {"text": text}])
    recipe = tiny_recipe(data={"train": source, "held_out": source})
    with pytest.raises(KVGraftError, match=r"data\.jsonl, line 2: `text` is empty"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_texts_of_one_token_train(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", [{"text": letter} for letter in "abcdefgh"])
    held_out = jsonl(tmp_path / "held_out.jsonl", [{"text": "x"}])
    recipe = tiny_recipe(
        data={"train": train, "held_out": held_out, "train_samples": None, "held_out_samples": None},
        alignment={"skip_first_tokens": 0},
    )
    result = run(recipe, tmp_path / "run")
    assert all(value == value for arm in result.arms for value in arm.last.values())


def fill_the_disk(patch: pytest.MonkeyPatch, owner: type, method: str, folder: str) -> None:
    """Let ``owner.method`` find no room where it writes into ``folder``."""
    write = getattr(owner, method)

    def write_or_fail(self: object, path: str | None = None, *rest: object, **options: object) -> None:
        if str(path).endswith(folder):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, path, *rest, **options)

    patch.setattr(owner, method, write_or_fail)


def test_stopped_after_the_last_step_no_step_is_added(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(arms=["kv"], training={"lr_scheduler": "constant_with_warmup"})
    whole = run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patched:
        fill_the_disk(patched, KVTrainer, "save_model", "student")
        with pytest.raises(ResultError, match="No space left"):
            run(recipe, tmp_path / "stopped")
    resumed = run(recipe, tmp_path / "stopped", resume=True)
    assert resumed.arms[0].evaluations == whole.arms[0].evaluations
    for part in ("student/model.safetensors", "projector/projector.safetensors"):
        first, second = (load_file(tmp_path / name / "kv" / part) for name in ("whole", "stopped"))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_torn_checkpoint_is_passed_over(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(arms=["kv"])
    whole = run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patched:
        fill_the_disk(patched, Trainer, "_save_optimizer_and_scheduler", "checkpoint-4")
        with pytest.raises(ResultError, match="No space left"):
            run(recipe, tmp_path / "stopped")
    resumed = run(recipe, tmp_path / "stopped", resume=True)
    assert resumed.arms[0].evaluations == whole.arms[0].evaluations


def test_an_arm_is_finished_or_not_where_the_disk_is_full(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe(arms=["baseline"], training={"steps": 2})
    run(recipe, tmp_path / "run")
    (tmp_path / "run" / "baseline" / "arm.json").unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            _finish_arm(tmp_path / "run" / "baseline", "baseline", recipe, 0, 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "run" / "baseline" / "arm.json").exists()


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_text_without_any_label_is_refused(tiny_recipe: Callable[..., Recipe], tmp_path: Path, part: str) -> None:
    short = [{"prompt": "Say: ", "completion": f"answer {number}"} for number in range(8)]
    long = [{"prompt": "word " * 100, "completion": f"reply {number}"} for number in range(8)]
    source = {"train": jsonl(tmp_path / "a.jsonl", short), "held_out": jsonl(tmp_path / "b.jsonl", short[:1])}
    source[part] = jsonl(tmp_path / "long.jsonl", long)
    recipe = tiny_recipe(
        arms=["baseline"], data={**source, "loss_on": "completion", "train_samples": None, "held_out_samples": None}
    )
    if part == "train":
        source["held_out"] = jsonl(tmp_path / "b.jsonl", [{"prompt": "Other: ", "completion": "one"}])
    with pytest.raises(DataError, match=r"8 of 8 (training|held-out) texts have no token that enters the loss"):
        run(recipe, tmp_path / "run")


def test_a_run_is_not_resumed_on_other_text(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    held_out = jsonl(tmp_path / "held_out.jsonl", [{"text": "Held out it is."}])

    def recipe(word: str, *arms: str) -> Recipe:
        source = jsonl(tmp_path / "train.jsonl", [{"text": f"{word} {number} apples"} for number in range(8)])
        data = {"train": source, "held_out": held_out, "train_samples": None, "held_out_samples": None}
        return tiny_recipe(arms=list(arms), data=data, training={"steps": 2})

    run(recipe("Tom has", "baseline"), tmp_path / "run")
    with pytest.raises(RecipeError, match="training text changed since"):
        run(recipe("Anna ate", "baseline", "kv"), tmp_path / "run", resume=True)
    assert len(run(recipe("Tom has", "baseline", "kv"), tmp_path / "run", resume=True).arms) == 2


@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_a_folder_that_is_no_run_is_left_alone(tiny_recipe: Callable[..., Recipe], tmp_path: Path, how: str) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(RecipeError, match=r"holds chapter\.tex and no recipe\.yaml: it is not the folder of a run"):
        run(tiny_recipe(arms=["baseline"]), tmp_path / "thesis", **{how: True})
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_overwrite_removes_no_run_by_mistake(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = tiny_recipe(arms=["baseline"], training={"steps": 2}), tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    with pytest.raises(RecipeError, match="give one of them"):
        run(recipe, folder, resume=True, overwrite=True)
    monkeypatch.chdir(folder)
    with pytest.raises(RecipeError, match="where you work"):
        run(recipe, Path(), overwrite=True)
    assert (folder / "recipe.yaml").is_file()


def test_a_finished_run_keeps_what_it_measured(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe, folder = tiny_recipe(arms=["baseline"], training={"steps": 2}), tmp_path / "run"
    run(recipe, folder)
    measured = (folder / "result.json").read_bytes()
    run(recipe, folder, resume=True)
    assert (folder / "result.json").read_bytes() == measured


def test_a_training_that_diverges_ends_and_can_be_read(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe(arms=["kv"], training={"steps": 4, "learning_rate": 1e30, "warmup_steps": 0})
    run(recipe, tmp_path / "run")
    last = run(recipe, tmp_path / "run", resume=True).arms[0].last
    assert not math.isfinite(last["loss"])


def test_texts_that_are_skipped_whole_are_refused(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    source = jsonl(tmp_path / "short.jsonl", [{"text": letter} for letter in "abcdefgh"])
    recipe = tiny_recipe(data={"train": source, "train_samples": 6, "held_out_samples": 2})
    with pytest.raises(RecipeError, match=r"alignment\.skip_first_tokens leaves out .* set it to 0"):
        run(recipe, tmp_path / "run")
