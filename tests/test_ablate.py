"""``kvgraft ablate`` as a user meets it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvgraft.ablate import run_ablations
from kvgraft.cli import app
from kvgraft.errors import ProjectorError
from kvgraft.recipe import Recipe

runner = CliRunner()
QUICK = ["ablate", "--only", "layer_norm", "--seeds", "3 4", "--steps", "2", "--width-divisor", "128"]


def test_tables_warning_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvgraft.cli.shared.console", Console(width=200))
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


def test_a_recipe_brings_real_kv(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Layers of their own, targets in their own units, no synthetic warning."""
    report = run_ablations(fit_recipe(), tmp_path, only=["width"], seeds=[0], steps=2, batch_tokens=64)
    assert report.warning == ""
    # Keys and values of three layers.
    assert report.ablation.num_layers == 6
    assert "keys and values of org/teacher-1.0" in report.ablation.source
    assert report.ablation.target_variance == pytest.approx(1, rel=1e-4)
    # The teacher's KV is 16 wide, the student's 12.
    assert report.ablation.arms[0].runs[0].parameters == 6 * (16 * 12 + 12)


def test_one_kind_of_kv_alone(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    report = run_ablations(
        fit_recipe(), tmp_path, kind="values", only=["layer_norm"], seeds=[0], steps=1, batch_tokens=64
    )
    assert report.ablation.num_layers == 3
    assert report.ablation.source.startswith("values of org/teacher-1.0")
    with pytest.raises(ProjectorError, match=r"--kind values.*give a RECIPE"):
        run_ablations(None, tmp_path / "synthetic", kind="values")


def test_width_divisor_and_a_recipe_exclude_each_other(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(ProjectorError, match="leave one of them out"):
        run_ablations(tiny_recipe(), tmp_path, width_divisor=8)
