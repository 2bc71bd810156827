"""What a comparison says of curves whose truth is known."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from kvgraft.compare.arms import KNOWN_ARMS
from kvgraft.compare.comparison import ArmStatistics, Comparison, arm_statistics, build_comparison
from kvgraft.compare.matrix import Matrix, plan_matrix
from kvgraft.compare.verdicts import Verdict, judge, p_value_text
from kvgraft.errors import ResultError
from kvgraft.report.comparison import comparison_markdown, comparison_tables, write_comparison
from kvgraft.report.results import ArmResult, Evaluation, RunResult
from tests.compare.test_matrix import RECIPE

STEPS = (0, 50, 100, 150, 200)


def curve(final: float, arm: str = "kv", *, kv_loss: float | None = None, steps: Sequence[int] = STEPS) -> ArmResult:
    """A loss that falls from 7 to ``final`` in even steps, a second for ten steps."""
    losses = [7.0 + (final - 7.0) * step / steps[-1] for step in steps]
    extra = {} if kv_loss is None else {"kv_loss": kv_loss}
    return ArmResult(
        arm=arm,
        steps=steps[-1],
        seconds=20.0,
        evaluations=[
            Evaluation(step=step, metrics={"loss": loss, **extra}) for step, loss in zip(steps, losses, strict=True)
        ],
        gradient_shares={} if kv_loss is None else {"ce": 0.4, "kv": 0.6},
        seconds_at={step: step / 10 for step in steps},
    )


def verdicts(finals: Mapping[str, Sequence[float]], against: str = "baseline") -> dict[str, Verdict]:
    statistics = statistics_of(finals, against, steps=(0, 200))
    return {name: judge(KNOWN_ARMS[name], against, statistics) for name in finals}


def statistics_of(
    finals: Mapping[str, Sequence[float]], against: str = "baseline", steps: Sequence[int] = STEPS
) -> dict[str, ArmStatistics]:
    curves = {
        name: {seed: curve(final, steps=steps) for seed, final in enumerate(losses)} for name, losses in finals.items()
    }
    return arm_statistics([KNOWN_ARMS[name] for name in finals], against, curves)


BASELINE = [4.18, 4.23, 4.15]


def test_a_gain_that_only_the_right_text_gives() -> None:
    found = verdicts({"baseline": BASELINE, "kv": [3.77, 3.74, 3.73], "mismatched": [4.62, 4.67, 4.58]})
    assert found["baseline"].kind == "reference"
    assert found["kv"].kind == "better"
    assert found["kv"].words.startswith("better than baseline (p = 0.0")
    assert ", and than mismatched (p" in found["kv"].words
    assert found["mismatched"].kind == "worse"


def test_a_gain_that_another_text_gives_too_is_not_the_teachers_knowledge() -> None:
    found = verdicts({"baseline": BASELINE, "kv": [3.77, 3.83, 3.74], "mismatched": [3.78, 3.82, 3.75]})
    assert found["kv"].kind == "not from the teacher's knowledge"
    assert "mismatched does as well" in found["kv"].words
    better_still = verdicts({"baseline": BASELINE, "kv": [3.77, 3.83, 3.74], "mismatched": [3.17, 3.23, 3.13]})
    assert better_still["kv"].kind == "not from the teacher's knowledge"


def test_a_control_too_wild_to_tell_withholds_the_claim() -> None:
    found = verdicts({"baseline": BASELINE, "kv": [3.77, 3.83, 3.74], "mismatched": [3.9, 5.1, 4.0]})
    assert found["kv"].kind == "not told from its control"
    assert "more seeds may tell" in found["kv"].words


def test_without_a_control_the_verdict_says_so() -> None:
    found = verdicts({"baseline": BASELINE, "kv": [3.77, 3.83, 3.74]})
    assert found["kv"].kind == "better"
    assert "no control says whether the teacher's knowledge did it" in found["kv"].words


def test_no_difference_is_said_where_none_is_shown() -> None:
    found = verdicts({"baseline": BASELINE, "kv": [4.20, 4.19, 4.17], "linear": BASELINE})
    assert found["kv"].kind == found["linear"].kind == "no difference shown"
    assert found["linear"].words == "no difference to baseline shown (p = 1.0000)"


def test_one_seed_gets_no_verdict() -> None:
    found = verdicts({"baseline": [4.18], "kv": [3.77]})
    assert found["kv"].kind == "not tested"
    assert "-0.410 to baseline seen with one seed" in found["kv"].words
    repeated = verdicts({"baseline": [4.18, 4.18], "kv": [3.77, 3.77]})
    assert "the same with every seed, as if it were one" in repeated["kv"].words


def test_another_arm_to_compare_with() -> None:
    found = verdicts({"baseline": BASELINE, "linear": [3.9, 3.95, 3.86], "kv": [3.8, 3.86, 3.76]}, against="linear")
    assert found["kv"].words.startswith("better than linear")
    assert found["baseline"].kind == "worse"


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_two_hundred_identical_arms_with_their_control(seeds: int) -> None:
    """What is nominal for one arm alone: tests/evaluate/test_statistics.py, over more draws."""
    generator = np.random.default_rng(seeds)
    losses = 4.2 + 0.05 * (generator.normal(size=(200, 1, seeds)) + generator.normal(size=(200, 3, seeds)))
    kinds = [
        verdicts(dict(zip(("baseline", "kv", "mismatched"), map(list, draw), strict=True)))["kv"].kind
        for draw in losses
    ]
    assert sum(kind != "no difference shown" for kind in kinds) <= 0.05 * 200


def test_two_hundred_arms_that_differ_by_one_spread_at_ten_seeds() -> None:
    """One spread is the deviation between seeds of an arm; arms of a seed share three quarters of its variance."""
    generator = np.random.default_rng(0)
    spread = 0.05
    luck = generator.normal(4.2, spread * 0.75**0.5, size=(200, 10))
    own = generator.normal(0, spread * 0.25**0.5, size=(2, 200, 10))
    kinds = [
        verdicts({"baseline": list(a), "kv": list(b)})["kv"].kind
        for a, b in zip(luck + own[0], luck + own[1] - spread, strict=True)
    ]
    assert sum(kind == "better" for kind in kinds) >= 0.8 * 200


def test_steps_and_seconds_to_the_baselines_final_loss() -> None:
    # From 7 down to 3 in four even steps, 5 is passed at the second; down to 6 it never is.
    statistics = statistics_of({"baseline": [5.0, 5.0, 5.0], "kv": [3.0, 3.0, 3.0], "mismatched": [3.0, 6.0, 3.0]})
    assert statistics["kv"].steps_to_target.by_seed == {0: 100, 1: 100, 2: 100}
    assert statistics["kv"].steps_to_target.interval == (50, 100)
    assert statistics["kv"].seconds_to_target is not None
    assert statistics["kv"].seconds_to_target.mean == pytest.approx(10.0)
    assert statistics["kv"].seconds_to_target.interval == pytest.approx((5.0, 10.0))
    assert statistics["mismatched"].steps_to_target.by_seed == {0: 100, 1: None, 2: 100}
    assert statistics["mismatched"].steps_to_target.mean is None


@pytest.fixture
def matrix(tmp_path: Path) -> Matrix:
    path = tmp_path / "made.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    arms = ["baseline", "mismatched", "kv", "own:projector.dropout=0.3"]
    return plan_matrix(path, arms=arms, seeds=[0, 1, 2], folder=tmp_path / "out", controls=False)


FINALS = {"baseline": BASELINE, "kv": [3.77, 3.74, 3.73], "mismatched": [4.62, 4.67, 4.58], "own": [3.8, 3.9, 3.7]}


def results_of(matrix: Matrix) -> dict[tuple[str, int], RunResult]:
    return {
        (cell.arm.name, cell.seed): RunResult(
            name="made",
            date="2026-01-02",
            seed=cell.seed,
            student="new llama",
            student_parameters=1000,
            train_texts=10,
            train_tokens=1000,
            held_out_texts=2,
            truncated_train_texts=0,
            teachers=[],
            arms=[
                curve(
                    FINALS[cell.arm.name][cell.seed],
                    cell.arm.trains_as,
                    kv_loss=None if cell.arm.name == "baseline" else 0.4,
                )
            ],
            seconds={"capture big (training text)": 30.0 if cell is matrix.cells[0] else 0.5},
        )
        for cell in matrix.cells
    }


def test_a_comparison_holds_what_a_page_needs_and_comes_back(matrix: Matrix, tmp_path: Path) -> None:
    comparison = build_comparison(matrix, results_of(matrix))
    write_comparison(comparison, tmp_path / "out")
    assert Comparison.read(tmp_path / "out" / "comparison.json") == comparison
    own = comparison.arm("own")
    assert own is not None
    assert [run.seed for run in own.runs] == [0, 1, 2]
    assert [point.step for point in own.runs[0].result.evaluations] == list(STEPS)
    assert own.runs[0].result.gradient_shares == {"ce": 0.4, "kv": 0.6}
    assert own.runs[1].command.startswith("kvgraft train")
    assert own.overrides == ["projector.dropout=0.3"]
    assert comparison.capture_seconds == 30.0
    assert comparison.recipe["projector"]["dropout"] == 0.1
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_tables_say_it(matrix: Matrix) -> None:
    comparison = build_comparison(matrix, results_of(matrix))
    text = comparison_markdown(comparison)
    (row,) = (line for line in text.splitlines() if line.startswith("| kv |") and "better" in line)
    assert row.startswith("| kv | 3.747 (0.021) | -0.440 | -0.5")
    assert "| 200 (150 to 200) |" in row
    assert "| 3.770, 3.740, 3.730 | -0.410, -0.490, -0.420 |" in text
    assert "ce 40%, kv 60%" in text
    assert comparison.command in text
    assert all(run.command in text for arm in comparison.arms for run in arm.runs)
    console = Console(width=80, markup=False)  # as that of the commands
    with console.capture() as captured:
        console.print(*comparison_tables(comparison))
    assert "better than baseline" in captured.get()
    assert "-0.5" in captured.get()
    rows = [line for line in captured.get().splitlines() if line.startswith(" mismatched ")]
    assert len(rows) == 2, "no name is cut at the width of a plain terminal"
    assert "[/]" not in captured.get()


def test_a_comparison_of_one_seed_says_that_there_is_no_interval(tmp_path: Path) -> None:
    path = tmp_path / "made.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    matrix = plan_matrix(path, arms=["baseline", "mismatched", "kv"], seeds=[0], controls=False)
    text = comparison_markdown(build_comparison(matrix, results_of(matrix)))
    (row,) = (line for line in text.splitlines() if line.startswith("| kv |") and "not tested" in line)
    assert row.startswith("| kv | 3.770 | -0.410 | none | - | - | 200 |")


def with_metrics(result: RunResult, **metrics: float) -> RunResult:
    arm = result.arms[0]
    changed = [point.model_copy(update={"metrics": metrics}) for point in arm.evaluations]
    return result.model_copy(update={"arms": [arm.model_copy(update={"evaluations": changed})]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: result.model_copy(update={"train_tokens": 999}), "different data: train_tokens 999 and 1,000"),
        (lambda result: result.model_copy(update={"held_out_texts": 3}), "different data: held_out_texts 3 and 2"),
        (
            lambda result: with_metrics(result, perplexity=3.0),
            r"kv with seed 1 in .* held-out loss at step 0: it is missing",
        ),
        (lambda result: with_metrics(result, loss=math.nan), r"it is nan\. If it diverged, compare without this arm"),
        (lambda result: result.model_copy(update={"arms": []}), r"should hold one arm, kv; it holds \[\]"),
    ],
)
def test_runs_that_do_not_compare_are_refused(
    matrix: Matrix, change: Callable[[RunResult], RunResult], message: str
) -> None:
    results = results_of(matrix)
    results["kv", 1] = change(results["kv", 1])
    with pytest.raises(ResultError, match=message):
        build_comparison(matrix, results)


def test_a_comparison_of_a_newer_version_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text('{"format_version": 99}', encoding="utf-8")
    with pytest.raises(ResultError, match="written by a newer kvgraft"):
        Comparison.read(tmp_path / "comparison.json")


@pytest.mark.parametrize(("p_value", "text"), [(0.0497, "0.0497"), (0.00001, "< 0.0001"), (None, "-")])
def test_a_p_value_shows_on_which_side_it_is(p_value: float | None, text: str) -> None:
    assert p_value_text(p_value) == text
