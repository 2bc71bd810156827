"""Students cut from a model: the same layers, also after saving, matched with where they came from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from kvgraft.cli import app
from kvgraft.distill.arms import build_arm
from kvgraft.errors import AlignmentError, KVGraftError, ModelError
from kvgraft.evaluate.run import EvaluationSettings, evaluate
from kvgraft.models.capture import capture
from kvgraft.models.cut import chosen_layers, cut_config, cut_model, origin_layers
from kvgraft.models.geometry import kv_layers
from kvgraft.models.loading import load_config, load_model
from kvgraft.models.rotary import rotations_at
from kvgraft.plan import make_plan
from kvgraft.prepare import layer_map_of, make_student, prepare
from kvgraft.recipe import Recipe, StudentRecipe
from kvgraft.run import arm_data, run
from tests.models.test_capture import CONFIGS, VOCABULARY, mixed, model_of, tiny

TOKENS = torch.arange(20).reshape(2, 10) * 7 % VOCABULARY


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(TOKENS).logits


@pytest.mark.parametrize("family", CONFIGS)
def test_all_layers_is_the_model_itself_and_some_survive_saving(family: str, tmp_path: Path) -> None:
    whole = model_of(family)
    assert torch.equal(logits_of(cut_model(model_of(family), [0, 1, 2])), logits_of(whole))
    student = cut_model(model_of(family), [0, 2])
    # Up to the first cut the two are one model; the kept layers' weights are the whole one's.
    ours, theirs = capture(student, TOKENS, layers=[0]), capture(whole, TOKENS, layers=[0])
    assert torch.equal(ours.keys, theirs.keys)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(student))
    assert origin_layers(loaded.config, whole.config) == [0, 2]
    assert torch.equal(loaded.generate(TOKENS, max_new_tokens=2)[:, :10], TOKENS)


def test_layers_without_kv_are_cut_with_the_others(tmp_path: Path) -> None:
    whole = mixed("qwen3_5_text")
    assert torch.equal(logits_of(cut_model(mixed("qwen3_5_text"), [0, 1, 2])), logits_of(whole))
    student = cut_model(mixed("qwen3_5_text"), [1, 2])
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(student))
    # The second of its layers, and the only one of the whole model's, that holds KV.
    assert kv_layers(loaded.config) == (1,)
    assert origin_layers(loaded.config, whole.config) == [0]


def test_a_cut_without_kv_is_refused() -> None:
    with pytest.raises(ModelError, match=r"layers \[0, 1\] hold no KV, which is in layers \[2\]; keep one of those"):
        cut_model(mixed("qwen3_5_text"), [0, 1])


def test_the_first_layers_without_experts_are_counted_anew() -> None:
    experts = {"first_k_dense_replace": 2, "num_hidden_layers": 4, "n_routed_experts": 2, "num_experts_per_tok": 1}
    fields = CONFIGS["deepseek_v3"] | experts | {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 8}
    student = cut_model(tiny("deepseek_v3", **fields), [1, 2, 3])
    assert student.config.first_k_dense_replace == 1


def test_layers_that_have_settings_by_their_place_are_refused() -> None:
    with pytest.raises(ModelError, match="a gemma4_text with is_heterogeneous cannot be cut"):
        cut_model(mixed("gemma4_text"), [0, 1])


def test_a_cut_model_is_its_kept_layers_one_after_another() -> None:
    whole, student = model_of("llama"), cut_model(model_of("llama"), [0, 2])
    del whole.model.layers[1]
    whole.config.num_hidden_layers = 2
    whole.model.layers[1].self_attn.layer_idx = 1
    assert torch.equal(logits_of(student), logits_of(whole))


@pytest.mark.parametrize("family", ["gemma3_text", "smollm3"])
def test_what_was_learned_of_the_whole_models_layers_is_forgotten(family: str) -> None:
    # Layers turn by two thetas, or the last not at all.
    used, positions = model_of(family), torch.tensor([[0, 7]])
    rotations_at(used, positions)
    used, fresh = cut_model(used, [1, 2]), cut_model(model_of(family), [1, 2])
    assert torch.equal(capture(used, TOKENS).keys, capture(fresh, TOKENS).keys)
    for ours, theirs in zip(rotations_at(used, positions), rotations_at(fresh, positions), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours.cos, theirs.cos)


def test_settings_of_each_layer_are_cut_too() -> None:
    config = Gemma3TextConfig(num_hidden_layers=12)
    assert config.layer_types[5] == config.layer_types[11] == "full_attention"
    made = cut_config(config, [0, 5, 11])
    assert made.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert len(config.layer_types) == 12
    # Token ids are no setting of a layer, however many there are.
    assert cut_config(AutoConfig.for_model("llama", num_hidden_layers=2, eos_token_id=[1, 2]), [1]).eos_token_id == [
        1,
        2,
    ]


def test_layers_that_depend_on_their_place_are_refused() -> None:
    config = GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=50, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx cannot be cut"):
        cut_model(GPT2LMHeadModel(config), [0, 2])


def test_which_layers() -> None:
    assert chosen_layers(30, every=3) == list(range(0, 30, 3))
    assert chosen_layers(30, 4) == [0, 10, 19, 29]
    assert chosen_layers(30, [1, 2, 29]) == [1, 2, 29]
    for wrong in ({"layers": [0, 30]}, {"layers": [2, 1]}, {"layers": [1, 1]}, {"layers": []}, {"layers": 31}):
        with pytest.raises(ModelError, match=r"of 30 layers: give layers 0\.\.29 in order, each once"):
            chosen_layers(30, **wrong)
    with pytest.raises(ModelError, match="either"):
        chosen_layers(30)
    with pytest.raises(ModelError, match="either"):
        chosen_layers(30, 3, every=2)


@pytest.fixture
def cut_recipe(tiny_recipe: Callable[..., Recipe], tiny_teacher: Path) -> Callable[..., Recipe]:
    def make(layers: list[int], **changes: object) -> Recipe:
        recipe = tiny_recipe(**changes)
        student = StudentRecipe(cut_from=str(tiny_teacher), layers=layers)
        return recipe.model_copy(update={"student": student})

    return make


def test_command_writes_a_student_that_knows_its_origin(
    tiny_teacher: Path, cut_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    output = tmp_path / "student"
    result = CliRunner().invoke(app, ["cut", str(tiny_teacher), str(output), "--layers", "0,1,3"])
    assert result.exit_code == 0, result.output
    assert "3 of 4 layers" in result.output
    assert AutoTokenizer.from_pretrained(output)("Tom has").input_ids
    recipe = cut_recipe([0, 1, 3])
    assert layer_map_of(recipe, recipe.teachers[0], load_config(str(output)), load_config(str(tiny_teacher))) == [
        (0, 0),
        (1, 1),
        (2, 3),
    ]
    made = make_student(recipe, AutoTokenizer.from_pretrained(output))
    written = load_model(str(output))
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in written.state_dict().items())
    again = CliRunner().invoke(app, ["cut", str(tiny_teacher), str(output), "--every", "2"])
    assert isinstance(again.exception, KVGraftError)
    assert "exists" in str(again.exception)


def test_origin_is_the_default_and_must_be_known_when_asked_for(
    cut_recipe: Callable[..., Recipe], tiny_teacher: Path, tiny_student: Path
) -> None:
    teacher, other = load_config(str(tiny_teacher)), load_config(str(tiny_student))
    student = cut_config(teacher, [0, 1, 2])
    recipe = cut_recipe([0, 1, 2])
    named = recipe.teachers[0]
    ratio = cut_recipe([0, 1, 2], alignment={"layers": "ratio"})
    origin = cut_recipe([0, 1, 2], alignment={"layers": "origin"})
    assert (
        layer_map_of(recipe, named, student, teacher)
        == layer_map_of(origin, named, student, teacher)
        == [(0, 0), (1, 1), (2, 2)]
    )
    assert layer_map_of(ratio, named, student, teacher) == [(0, 0), (1, 2), (2, 3)]
    # A student of another teacher, or one that was not cut, is spread evenly.
    assert layer_map_of(recipe, named, other, teacher) == [(0, 0), (1, 2), (2, 3)]
    with pytest.raises(AlignmentError, match="needs a student cut from the teacher"):
        layer_map_of(origin, named, other, teacher)


def test_identity_adapters_compare_kv_directly_at_step_0(cut_recipe: Callable[..., Recipe]) -> None:
    for layers in ([0, 1, 2, 3], [0, 2]):
        # A student of all layers has its teacher's KV exactly.
        recipe = cut_recipe(layers, projector={"init_method": "identity"}, store={"dtype": "float32"})
        data = arm_data(prepare(recipe))
        model = build_arm(recipe, "kv", data).eval()
        train = data.train_set("kv", 0)
        batch = data.collator([train[0], train[1]])
        own = capture(model.student, batch["input_ids"], batch["attention_mask"], layers=model.student_layers)
        for given, projected in zip(
            own.flatten(), model.projector.project_student_kv("org/teacher-1.0", own), strict=True
        ):
            torch.testing.assert_close(projected, given, rtol=1e-4, atol=1e-5)
        loss = model(**batch)["kv_loss"].item()
        assert (loss < 1e-8) == (layers == [0, 1, 2, 3])


def test_identity_needs_equal_widths_and_a_linear_part_for_each_layer(tiny_recipe: Callable[..., Recipe]) -> None:
    # The tiny student's KV is 8 wide, its teacher's 16.
    problems = make_plan(tiny_recipe(projector={"init_method": "identity"})).problems
    assert "needs equal widths; this adapter goes from 8 to 16" in problems[0]
    with pytest.raises(ValueError, match="set sharing: per_layer or trunk"):
        tiny_recipe(projector={"init_method": "identity", "sharing": "shared"})


def test_least_squares_starts_nearer_to_the_teacher(tiny_recipe: Callable[..., Recipe]) -> None:
    losses = {}
    for init_method in ("xavier", "least_squares"):
        recipe = tiny_recipe(projector={"init_method": init_method}, store={"dtype": "float32"})
        data = arm_data(prepare(recipe))
        model = build_arm(recipe, "kv", data).eval()
        train = data.train_set("kv", 0)
        losses[init_method] = model(**data.collator([train[index] for index in range(8)]))["kv_loss"].item()
    assert losses["least_squares"] < 1 < losses["xavier"]


def test_a_run_of_a_cut_student(cut_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = cut_recipe([0, 3], arms=["kv"], projector={"init_method": "identity"})
    trained = run(recipe, tmp_path / "run")
    assert trained.teachers[0].layer_map == [(0, 0), (1, 3)]
    measured = evaluate(tmp_path / "run", EvaluationSettings(only=["quality"])).arms[0]
    for name, value in measured.quality.items():
        assert value == pytest.approx(trained.arms[0].last[name], rel=1e-5)


def test_recipe_wants_one_way_to_say_the_layers(tiny_teacher: Path) -> None:
    for fields in ({}, {"layers": 2, "every": 2}):
        with pytest.raises(ValueError, match="takes either `layers` or `every`"):
            StudentRecipe(cut_from=str(tiny_teacher), **fields)
    with pytest.raises(ValueError, match="they take `cut_from`"):
        StudentRecipe(model=str(tiny_teacher), every=2)
