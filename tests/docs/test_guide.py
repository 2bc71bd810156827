"""The commands of docs/distil.md, one after the other and as printed, on tiny models."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvgraft import KVDimensionProjector
from kvgraft.cli import app
from kvgraft.recipe import Recipe
from tests.docs.pages import blocks, fenced_commands, words_of


def test_distilling_a_model_runs_as_printed(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = [words_of(command)[1:] for command in fenced_commands(Path("docs/distil.md"))]
    recipe = tiny_recipe(
        name="mine",
        arms=["baseline", "kv", "mismatched"],
        training={"steps": 1, "report_to": []},
        data={"train_samples": 8, "held_out_samples": 2},
    )
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    # Of nine runs tests/compare trains the like; a calibration in processes of its own is in tests/test_forecast.py.
    shorter = {"compare": ["--print-commands"], "plan": ["--no-calibration"]}
    for words in commands:
        done = CliRunner().invoke(app, [*words, *shorter.get(words[0], [])])
        assert done.exit_code == 0, (words, done.output, done.exception)
    assert Path("runs/mine/kv/student/model.safetensors").is_file()
    assert Path("runs/mine/baseline/student/model.safetensors").is_file()
    assert Path("runs/mine/report.html").is_file()
    assert Path("runs/mine/evaluation/quality.json").is_file()


def test_a_training_loop_of_ones_own_runs_as_printed(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> None:
    _, loop = blocks(Path("docs/distil.md"), "python")
    names = {
        "TEACHER": str(tiny_teacher),
        "STUDENT": str(tiny_student),
        "BATCHES": [["Four apples and three pears.", "Two."], ["One pear is left in the garden."]],
        "FOLDER": tmp_path / "mine",
    }
    exec(loop, names)
    trained = [*names["student"].parameters(), *names["projector"].parameters()]
    assert set(names["optimizer"].state) == set(trained)
    assert (tmp_path / "mine" / "model.safetensors").is_file()
    assert KVDimensionProjector.from_pretrained(tmp_path / "mine" / "projector").config == names["projector"].config
