"""The commands of docs/distil.md, one after the other and as printed, on tiny models."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvgraft.cli import app
from kvgraft.recipe import Recipe
from tests.docs.pages import fenced_commands, words_of


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
    for words in commands:
        # Nine runs, whose like tests/compare trains.
        done = CliRunner().invoke(app, [*words, "--print-commands"] if words[0] == "compare" else words)
        assert done.exit_code == 0, (words, done.output, done.exception)
    assert Path("runs/mine/kv/student/model.safetensors").is_file()
    assert Path("runs/mine/baseline/student/model.safetensors").is_file()
    assert Path("runs/mine/report.html").is_file()
    assert Path("runs/mine/evaluation/quality.json").is_file()
