"""LoRA students: which modules are adapted, and that capture and saving see through peft's wrapping."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kvgraft.distill.arms import build_arm
from kvgraft.errors import ModelError
from kvgraft.evaluate.run import EvaluationSettings, evaluate
from kvgraft.models.capture import capture
from kvgraft.models.loading import load_model, load_tokenizer, load_weights
from kvgraft.models.lora import add_lora, base_of, save_student
from kvgraft.plan import make_plan
from kvgraft.prepare import make_student, prepare
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import Recipe, StudentRecipe
from kvgraft.run import arm_data, run
from tests.models.test_capture import VOCABULARY, model_of

TOKENS = torch.arange(12).reshape(1, 12) * 7 % VOCABULARY


def adapted(family: str, targets: list[str] | str = "all-linear"):
    return add_lora(model_of(family), rank=4, alpha=8, dropout=0.0, target_modules=targets, seed=0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "gpt2"])
def test_kv_of_an_adapted_model_has_gradients_to_its_adapters_alone(family: str) -> None:
    plain = capture(model_of(family), TOKENS)
    model = adapted(family)
    kv = capture(model, TOKENS, gradients=True)
    assert torch.equal(kv.keys, plain.keys)
    (kv.keys.square().sum() + kv.values.square().sum()).backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached
    assert all("lora_" in name for name in reached)


def test_a_target_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ModelError, match=r"\['query'\].*no such modules; it has .*k_proj.*q_proj"):
        adapted("llama", ["q_proj", "query"])
    # A module that holds others cannot be adapted itself.
    with pytest.raises(ModelError, match=r"\['self_attn'\]"):
        adapted("llama", ["self_attn"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.filterwarnings("error")
def test_nothing_is_warned_of_that_nobody_can_change(family: str) -> None:
    adapted(family)


def test_same_seed_gives_the_same_adapters_and_leaves_other_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = model_of("llama")
    torch.manual_seed(5)
    first = add_lora(model, 4, 8, 0.0, ["q_proj"], seed=1).state_dict()
    assert torch.equal(torch.rand(1), expected)
    second = add_lora(model_of("llama"), 4, 8, 0.0, ["q_proj"], seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_adapters_of_other_settings_are_refused(tmp_path: Path) -> None:
    save_student(adapted("llama", ["q_proj"]), tmp_path)
    with pytest.raises(ModelError, match=r"are not those of student\.lora: missing .*v_proj"):
        load_weights(adapted("llama", ["q_proj", "v_proj"]), tmp_path)


@pytest.fixture
def lora_recipe(tiny_recipe: Callable[..., Recipe], tiny_student: Path) -> Recipe:
    lora = {"rank": 2, "target_modules": ["k_proj", "v_proj", "o_proj"]}
    student = StudentRecipe.model_validate({"model": str(tiny_student), "lora": lora})
    return tiny_recipe(arms=["kv"]).model_copy(update={"student": student})


def test_a_run_trains_adapters_and_projector_and_nothing_else(
    lora_recipe: Recipe, tiny_student: Path, tmp_path: Path
) -> None:
    trained = run(lora_recipe, tmp_path / "run").arms[0]
    assert trained.last["loss"] < trained.first["loss"]
    folder = tmp_path / "run" / "kv" / "student"
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == 3 * 3 * 2
    assert all("lora_" in name for name in weights)
    assert all(bool(tensor.abs().sum() > 0) for tensor in weights.values())

    measured = evaluate(tmp_path / "run", EvaluationSettings(only=["quality"])).arms[0]
    assert measured.quality["loss"] == pytest.approx(trained.last["loss"], rel=1e-5)
    # transformers finds the adapters and what they belong to by itself.
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(8)[None]
    plain = load_model(str(tiny_student))
    assert not torch.allclose(loaded(tokens).logits, plain(tokens).logits, atol=1e-3)
    own = plain.state_dict()
    base = {name.replace(".base_layer", ""): tensor for name, tensor in loaded.state_dict().items()}
    assert all(torch.equal(own[name], base[name]) for name in own)


def test_adapters_are_put_on_the_revision_that_they_were_trained_on(
    lora_recipe: Recipe, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = lora_recipe.student.model_copy(update={"revision": "v2"})
    model = make_student(lora_recipe.model_copy(update={"student": student}), load_tokenizer(str(tiny_student)))
    save_student(model, tmp_path)
    assert base_of(tmp_path)[1] == "v2"
    asked: list[str | None] = []

    def load(*_: object, revision: str | None, **__: object) -> torch.nn.Module:
        asked.append(revision)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    load_model(str(tmp_path))
    load_model(str(tiny_student))
    assert asked == ["v2", None]


def test_gradient_reaches_only_adapters_and_projector(lora_recipe: Recipe) -> None:
    data = arm_data(prepare(lora_recipe))
    model = build_arm(lora_recipe, "kv", data)
    assert isinstance(model.projector, KVDimensionProjector)
    train = data.train_set("kv", 0)
    model(**data.collator([train[0], train[1]]))["loss"].backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name in reached if name.startswith("projector.")}
    assert {name for name in reached if name.startswith("student.")} == {
        name for name, _ in model.student.named_parameters(prefix="student") if "lora_" in name
    }


def test_adapters_behind_the_compared_layers_get_no_share_from_kv(lora_recipe: Recipe, tmp_path: Path) -> None:
    # What layer 0 stores for a token is there before any query is asked.
    fields = lora_recipe.model_dump()
    fields["student"]["lora"]["target_modules"] = ["q_proj"]
    fields["alignment"]["layers"] = [(0, 0)]
    assert run(Recipe.model_validate(fields), tmp_path / "run").arms[0].gradient_shares == {"ce": 1.0, "kv": 0.0}


def test_plan_counts_adapters_and_names_a_wrong_target(lora_recipe: Recipe) -> None:
    full = lora_recipe.model_copy(update={"student": lora_recipe.student.model_copy(update={"lora": None})})
    assert make_plan(lora_recipe).problems == []
    assert make_plan(lora_recipe).training_memory_bytes < make_plan(full).training_memory_bytes
    lora = lora_recipe.student.lora.model_copy(update={"target_modules": ["wq"]})
    wrong = lora_recipe.model_copy(update={"student": lora_recipe.student.model_copy(update={"lora": lora})})
    assert "['wq']" in make_plan(wrong).problems[0]


def test_a_new_student_takes_no_adapters(tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match="adapts a model that exists"):
        tiny_recipe(student={"lora": {"rank": 2}})
