import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvgraft.data.word_problems import generate
from kvgraft.errors import RecipeError
from kvgraft.fit import run as fit_run
from kvgraft.fit.data import prepare_fit
from kvgraft.fit.run import fit
from kvgraft.graft.run import graft
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import Recipe, load_recipe
from kvgraft.report.fit import FitReport, LayerFit

TEACHER = "org/teacher-1.0"


def test_leaves_a_projector_that_loads_and_a_report(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = fit_recipe(fit={"steps": 20, "evaluate_every": 10, "save_every": 10, "sources": 2})
    report = fit(recipe, tmp_path / "run")
    assert [layer.layer for layer in report.layers] == [0, 1, 2]
    assert all(len(set(layer.sources)) == 2 for layer in report.layers)
    assert all(0 < layer.attention_cosine <= 1 for layer in report.layers)
    projector = KVDimensionProjector.from_pretrained(tmp_path / "run" / "projector").eval()
    assert projector.count_parameters() == report.parameters
    pair = prepare_fit(recipe).held_out[0]
    keys, _ = projector.project_teacher_kv(TEACHER, pair.source)
    own = pair.target.flatten()[0]
    error = (keys - own)[:, :, pair.mask[0]].square().sum()
    assert error < (own - own.mean(2, keepdim=True))[:, :, pair.mask[0]].square().sum()
    for name in ("fit.json", "fit.md", "fit.png", "layers.png", "recipe.yaml", "metrics.jsonl", "least_squares"):
        assert (tmp_path / "run" / name).exists()
    assert not (tmp_path / "run" / "checkpoints").exists()
    aligned = (
        f"Student tokens aligned: {report.alignment_coverage:.2%}, {report.alignment_mean_span:.2f} teacher tokens"
    )
    assert aligned in (tmp_path / "run" / "fit.md").read_text()
    # The layer map that it suggests is one that a recipe takes.
    suggested = json.dumps([list(pair) for pair in report.suggested_layers])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml", [f"alignment.layers={suggested}"]).alignment.layers


def test_training_improves_on_least_squares_where_the_map_is_not_linear(
    fit_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    # Fitted and measured on the same text: what it could do, not what it generalises to.
    recipe = fit_recipe(
        data={"held_out_samples": 4},
        fit={"steps": 150, "tokens_per_step": 256, "learning_rate": 3e-3, "source_kinds": "both"},
    )
    report = fit(recipe, tmp_path / "run")
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line["loss"] for line in losses if "loss" in line and "eval_loss" not in line]
    assert trained[-1] < 0.95 * trained[0]
    assert report.steps == 150


def test_stopped_and_resumed_equals_one_go(
    fit_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = fit_recipe(fit={"steps": 8, "evaluate_every": 4, "save_every": 4}, projector={"dropout": 0.2})
    whole = fit(recipe, tmp_path / "whole")
    real = fit_run.measure_fits

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_run, "measure_fits", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "parts")
    last = tmp_path / "parts" / "checkpoints" / "checkpoint-8"
    assert last.is_dir()
    for file in sorted(last.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    last.rmdir()
    monkeypatch.setattr(fit_run, "measure_fits", real)
    with pytest.raises(RecipeError, match="--resume"):
        fit(recipe, tmp_path / "parts")
    parts = fit(recipe, tmp_path / "parts", resume=True)
    one, other = (
        KVDimensionProjector.from_pretrained(tmp_path / name / "projector").state_dict() for name in ("whole", "parts")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert parts.layers == whole.layers
    # A finished fit is read, not done again.
    assert fit(recipe, tmp_path / "parts", resume=True) == FitReport.read(tmp_path / "parts" / "fit.json")


def test_a_fit_does_not_go_on_with_other_text(
    fit_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe_of(seed: int) -> Recipe:
        lines = [json.dumps(problem) for problem in generate("train", 30, seed)]
        (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return fit_recipe(data={"train": str(tmp_path / "text.jsonl"), "train_samples": None, "held_out_samples": None})

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit_run, "measure_fits", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(recipe_of(1), tmp_path / "fit")
    with pytest.raises(RecipeError, match="training text, held-out text changed since"):
        fit(recipe_of(2), tmp_path / "fit", resume=True)
    fit(recipe_of(1), tmp_path / "fit", resume=True)
    # Finished, it is read again; a graft of other text would measure what was not fitted for it.
    with pytest.raises(RecipeError, match="training text, held-out text changed since"):
        graft(recipe_of(2), tmp_path / "fit", resume=True)


def test_products_in_bfloat16_change_little(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    reports = []
    for bf16 in (False, True):
        recipe = fit_recipe(fit={"steps": 20, "learning_rate": 3e-3, "bf16": bf16}, projector={"dropout": 0})
        reports.append(fit(recipe, tmp_path / str(bf16)))
    one, other = ([(layer.keys_r2, layer.values_r2) for layer in report.layers] for report in reports)
    assert one != other
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=2e-3, rtol=0)
    assert reports[0].layers[0].least_squares_keys_r2 == reports[1].layers[0].least_squares_keys_r2
    projector = KVDimensionProjector.from_pretrained(tmp_path / "True" / "projector")
    assert {parameter.dtype for parameter in projector.parameters()} == {torch.float32}


def test_settings_about_the_students_attention_need_the_student_as_target(
    fit_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = fit_recipe(fit={"direction": "student_to_teacher", "metric": "queries"})
    with pytest.raises(RecipeError, match="change places"):
        fit(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes", [{"objective": "attention"}, {"metric": "queries"}, {"direction": "student_to_teacher"}]
)
def test_every_setting_goes_the_whole_way(fit_recipe: Callable[..., Recipe], tmp_path: Path, changes: dict) -> None:
    report = fit(fit_recipe(fit={"steps": 2, "evaluate_every": 2, **changes}), tmp_path / "run")
    assert (report.layers[0].attention_cosine is None) == ("direction" in changes)
    assert all(layer.keys_r2 <= 1 for layer in report.layers)


def test_report_names_layers_whose_attention_got_worse() -> None:
    def layer(index: int, r2: float, cosine: float) -> LayerFit:
        return LayerFit(
            layer=index,
            sources=[0],
            keys_r2=r2,
            values_r2=r2,
            least_squares_keys_r2=0.5,
            least_squares_values_r2=0.5,
            attention_cosine=cosine,
            least_squares_attention_cosine=0.8,
        )

    report = FitReport(
        name="x",
        seed=0,
        teacher="t",
        student="s",
        direction="teacher_to_student",
        steps=1,
        tokens=1,
        held_out_texts=1,
        alignment_coverage=1.0,
        parameters=1,
        sharing="per_layer",
        layers=[layer(0, 0.6, 0.9), layer(1, 0.6, 0.7), layer(2, 0.4, 0.7)],
        suggested_layers=[],
        seconds={},
    )
    assert report.cosine_falls_where_r2_rises == [1]
