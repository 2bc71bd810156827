"""Recipes: what is wrong is named by field and line."""

from pathlib import Path

import pytest

from kvgraft.errors import RecipeError
from kvgraft.recipe import load_recipe

RECIPE = """\
name: small
teachers:
  - name: big
    model: some/model
student:
  new:
    hidden_size: 16
training:
  steps: 5
"""


def recipe_file(tmp_path: Path, text: str = RECIPE) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_measured_ones(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path))
    assert recipe.kv_loss.objective == "student_to_teacher"
    assert recipe.kv_loss.weight == 10
    assert recipe.projector.sharing == "per_layer"
    assert recipe.projector.skip
    assert recipe.training.learning_rate == 5e-5
    assert recipe.training.projector_learning_rate == 1e-3
    assert recipe.arms == ["baseline", "kv"]


def test_written_out_it_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path))
    assert load_recipe(recipe_file(tmp_path, recipe.to_yaml())) == recipe


def test_overrides(tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file(tmp_path),
        ["training.steps=7", "teachers.0.model=other", "alignment.layers=[[0, 3]]", "kv_loss.weight=0.5"],
    )
    assert recipe.training.steps == 7
    assert recipe.teachers[0].model == "other"
    assert recipe.alignment.layers == [(0, 3)]
    assert recipe.kv_loss.weight == 0.5


def test_a_field_written_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"`training` is written twice, on lines 8 and 10; keep one"):
        load_recipe(recipe_file(tmp_path, RECIPE + "training:\n  batch_size: 2\n"))
    with pytest.raises(RecipeError, match=r"`steps` is written twice, on lines 9 and 10; keep one"):
        load_recipe(recipe_file(tmp_path, RECIPE + "  steps: 7\n"))


def test_a_recipe_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-16")
    with pytest.raises(RecipeError, match=r"recipe\.yaml is no text in UTF-8 .*; save it in UTF-8"):
        load_recipe(path)


def test_an_override_whose_value_is_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--set training\.steps=\[1: the value \[1 is not valid YAML"):
        load_recipe(recipe_file(tmp_path), ["training.steps=[1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps: 5", "stepz: 5"), r"training\.stepz \(line 9\): .*not permitted; known here: steps, batch_size"),
        (("steps: 5", "steps: many"), r"training\.steps \(line 9\): .*integer.*\(given 'many'\)"),
        (("steps: 5", "steps: 0"), r"training\.steps \(line 9\): .*greater than 0"),
        (("model: some/model", "modell: some/model"), r"teachers\.0\.model.*\(line 3\): Field required"),
        (("  new:\n    hidden_size: 16", "  vocab_size: 999"), r"student.*either `model`.*or `new`"),
        (("  new:", "  vocab_size: 256\n  new:"), r"student\.vocab_size .*greater than or equal to 257"),
        (("name: small\n", ""), r"name.*Field required"),
        (("name: small", "name: ../escape"), r"name \(line 1\)"),
        (("steps: 5", "steps: 5\n  batch_size: 6\n  gradient_accumulation_steps: 4"), "6 is not a multiple of .* 4"),
        (("steps: 5", "steps: 5\n  tokens_per_batch: 99"), "tokens_per_batch goes with batching: buckets or packed"),
        (("steps: 5", "steps: 5\ndata:\n  streaming: true"), "streaming needs train_samples"),
        (("steps: 5", "steps: 5\narms: [kv, kv]"), "each once"),
        (("steps: 5", "steps: 5\nkv_loss:\n  layer_weights: [0, 0]"), "compare nothing; give a layer a weight above 0"),
        (("steps: 5", "steps: 5\nkv_loss:\n  weight: .inf"), r"kv_loss\.weight \(line 11\).*finite"),
        (("  - name: big", "  - name: big\n    model: a\n  - name: big"), r"two teachers are named \['big'\]"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = RECIPE.replace(*change)
    assert text != RECIPE
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file(tmp_path, text))


def test_missing_file_and_bad_yaml(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe at .*absent\.yaml"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(recipe_file(tmp_path, "name: [unclosed"))
    with pytest.raises(RecipeError, match="got list"):
        load_recipe(recipe_file(tmp_path, "- one\n"))


@pytest.mark.parametrize("override", ["training.steps", "=3", "teachers.9.model=x", "name.deeper=1"])
def test_overrides_that_lead_nowhere(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError, match="--set"):
        load_recipe(recipe_file(tmp_path), [override])


def test_fingerprint_follows_what_is_computed(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    plain = load_recipe(path).fingerprint()
    assert load_recipe(path, ["store.path=elsewhere", "name=other", "arms=[kv]"]).fingerprint() == plain
    assert load_recipe(path, ["seed=1"]).fingerprint() != plain
    assert load_recipe(path, ["store.dtype=compact"]).fingerprint() != plain


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")))
def test_recipes_of_the_repository_are_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_a_preset_stands_for_its_settings(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)

    def settings(projector: str, *overrides: str) -> tuple[object, float, str]:
        found = load_recipe(path, [f"projector={projector}", *overrides]).projector
        return found.mlp_ratio, found.dropout, found.init_method

    assert settings("{preset: enhanced}") == (2.0, 0.15, "xavier")
    assert settings("{preset: enhanced, dropout: 0.0}") == (2.0, 0.0, "xavier")
    written = "{mlp_ratio: 4.0, init_method: least_squares}"
    assert settings(written, "projector.preset=fast") == (0.5, 0.1, "xavier")
    assert settings(written, "projector.preset=fast", "projector.mlp_ratio=3") == (3.0, 0.1, "xavier")
    with pytest.raises(RecipeError, match="preset is one of fast, standard, enhanced; got 'quick'"):
        settings("{preset: quick}")


def test_a_list_is_changed_by_number(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("teachers: [{name: a, model: b}]\n")
    with pytest.raises(RecipeError, match=r"teachers is a list of 1; name one by number, as teachers\.0\.name"):
        load_recipe(tmp_path / "recipe.yaml", ["teachers.name=x"])
