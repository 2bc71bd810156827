"""What the table and the experiment log say of a run, from numbers made by hand."""

import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from kvgraft.distill.arms import gradient_shares, non_finite_steps, real_token_share
from kvgraft.errors import RecipeError, ResultError
from kvgraft.recipe import Recipe, load_recipe
from kvgraft.report.environment import describe_environment
from kvgraft.report.log import append_metrics, experiment_log, read_metrics, write_experiment_log
from kvgraft.report.notes import NOTES_FILE, add_note, noticed
from kvgraft.report.plots import save_curves
from kvgraft.report.results import LOG_FILE, ArmResult, Evaluation, RunResult, TeacherResult
from kvgraft.report.tables import arm_rows, cost_rows, markdown


def arm(name: str, losses: list[float], kv_losses: list[float] | None = None) -> ArmResult:
    points = []
    for index, loss in enumerate(losses):
        metrics = {"loss": loss, "perplexity": 2.0, "student_kv_deviation": 1.0, "student_kv_effective_rank": 4.0}
        if kv_losses is not None:
            metrics["kv_loss"] = kv_losses[index]
        points.append(Evaluation(step=10 * index, metrics=metrics))
    shares = {"ce": 0.4, "kv": 0.6} if kv_losses else {}
    return ArmResult(arm=name, steps=10 * (len(losses) - 1), seconds=3.0, evaluations=points, gradient_shares=shares)


RESULT = RunResult(
    name="made",
    date="2026-01-02",
    seed=0,
    student="new llama",
    student_parameters=1000,
    train_texts=10,
    train_tokens=1000,
    held_out_texts=2,
    truncated_train_texts=1,
    teachers=[
        TeacherResult(
            name="big",
            model="some/big",
            layer_map=[(0, 3)],
            tokens=900,
            captured_tokens=900,
            tokens_per_second=450.0,
            store_bytes=9000,
            bytes_per_token=10.0,
            truncated_texts=0,
            alignment_coverage=0.99,
            alignment_dropped={"special": 1},
            store_fingerprint="0123456789abcdef",
        )
    ],
    arms=[
        arm("baseline", [7.0, 6.0, 5.0, 4.5]),
        arm("kv", [7.0, 5.0, 4.4, 4.2], [1.0, 0.6, 0.43, 0.4]),
        arm("mismatched", [7.0, 6.5, 5.5, 5.0], [1.0, 0.9, 0.9, 0.9]),
    ],
    seconds={"train baseline": 3.0},
)
RECIPE = Recipe.model_validate(
    {"name": "made", "teachers": [{"name": "big", "model": "some/big"}], "student": {"new": {}}}
)


def test_steps_to_a_loss_and_reduction() -> None:
    baseline, kv, mismatched = RESULT.arms
    bar = baseline.last["loss"]
    assert baseline.steps_to(bar) == 30
    assert kv.steps_to(bar) == 20
    assert mismatched.steps_to(bar) is None
    assert kv.kv_reduction() == pytest.approx(0.6)
    assert baseline.kv_reduction() is None
    # 95 % of the way from 1.0 to 0.4 is 0.43.
    assert kv.convergence_step("kv_loss") == 20
    # 95 % of the way from 7.0 to 4.5 is 4.625.
    assert baseline.convergence_step("loss") == 30
    assert baseline.convergence_step("kv_loss") is None
    assert arm("rising", [4.0, 5.0]).convergence_step("loss") is None


def test_table_says_it() -> None:
    rows = dict(arm_rows(RESULT))
    assert rows["held-out loss after"] == ["4.500", "4.200", "5.000"]
    assert rows["loss against the baseline"] == ["+0.000", "-0.300", "+0.500"]
    assert rows["steps to the baseline's final loss"] == ["30 (100%)", "20 (67%)", "not in 30"]
    assert rows["KV loss reduction"] == ["-", "60.0%", "10.0%"]
    assert rows["KV loss's share of the gradient norm"] == ["-", "60.0%", "60.0%"]
    costs = dict(cost_rows(RESULT))
    assert costs["big: student tokens aligned"] == "99.00%"
    assert costs["big: tokens per second"] == "450"
    assert costs["big: store bytes per token"] == "10"
    assert "| held-out loss after | 4.500 | 4.200 | 5.000 |" in markdown(RESULT)


def test_experiment_log_is_filled_from_the_run() -> None:
    log = experiment_log(RECIPE, RESULT)
    assert log["experiment"] == {"name": "made", "date": "2026-01-02"}
    assert log["model"] == {"teacher": "big", "student": "new llama"}
    assert (log["results"]["initial_loss"], log["results"]["final_loss"]) == (1.0, 0.4)
    assert log["results"]["reduction"] == "60.0%"
    assert log["results"]["convergence_step"] == 20
    assert "kv: held-out loss 7.000 -> 4.200, -0.300 against the baseline" in log["notes"]


def test_curves_of_one_run_and_of_several(tmp_path: Path) -> None:
    for name, results in (("one.png", [RESULT]), ("two.png", [RESULT, RESULT.model_copy(update={"seed": 1})])):
        save_curves(results, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_metrics_survive_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    append_metrics(path, {"step": 3})
    append_metrics(path, {"step": 4})
    assert read_metrics(path) == [{"step": 1}, {"step": 3}, {"step": 4}]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    RESULT.write(tmp_path / "result.json")
    assert RunResult.read(tmp_path / "result.json") == RESULT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "did not finish"),
        ('{"format_version": 2, "new": 1}', r"newer kvgraft \(format 2; this one reads up to 1\)"),
        ('{"name": "made"}', r"is not what kvgraft writes: date: Field required \(\d+ problems"),
        ('{"name": "ma', "is not what kvgraft writes: the file: Invalid JSON"),
    ],
)
def test_a_result_that_cannot_be_read_says_why(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ResultError, match=message):
        RunResult.read(path)


def test_log_repeats_the_run(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"training": RECIPE.training.model_copy(update={"learning_rate": 1.23456789e-4})})
    path = tmp_path / "experiment.yaml"
    write_experiment_log(path, recipe, RESULT.model_copy(update={"environment": describe_environment()}))
    assert load_recipe(path) == recipe
    assert load_recipe(path, ["training.steps=7"]).training.steps == 7
    environment = yaml.safe_load(path.read_text())["environment"]
    # What stands behind a plus, as the kind of card, is in one of them and not in the other.
    assert environment["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert environment["hardware"]["cpus"] >= 1
    assert environment["hardware"]["memory_gb"] > 0
    assert environment["seeds"] == {"run": 0, "data": 0}
    assert environment["stores"] == {"big": "0123456789abcdef"}
    log = yaml.safe_load(path.read_text())
    log["environment"]["recipe"]["training"]["stepz"] = 1
    path.write_text(yaml.safe_dump(log, sort_keys=False))
    with pytest.raises(RecipeError, match=r"training\.stepz \(line \d+\).*known here: steps"):
        load_recipe(path)
    del log["environment"]["recipe"]
    path.write_text(yaml.safe_dump(log))
    with pytest.raises(RecipeError, match=r"without the recipe in it.*take recipe\.yaml"):
        load_recipe(path)


def test_commit_is_that_of_the_code(tmp_path: Path) -> None:
    here = Path(__file__).parent
    tracked = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    commit = describe_environment().git_commit
    assert (commit or "").removesuffix("-dirty") == tracked.stdout.strip()


def test_what_a_run_noticed() -> None:
    assert not any("lost" in note or "gradient" in note for note in noticed(RESULT))
    assert "1 of 10 training texts were cut to data.max_length; their ends were never learned" in noticed(RESULT)
    troubled = RESULT.arms[1].model_copy(deep=True, update={"gradient_shares": {"ce": 0.996, "kv": 0.004}})
    troubled.non_finite_steps = 2
    troubled.last.update({"student_kv_deviation": 0.4, "student_kv_effective_rank": 1.0, "dead_units/big": 0.25})
    notes = noticed(RESULT.model_copy(update={"arms": [troubled], "truncated_train_texts": 0}))
    assert "kv: the student's KV lost 60% of its deviation (1 -> 0.4)" in notes
    assert "kv: the student's KV lost 75% of its effective rank (4 -> 1)" in notes
    assert any(note.startswith("kv: kv made up 0.40% of the gradient norm") for note in notes)
    assert any(note.startswith("kv: 25% of the hidden units of big's adapters are dead") for note in notes)
    assert "kv: 2 of the logged steps had a loss or gradient that is not finite" in notes
    assert not any("were cut" in note for note in notes)


def test_a_teacher_that_stops_before_its_context_is_not_said_to_be_at_it() -> None:
    teacher = RESULT.teachers[0].model_copy(update={"truncated_texts": 15})
    (note,) = (note for note in noticed(RESULT.model_copy(update={"teachers": [teacher]})) if "15 texts" in note)
    assert "twice data.max_length" in note


def test_notes_of_people_stay_when_the_log_is_written_again(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no run folder"):
        add_note(tmp_path, "hello")
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml())
    assert add_note(tmp_path, "before the\nrun was finished") == tmp_path / NOTES_FILE
    write_experiment_log(tmp_path / "experiment.yaml", RECIPE, RESULT)
    assert add_note(tmp_path, "损失下降 <b>") == tmp_path / LOG_FILE
    with pytest.raises(RecipeError, match="the note is empty"):
        add_note(tmp_path, " \n")
    notes = yaml.safe_load((tmp_path / "experiment.yaml").read_text())["notes"]
    assert notes[-2:] == ["before the run was finished", "损失下降 <b>"]
    write_experiment_log(tmp_path / "experiment.yaml", RECIPE, RESULT)
    assert yaml.safe_load((tmp_path / "experiment.yaml").read_text())["notes"] == notes


def test_steps_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    for step, loss in enumerate((1.0, float("nan"), float("inf"))):
        append_metrics(tmp_path / "metrics.jsonl", {"step": step, "loss": loss})
    append_metrics(tmp_path / "metrics.jsonl", {"step": 2, "eval_loss": 1.0})
    assert non_finite_steps(tmp_path) == 2


def test_steps_that_were_logged_again_after_a_kill_count_once(tmp_path: Path) -> None:
    counts = {"real_tokens": 60.0, "processed_tokens": 100.0}
    for step, share in ((1, 0.2), (2, 0.4), (2, 0.4), (3, 0.6)):
        record = {"step": step, "loss": float("nan"), **counts, "gradient_share/kv": share}
        append_metrics(tmp_path / "metrics.jsonl", record)
    append_metrics(tmp_path / "metrics.jsonl", {"step": 3, "loss": 1.0, "real_tokens": 80.0, "processed_tokens": 100.0})
    assert gradient_shares(tmp_path) == {"kv": pytest.approx(0.4)}
    assert non_finite_steps(tmp_path) == 2
    assert real_token_share(tmp_path) == pytest.approx(200 / 300)
