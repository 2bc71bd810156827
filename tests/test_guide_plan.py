"""``kvgraft plan --guide``: what the guide's schemes and models take, counted on real modules."""

import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from kvgraft import guide_plan
from kvgraft.cli import app
from kvgraft.guide_plan import GuidePlan, make_guide_plan
from kvgraft.projector.projector import KVDimensionProjector

runner = CliRunner()


@pytest.fixture(scope="module")
def plan() -> GuidePlan:
    return make_guide_plan()


def test_schemes_are_the_guides(plan: GuidePlan) -> None:
    printed = [
        (
            scheme.teacher,
            scheme.sizes.in_dim,
            scheme.num_layers,
            scheme.sizes.out_dim,
            scheme.sizes.mlp_ratio,
            scheme.dropout,
            scheme.init_method,
            scheme.guide_parameters,
        )
        for scheme in plan.schemes
    ]
    assert printed == [
        ("Qwen2-7B", 3584, 28, 2048, 0.5, 0.1, "xavier", 17_000_000),
        ("Qwen2-14B", 5120, 40, 1536, 1.0, 0.1, "xavier", 34_000_000),
        ("Llama-3-70B", 8192, 80, 2048, 2.0, 0.15, "xavier", 68_000_000),
    ]


def test_weights_are_those_of_ruling_r2(plan: GuidePlan) -> None:
    millions = [round(scheme.sizes.adapter_weights / 1e6, 1) for scheme in plan.schemes]
    assert millions == [10.1, 34.1, 167.8]


def test_sizes_are_those_of_real_projectors(plan: GuidePlan) -> None:
    sizes = [scheme.sizes for scheme in plan.schemes]
    sizes += [reading.sizes for model in plan.models for reading in model.readings]
    assert len(sizes) == 3 + 2 * 4
    for size in sizes:
        with torch.device("meta"):
            projector = KVDimensionProjector(
                {"t": {"d_model": size.in_dim, "num_layers": 1}}, size.out_dim, size.mlp_ratio
            )
        assert size.projector_parameters == projector.count_parameters() == 2 * size.adapter_parameters
        assert size.parameter_memory_bytes == 4 * projector.count_parameters()
        assert size.training_memory_bytes == 4 * size.parameter_memory_bytes


def test_both_readings_of_d_model(plan: GuidePlan) -> None:
    widths = {
        model.teacher: [(reading.sizes.in_dim, reading.sizes.out_dim) for reading in model.readings]
        for model in plan.models
    }
    assert widths == {
        "Qwen2-7B": [(3584, 1536), (512, 256)],
        "Qwen1.5-14B": [(5120, 1536), (5120, 256)],
        "Qwen2-72B": [(8192, 1536), (1024, 256)],
        "Llama-3-70B": [(8192, 1536), (1024, 256)],
    }
    seventy = plan.models[3]
    # Keys and values, 80 layers, two bytes.
    assert [reading.sizes.kv_bytes_per_token for reading in seventy.readings] == [
        2 * 80 * 8192 * 2,
        2 * 80 * 1024 * 2,
    ]
    assert [reading.auto_mlp_ratio for reading in seventy.readings] == [2.0, 0.5]
    assert [model.mlp_ratio for model in plan.models] == [0.5, 1.0, 2.0, 2.0]


def test_notes_name_what_the_guide_got_wrong(plan: GuidePlan) -> None:
    notes = "\n".join(plan.notes)
    assert "Qwen2-14B, the teacher of scheme B, never existed" in notes
    assert "3584 to 2048 at 0.5 takes 10.1M weights and not 17M" in notes
    assert "8192 to 2048 at 2.0 takes 167.8M weights and not 68M" in notes
    assert "Scheme B" not in notes
    assert "alone: here only for Qwen1.5-14B." in notes


def test_a_right_figure_gets_no_note(monkeypatch: pytest.MonkeyPatch) -> None:
    right = [guide_plan.Scheme("A", "fast", "Qwen2-7B", 3584, 28, 2048, 10)]
    monkeypatch.setattr(guide_plan, "SCHEMES", right)
    assert not any("and not" in note for note in make_guide_plan().notes)


def test_the_command_prints_tables_and_json(monkeypatch: pytest.MonkeyPatch, plan: GuidePlan) -> None:
    monkeypatch.setattr("kvgraft.cli.shared.console", Console(width=80))
    shown = runner.invoke(app, ["plan", "--guide"])
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    for expected in ("3584 -> 2048", "512 -> 256", "167.8M", "never existed", "327,680 bytes"):
        assert expected in text
    assert json.loads(runner.invoke(app, ["plan", "--guide", "--json"]).stdout) == plan.model_dump()


@pytest.mark.parametrize("arguments", [[], ["recipe.yaml", "--guide"], ["--guide", "--set", "seed=1"]])
def test_a_recipe_or_the_guide(arguments: list[str]) -> None:
    result = runner.invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "RECIPE" in result.output
