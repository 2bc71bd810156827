"""``kvgraft ablate`` as a user meets it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from kvgraft.ablate import run_ablations
from kvgraft.cli import app
from kvgraft.errors import ProjectorError
from kvgraft.projector.scenario import AblationData
from kvgraft.recipe import Recipe

runner = CliRunner()
QUICK = ["ablate", "--only", "layer_norm", "--seeds", "3 4", "--steps", "2", "--width-divisor", "128"]


def test_tables_warning_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvgraft.cli._console", Console(width=200))
    result = runner.invoke(app, [*QUICK, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "not evidence about real models" in " ".join(result.output.split())
    assert "no LayerNorm" in result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ablation.json", "ablation.md", "ablation.png"}


def test_json_is_what_the_file_holds(tmp_path: Path) -> None:
    result = runner.invoke(app, [*QUICK, "--output", str(tmp_path), "--json"])
    printed = json.loads(result.stdout)
    assert printed == json.loads((tmp_path / "ablation.json").read_text())
    assert printed["ablation"]["seeds"] == [3, 4]
    assert printed["ablation"]["in_dim"] == 40


def test_an_ablation_that_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "ablation.md").write_text("mine")
    with pytest.raises(ProjectorError, match=r"already holds ablation\.md.*--overwrite"):
        run_ablations(None, tmp_path)
    assert (tmp_path / "ablation.md").read_text() == "mine"
    assert runner.invoke(app, [*QUICK, "--output", str(tmp_path), "--overwrite"]).exit_code == 0
    assert (tmp_path / "ablation.md").read_text() != "mine"
    with pytest.raises(ProjectorError, match="no folder"):
        run_ablations(None, tmp_path / "ablation.md")


def test_seeds_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    result = runner.invoke(app, ["ablate", "--seeds", "0,x", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_overrides_need_a_recipe(tmp_path: Path) -> None:
    result = runner.invoke(app, [*QUICK, "--set", "seed=1", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_recipe_brings_real_kv(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of their own, targets in their own units, no synthetic warning."""
    recipe = tiny_recipe()
    asked: list[str] = []

    def ablation_data(given: Recipe) -> AblationData:
        asked.append(given.name)
        x, y = torch.randn(1, 3, 50, 8), torch.randn(1, 3, 50, 4) * 100 + 1000
        return AblationData(x[:, :, :30], y[:, :, :30], x[:, :, 30:], y[:, :, 30:], "a store")

    monkeypatch.setitem(sys.modules, "kvgraft.fit", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "kvgraft.fit.data", SimpleNamespace(ablation_data=ablation_data))
    report = run_ablations(recipe, tmp_path, only=["width"], seeds=[0], steps=2)
    assert asked == ["tiny"]
    assert report.warning == ""
    assert (report.ablation.num_layers, report.ablation.source) == (3, "a store")
    assert report.ablation.target_variance == pytest.approx(1, rel=1e-4)
    assert report.ablation.arms[0].runs[0].parameters == 3 * (8 * 4 + 4)


def test_width_divisor_and_a_recipe_exclude_each_other(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(ProjectorError, match="leave one of them out"):
        run_ablations(tiny_recipe(), tmp_path, width_divisor=8)
