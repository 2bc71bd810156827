from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from kvgraft.cli import app
from kvgraft.errors import RecipeError
from kvgraft.graft.seeds import graft_over_seeds
from kvgraft.recipe import Recipe
from kvgraft.report.graft import CONTROL, GraftReport
from kvgraft.report.graft_seeds import GraftSeeds


def report(seed: int, trained: list[float], control: list[float]) -> GraftReport:
    sums = {
        "none": [30.0, 20.0],
        "own": [12.0, 8.0],
        "another question, own": [24.0, 16.0],
        "trained": trained,
        "trained, another question": [20.0, 20.0],
        CONTROL: control,
    }
    return GraftReport(
        name="graft",
        seed=seed,
        teacher="teacher",
        student="student",
        steps=0,
        continuation_steps=4,
        questions=2,
        question_tokens=[5, 7],
        nats={cache: sum(of_cache) / 10 for cache, of_cache in sums.items()},
        sums=sums,
        tokens=[6, 4],
        parameters={"trained": 3, CONTROL: 3},
        bytes_per_token={},
        seconds={},
    )


def test_means_spread_and_differences_over_seeds() -> None:
    seeds = GraftSeeds(reports=[report(0, [9.0, 6.0], [10.0, 8.0]), report(1, [9.0, 8.0], [11.0, 8.0])])
    assert seeds.nats("trained").mean == pytest.approx(1.6)
    assert seeds.nats("own").deviation == 0
    assert seeds.retention("trained").by_seed == pytest.approx({0: 3.5 / 3, 1: 3.3 / 3})
    transfer = seeds.transfer("trained")
    assert transfer is not None
    assert transfer.mean == pytest.approx(2.4)
    assert seeds.transfer("none") is None
    assert seeds.over_seeds("trained", CONTROL).by_seed == pytest.approx({0: -0.3, 1: -0.2})
    # Both seeds on the first question: (-1 - 2) / 2 over 6 tokens, on the second (-2 + 0) / 2 over 4.
    low, high = seeds.over_questions("trained", CONTROL)
    assert (low, high) == pytest.approx((-0.25, -0.25))
    assert seeds.caches[0] == "trained"


def test_reports_that_do_not_belong_together_are_refused() -> None:
    first = report(0, [9.0, 6.0], [10.0, 8.0])
    other = report(1, [9.0, 6.0], [10.0, 8.0])
    with pytest.raises(ValidationError, match="seed 1 was measured on other questions than seed 0"):
        GraftSeeds(reports=[first, other.model_copy(update={"question_tokens": [5, 8]})])
    without = {cache: nats for cache, nats in other.nats.items() if cache != CONTROL}
    with pytest.raises(ValidationError, match=f"do not share the caches {CONTROL}"):
        GraftSeeds(reports=[first, other.model_copy(update={"nats": without})])


def test_every_seed_is_a_run_and_finished_ones_are_kept(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = fit_recipe(
        data={"max_length": 250, "train_samples": 20, "held_out_samples": 5},
        fit={"continuation": {"steps": 2, "texts_per_step": 2}},
        graft={"own_first_tokens": 2, "trained": ["gated", "own"]},
    )
    seeds = graft_over_seeds(recipe, [3, 5], tmp_path)
    assert [found.seed for found in seeds.reports] == [3, 5]
    assert seeds.nats("own").deviation == pytest.approx(0)
    gated = seeds.nats("mixed into the student's own by gates").by_seed
    assert np.diff(list(gated.values())) != 0
    page = (tmp_path / "graft.md").read_text()
    assert all(f"| {cache} |" in page for cache in seeds.caches)
    assert all((tmp_path / part / "graft.png").is_file() for part in (".", "seed-3", "seed-5"))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed-*/graft.json")}
    assert graft_over_seeds(recipe, [3, 5], tmp_path, resume=True) == seeds
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed-*/graft.json")}
    with pytest.raises(RecipeError, match=r"two or more different numbers, such as 0 1 2; got \[1\]"):
        graft_over_seeds(recipe, [1], tmp_path / "other")


def test_seeds_are_given_as_numbers(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(fit_recipe().to_yaml())
    refused = CliRunner().invoke(app, ["graft", str(tmp_path / "recipe.yaml"), "--seeds", "0", "x"])
    assert refused.exit_code == 2
    assert "must be whole numbers" in refused.output
