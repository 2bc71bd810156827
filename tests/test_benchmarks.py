"""Benchmarks that put the library's parts together anew still do the same work both ways."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from kvgraft.errors import RecipeError
from kvgraft.recipe import Recipe
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
