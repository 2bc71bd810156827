"""What a comparison would run, and the command of each run."""

import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from kvgraft.compare.matrix import plan_matrix
from kvgraft.errors import RecipeError
from kvgraft.recipe import Recipe, load_recipe

RECIPE = """
name: made
teachers: [{name: big, model: some/big}]
student: {new: {}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "made.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_every_arm_with_every_seed_in_a_folder_of_its_own(recipe: Path) -> None:
    matrix = plan_matrix(recipe, arms=["kv", "linear"], seeds=[3, 4])
    assert [(cell.arm.name, cell.seed) for cell in matrix.cells] == [
        (arm, seed) for seed in (3, 4) for arm in ("logits", "baseline", "mismatched", "kv", "linear")
    ]
    assert len({cell.folder for cell in matrix.cells}) == 10
    assert matrix.cells[-1].folder == Path("runs/made-comparison/linear/seed-4")
    assert {cell.recipe.store.path for cell in matrix.cells} == {Path("stores")}
    (note,) = matrix.notes
    assert note.startswith("logits: student and teachers have different vocabularies")


def test_arms_that_learn_from_stored_logits_run_first(recipe: Path) -> None:
    arms = ["baseline", "kv", "logits", "kv_logits"]
    matrix = plan_matrix(recipe, arms=arms, seeds=[3, 4], controls=False)
    assert [(cell.arm.name, cell.seed) for cell in matrix.cells] == [
        (arm, seed) for seed in (3, 4) for arm in ("logits", "kv_logits", "baseline", "kv")
    ]
    assert [arm.name for arm in matrix.arms] == arms
    online = plan_matrix(recipe, ["logit_loss.source=online"], arms=arms, seeds=[3], controls=False)
    assert [cell.arm.name for cell in online.cells] == arms


def test_a_command_says_the_recipe_of_its_cell(recipe: Path) -> None:
    matrix = plan_matrix(recipe, ["training.steps=7"], arms=["own:values_only 'alignment.layers=[[0, 1]]'"], seeds=[3])
    for cell in matrix.cells:
        words = shlex.split(cell.command)
        assert words[:3] == ["kvgraft", "train", str(recipe)]
        assert words[-3:] == ["--output", str(cell.folder), "--resume"]
        changes = [value for option, value in pairwise(words) if option == "--set"]
        assert load_recipe(recipe, changes) == cell.recipe
    own = matrix.cells[-1].recipe
    assert (own.training.steps, own.kv_loss.keys_weight, own.alignment.layers) == (7, 0, [(0, 1)])
    assert (own.seed, own.arms) == (3, ["kv"])


def test_the_command_of_the_whole(recipe: Path, tmp_path: Path) -> None:
    matrix = plan_matrix(
        recipe,
        ["training.steps=7"],
        arms=["kv", "linear"],
        seeds=[1],
        folder=Path("out"),
        against="linear",
        controls=False,
    )
    assert matrix.command == (
        f"kvgraft compare {recipe} --set training.steps=7 --arms kv linear --seeds 1 --output out --against linear "
        "--no-controls"
    )


def test_the_recipes_own_arms_by_default(recipe: Path) -> None:
    assert [arm.name for arm in plan_matrix(recipe).arms] == ["mismatched", "logits", "baseline", "kv"]


def test_what_is_the_same_under_this_recipe_runs_once(recipe: Path) -> None:
    matrix = plan_matrix(recipe, arms=["elastic_1.0", "kv", "per_layer"])
    assert [arm.name for arm in matrix.arms] == ["baseline", "mismatched", "logits", "elastic_1.0"]
    assert matrix.notes[0] == "kv is left out: under this recipe it is what elastic_1.0 is"
    kept = plan_matrix(recipe, arms=["elastic_1.0", "kv"], against="kv")
    assert [arm.name for arm in kept.arms] == ["baseline", "mismatched", "logits", "kv"]


def test_the_control_by_logits_takes_the_models_vocabularies(
    tiny_fields: dict, tiny_teacher: Path, tiny_student: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"

    def changes(student: Path, arms: list[str], **parts: object) -> tuple[str, ...]:
        path.write_text(Recipe.model_validate({**tiny_fields, "student": {"model": str(student)}, **parts}).to_yaml())
        (logits,) = (arm for arm in plan_matrix(path, arms=arms).arms if arm.name == "logits")
        return logits.overrides

    chunks = "logit_loss.form=chunk_likelihood"
    assert changes(tiny_teacher, ["kv"]) == ()
    assert changes(tiny_student, ["kv"])[0] == chunks
    assert changes(tiny_student, ["kv"], kv_loss={"gradient_share": 0.8})[-1] == "kv_loss.gradient_share=null"
    assert changes(tiny_student, ["kv"], logit_loss={"form": "sorted_probability"}) == ()
    # One that is asked for is as the recipe says.
    assert changes(tiny_student, ["kv", "logits"]) == ()


def test_what_the_baseline_could_change_too_is_said(recipe: Path) -> None:
    arms = ["fast:training.learning_rate=1e-3", "sharp:training.projector_learning_rate=1e-2"]
    _, note = plan_matrix(recipe, arms=arms).notes
    assert note.startswith("fast changes training.learning_rate, which cross-entropy alone could change too")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": [0, 0]}, r"a repeated seed is no new evidence; got \[0, 0\]"),
        ({"seeds": []}, "at least one seed"),
        ({"arms": ["kv"], "controls": False}, "the arms kv are to be compared with baseline, which is not among"),
        ({"against": "linear"}, "compared with linear, which is not among"),
        ({"arms": ["more:data.train_samples=9"]}, r"arm more changes data\.train_samples: arms of different data"),
        (
            {"arms": ["cut:student.vocab_size=999"]},
            r"changes student\.vocab_size: arms of different data or tokenizers",
        ),
        ({"arms": ["bad:projector.mlp_ratio=-1"]}, r"made\.yaml cannot be run as written"),
    ],
)
def test_what_cannot_be_compared_is_refused(recipe: Path, arguments: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_matrix(recipe, **arguments)
