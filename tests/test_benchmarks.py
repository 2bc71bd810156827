"""Benchmarks that put the library's parts together anew still do the same work both ways."""

import re
from collections.abc import Callable
from pathlib import Path

import yaml

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
