"""What is logged has the names that docs/trackers.md promises, in metrics.jsonl and in TensorBoard alike."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from kvgraft.cli import app
from kvgraft.distill.arms import training_arguments
from kvgraft.distill.trackers import others_than_tensorboard, tracker_callbacks, tracker_problems
from kvgraft.recipe import Recipe
from kvgraft.report.log import read_metrics
from kvgraft.run import run
from tests.conftest import fields_of_tiny_recipe

TEACHERS = ("first", "second")
OF_EVERY_LINE = {"arm", "step", "seconds"}
OF_THE_TRAINER = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"}


def documented_names() -> set[str]:
    text = Path("docs/trackers.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    return {name.replace("TEACHER", teacher) for name in names for teacher in TEACHERS}


@pytest.fixture(scope="module")
def arms(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Arms that log everything that there is; the steps do not divide by ``evaluate_every``."""
    folder = tmp_path_factory.mktemp("trackers")
    fields = fields_of_tiny_recipe(tiny_teacher, folder / "stores")
    fields |= {
        "teachers": [{"name": name, "model": str(tiny_teacher)} for name in TEACHERS],
        "projector": {"activation": "relu"},
        "kv_loss": {"combine": "learned", "gradient_share": 0.3},
        "logit_loss": {"form": "chunk_likelihood", "gradient_share": 0.2},
        "training": {**fields["training"], "steps": 3},
        "arms": ["baseline", "kv_logits"],
    }
    recipe = Recipe.model_validate(fields)
    run(recipe, folder / "run")
    return [folder / "run" / arm for arm in recipe.arms]


def logged(arm: Path) -> set[str]:
    return {name for record in read_metrics(arm / "metrics.jsonl") for name in record} - OF_EVERY_LINE


def test_names_are_the_documented_ones(arms: list[Path]) -> None:
    found = set().union(*(logged(arm) for arm in arms))
    assert found - OF_THE_TRAINER == documented_names()


def test_tensorboard_has_every_value_of_every_arm(arms: list[Path]) -> None:
    for arm in arms:
        events = EventAccumulator(str(arm / "tensorboard")).Reload()
        records = read_metrics(arm / "metrics.jsonl")
        tags = set(events.Tags()["scalars"])
        expected = {f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}" for name in logged(arm)}
        assert tags == expected
        # The first before training, the last where the steps end.
        losses = [(event.step, event.value) for event in events.Scalars("eval/loss")]
        assert losses == [
            (record["step"], pytest.approx(record["eval_loss"])) for record in records if "eval_loss" in record
        ]
        assert [step for step, _ in losses] == [0, 2, 3]


def test_only_what_is_named_is_written(tmp_path: Path) -> None:
    assert tracker_callbacks([], tmp_path) == []
    assert others_than_tensorboard(["tensorboard", "trackio"]) == ["trackio"]


def test_trackers_are_checked_before_anything_runs(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    assert tracker_problems(["tensorboard"]) == []
    assert "there is no tracker 'tensorbord'; known: " in tracker_problems(["tensorbord"])[0]
    assert "neptune is not installed" in tracker_problems(["neptune"])[0]
    (tmp_path / "recipe.yaml").write_text(tiny_recipe().to_yaml(), encoding="utf-8")
    planned = CliRunner().invoke(app, ["plan", str(tmp_path / "recipe.yaml"), "--set", "training.report_to=[neptune]"])
    assert planned.exit_code == 1
    assert "neptune is not installed" in planned.output


def test_a_recipe_is_a_project_and_an_arm_a_run(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    arguments = training_arguments(tiny_recipe(training={"report_to": []}), tmp_path / "kv" / "checkpoints")
    assert (arguments.project, arguments.run_name) == ("tiny", str(tmp_path / "kv"))


def test_trackers_do_not_make_another_run(tiny_recipe: Callable[..., Recipe]) -> None:
    watched = tiny_recipe(training={"report_to": ["tensorboard", "wandb"]})
    assert watched.fingerprint() == tiny_recipe(training={"report_to": []}).fingerprint()
