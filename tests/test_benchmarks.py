"""Benchmarks that put the library's parts together anew still do the same work both ways."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
import yaml
from torch.utils.flop_counter import FlopCounterMode

from kvgraft.errors import RecipeError
from kvgraft.prepare import prepare
from kvgraft.recipe import Recipe
from kvgraft.run import arm_data
from tests.benchmark_scripts import load_benchmark


def test_a_whole_run_ends_at_one_loss_with_and_without_a_store(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    whole_run = load_benchmark(Path("benchmarks/whole_run.py"))
    recipe = tiny_recipe(arms=["kv"], store={"dtype": "float32"}, training={"batch_size": 2})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    table = whole_run.measure(tmp_path / "recipe.yaml", texts=4, epochs=2)["table"]
    online, stored = re.findall(r"\| ([0-9.]+) \|$", table, re.MULTILINE)
    assert online == stored
    assert float(stored) > 0


def test_variants_of_other_settings_are_not_taken_for_those_asked_for(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = load_benchmark(Path("benchmarks/variants.py"))
    (tmp_path / "recipe.yaml").write_text(tiny_recipe(training={"steps": 2}).to_yaml(), encoding="utf-8")
    asked = {"output": tmp_path / "runs", "only": ["cross-entropy alone", "values alone"]}
    tables = []
    for _ in range(2):
        variants.main(tmp_path / "recipe.yaml", **asked)
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert re.search(r"\| values alone \| [0-9.]+ \| [+-][0-9.]+ \| \d+% \|", tables[0])
    with pytest.raises(RecipeError, match="learning_rate"):
        variants.main(tmp_path / "recipe.yaml", **asked, overrides=["training.learning_rate=1e-3"])


def test_aims_are_set_beside_what_was_found() -> None:
    aims = load_benchmark(Path("benchmarks/aims.py"))
    header = "| model | trunk, seconds | all layers over trunk | lower half over trunk | plain way over all layers |"
    capture = f"4 texts\n\n{header}\n| --- | ---: |\n| SmolLM2-135M.gguf | 1,000.5 | 1.03 | 0.551 | 1,400.0 |\n"
    batches = "| batching | real tokens | over shuffled |\n| --- | ---: |\n| buckets | 98.7% | 1.58 |"
    table = aims.aims_table({"capture": capture, "batches": batches, "a part without aims": "text"})
    assert "| capture | SmolLM2-135M: all layers over trunk | 1.03 | at most 1.03 | yes |" in table
    assert "| capture | SmolLM2-135M: lower half over trunk | 0.551 | at most 0.55 | **no** |" in table
    assert "| capture | SmolLM2-135M: plain way over all layers | 1,400.0 | at least 1.4 | yes |" in table
    assert "| capture | gemma-3-270m: plain way over all layers | not measured | at least 2.5 | **no** |" in table
    assert "| batches | buckets: real tokens | 98.7% | at least 97% | yes |" in table
    assert "caching" not in table
    assert aims.aims_table({"growth": "text"}) == ""


@pytest.mark.parametrize("layers", [1, 3])
def test_matrix_products_are_those_of_the_work_forward_and_backward(layers: int) -> None:
    products = load_benchmark(Path("benchmarks/products.py"))
    x, bias, weight = (torch.randn(layers, *shape, requires_grad=True) for shape in ((5, 4), (1, 6), (4, 6)))

    def work() -> None:
        mapped = torch.baddbmm(bias, x, weight) if layers > 1 else torch.addmm(bias[0], x[0], weight[0])
        mapped.relu().sum().backward()

    found = products.MatrixProducts(work)
    assert found.operations == 3 * 2 * layers * 5 * 4 * 6
    assert products.MatrixProducts(found).operations == found.operations


def test_steps_that_are_timed_are_those_of_the_arms_they_are_named_after(tiny_recipe: Callable[..., Recipe]) -> None:
    training_step = load_benchmark(Path("benchmarks/training_step.py"))
    recipe = tiny_recipe(arms=["baseline", "logits", "kv", "kv_logits"], logit_loss={"form": "sorted_probability"})
    data = arm_data(prepare(recipe))
    names = ["baseline", "logits", "kv", "kv_logits", training_step.PLAIN, training_step.COMPILED]
    models = [training_step.Arm(recipe, data, name).model for name in names]
    assert [model.projector is not None for model in models] == [False, False, True, True, True, True]
    assert [model.logits is not None for model in models] == [False, True, False, True, False, False]


@pytest.mark.parametrize("skip", [False, True])
def test_an_adapters_products_are_those_of_its_linear_map_too(skip: bool) -> None:
    fused_loss = load_benchmark(Path("benchmarks/fused_loss.py"))
    sizes = fused_loss.Sizes(layers=1, tokens=16, student_width=64, teacher_width=128, ratio=0.5, dropout=0.0)
    with FlopCounterMode(display=False) as counter:
        fused_loss.product_seconds(sizes, skip=skip)
    # One of keys and values, in five rounds.
    assert counter.get_total_flops() == 5 * (sizes.product_operations / 2 + skip * 3 * 2 * 16 * 64 * 128)


def test_what_a_step_holds_is_not_counted_with_the_modules_of_another_way() -> None:
    growth = load_benchmark(Path("benchmarks/growth.py"))
    step = growth.TeachersStep(growth.Work(growth.MIDDLE.sizes)).steps[0]
    assert not list(step.modules.parameters())


def test_rates_of_a_float16_store_are_not_taken_for_those_of_fewer_bits(capsys: pytest.CaptureFixture[str]) -> None:
    at_scale = load_benchmark(Path("benchmarks/at_scale.py"))
    with pytest.raises(typer.BadParameter, match="write-megabytes"):
        at_scale.main(dtype="int8")
    with pytest.raises(typer.BadParameter, match="Llama-3-70B"):
        at_scale.main(teacher="Llama")
    at_scale.main(dtype="int8", write_megabytes=100, read_megabytes=200)
    assert "| a process writes | 100 MB/s | given |" in capsys.readouterr().out


def test_a_store_of_few_bits_is_measured_without_naming_float16() -> None:
    store_speed = load_benchmark(Path("benchmarks/store_speed.py"))
    found = store_speed.measure(texts=1, repeats=1, dtypes=["int8"])
    assert found["write int8"] > 0
    assert found["a quarter of the layers, warm, over all"] > 0


def test_what_becomes_of_an_architecture_is_told() -> None:
    architectures = load_benchmark(Path("benchmarks/architectures.py"))
    assert architectures.outcome_of("llama") == architectures.Outcome("captured", cut="runs", graft="exact")
    assert architectures.outcome_of("minimax").kv == "captured in the layers that hold KV alike"
    assert architectures.outcome_of("minimax").graft == "refused: its cache holds more than keys and values"
    assert architectures.outcome_of("mamba") == architectures.Outcome("refused: no attention")
    model = architectures.small_model("llama")
    input_ids, mask, cache = architectures.own_cache(model)
    cache[1].keys[0, 0, 0, 0] += 1
    assert architectures.difference_from_own(model, input_ids, mask, cache) > 0.5
