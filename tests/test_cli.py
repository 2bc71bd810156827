"""The command line as a user meets it."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils.logging import is_progress_bar_enabled
from typer.testing import CliRunner

import kvgraft
from kvgraft.cli import app, main
from kvgraft.cli.shared import hide_bars_of_transformers
from kvgraft.progress import progress_bar
from kvgraft.recipe import Recipe

runner = CliRunner()


@pytest.fixture
def recipe_file(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny_recipe(training={"steps": 2}).to_yaml(), encoding="utf-8")
    return path


def test_help_names_every_command() -> None:
    output = runner.invoke(app, ["--help"]).output
    assert all(command in output for command in ("plan", "cache", "train", "evaluate", "ablate", "migrate"))


def test_a_warning_of_the_hub_is_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kvgraft", "--help"])
    # Set by main() too, for longer than this test.
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    printed = io.StringIO()
    hub = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(hub, "propagate", True)
    monkeypatch.setattr(hub, "handlers", [logging.StreamHandler(printed)])
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(printed)])
    with pytest.raises(SystemExit):
        main()
    logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
    assert printed.getvalue() == "Retrying in 1s\n"


def test_plan_tells_sizes_without_running_anything(recipe_file: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, ["plan", str(recipe_file), "--no-calibration", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    teacher = plan["teachers"][0]
    assert plan["problems"] == []
    assert (plan["student"]["num_layers"], plan["student"]["kv_dim"]) == (2, 8)
    assert teacher["layer_map"] == [[0, 0], [1, 3]]
    assert teacher["kv_bytes_per_token"] == 2 * 2 * 16 * 2
    assert teacher["kv_bytes"] == teacher["kv_bytes_per_token"] * teacher["kv_tokens"]
    assert teacher["advised_mlp_ratio"] == 0.5
    assert any("under 14B" in reason for reason in teacher["reasons"])
    assert not (tmp_path / "stores").exists()
    shown = runner.invoke(app, ["plan", str(recipe_file), "--no-calibration"]).output
    assert "0 <- 0, 1 <- 3" in shown
    mixed = ["--set", "student.new.model_type=lfm2", "--set", "student.new.layer_types=[conv, full_attention]"]
    shown = runner.invoke(app, ["plan", str(recipe_file), "--no-calibration", *mixed]).output
    assert "1 with KV of 2: 1" in shown
    assert "0 <- 3" in shown
    fewer = runner.invoke(app, ["plan", str(recipe_file), "--no-calibration", "--json", "--set", "store.dtype=compact"])
    assert json.loads(fewer.stdout)["teachers"][0]["kv_bytes_per_token"] == 2 * 2 * 2


def test_plan_shows_how_the_first_text_is_read(recipe_file: Path, tmp_path: Path) -> None:
    rows = [{"q": "Why?", "a": f"So {number}.\n", "long": f"{number} " * 300} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def plan(columns: str, *options: str) -> str:
        changes = ["--set", f"data.train={tmp_path / 'rows.jsonl'}", "--set", f"data.columns={columns}"]
        return runner.invoke(app, ["plan", str(recipe_file), "--no-calibration", *changes, *options]).stdout

    columns = '{prompt: "{q} ", completion: a}'
    assert json.loads(plan(columns, "--json"))["first_text"] == {"prompt": "Why? ", "completion": "So 0.\n"}
    assert "│ prompt     │ 'Why? '" in plan(columns)
    assert r"│ completion │ 'So 0.\n'" in plan(columns)
    assert len(json.loads(plan("{text: long}", "--json"))["first_text"]["completion"]) == 600
    assert plan("{text: long}").count("0 ") < 250


def test_plan_gives_one_size_where_several_layers_read_one_of_the_teacher(recipe_file: Path) -> None:
    deeper = ["--no-calibration", "--json", "--set", "student.new.num_hidden_layers=6"]
    teacher = json.loads(runner.invoke(app, ["plan", str(recipe_file), *deeper]).stdout)["teachers"][0]
    assert len(teacher["layer_map"]) == 6
    assert teacher["kv_bytes_per_token"] == 4 * 2 * 16 * 2
    assert f"The teacher's KV takes {4 * 2 * 16 * 2} bytes a token on disk." in teacher["reasons"]


def test_plan_does_not_load_what_memory_cannot_hold(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvgraft.memory.free_memory", lambda: 1000)
    result = runner.invoke(app, ["plan", str(recipe_file)])
    assert result.exit_code == 0, result.output
    assert "not calibrated" in result.output


def test_plan_counts_are_what_training_then_has(recipe_file: Path, tmp_path: Path) -> None:
    plan = json.loads(runner.invoke(app, ["plan", str(recipe_file), "--no-calibration", "--json"]).stdout)
    assert runner.invoke(app, ["train", str(recipe_file), "--output", str(tmp_path / "run")]).exit_code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["arms"][1]["projector_parameters"] == plan["teachers"][0]["projector_parameters"]
    # The plan takes the tokenizer to be as large as asked for; trained on little text it may come out smaller.
    assert result["student_parameters"] <= plan["student"]["parameters"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_length=9999", "longer than the student's context 256"),
        ("training.batch_size=64", "more than the 16 training texts"),
        ("alignment.layers=[[0,99]]", "teacher layers 0..3"),
        ("student.new.num_attention_heads=3", "student"),
        ("student.new.hiden_size=3", "hiden_size"),
        ("teachers.0.model=./nowhere", "no model at nowhere"),
        ("teachers.0.model=package:no_such_package/x.gguf", "no installed package 'no_such_package'"),
        ("data.train=absent.jsonl", "no file or folder at absent.jsonl"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(recipe_file: Path, override: str, message: str) -> None:
    result = runner.invoke(app, ["plan", str(recipe_file), "--no-calibration", "--json", "--set", override])
    assert result.exit_code == 1
    problems = json.loads(result.stdout)["problems"]
    assert len(problems) == 1
    assert message in problems[0]


@pytest.mark.parametrize("section", ["alignment", "teachers.0.alignment"])
@pytest.mark.parametrize(("weights", "message"), [("[2]", ""), ("[1,2]", "has 2 entries, and 1 student layers")])
def test_weights_of_layers_go_by_the_layers_that_are_compared(
    recipe_file: Path, section: str, weights: str, message: str
) -> None:
    overrides = ["--set", f"{section}.layers=[[1,3]]", "--set", f"kv_loss.layer_weights={weights}"]
    result = runner.invoke(app, ["plan", str(recipe_file), "--no-calibration", "--json", *overrides])
    problems = " ".join(json.loads(result.stdout)["problems"])
    assert message in problems
    assert bool(problems) == bool(message)


def test_full_disk_is_said_before_anything_runs(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvgraft.plan.shutil.disk_usage", lambda path: type("Usage", (), {"free": 100_000})())
    result = runner.invoke(app, ["plan", str(recipe_file), "--no-calibration", "--json"])
    assert result.exit_code == 1
    assert "and 0.0001 GB are free at" in json.loads(result.stdout)["problems"][0]


@pytest.mark.parametrize("layers", ["auto", "cka"])
def test_what_is_stored_already_needs_no_room(
    layers: str, fit_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(fit_recipe().to_yaml(), encoding="utf-8")
    words = ["cache", str(tmp_path / "recipe.yaml"), "--set", f"alignment.layers={layers}"]
    assert runner.invoke(app, words).exit_code == 0
    monkeypatch.setattr("kvgraft.plan.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    again = runner.invoke(app, words)
    assert again.exit_code == 0, again.exception
    more = runner.invoke(app, [*words, "--set", "data.train_samples=31"])
    assert "GB are free at" in str(more.exception)
    next((tmp_path / "stores").glob("*/manifest.json")).unlink()
    assert "GB are free at" in str(runner.invoke(app, words).exception)


def test_a_training_that_diverged_fails_once_all_is_written(recipe_file: Path, tmp_path: Path) -> None:
    changes = ["arms=[baseline]", "training.learning_rate=1e30", "training.warmup_steps=0"]
    words = ["train", str(recipe_file), *(word for change in changes for word in ("--set", change))]
    for more in ([], ["--resume"]):
        result = runner.invoke(app, [*words, "--output", str(tmp_path / "run"), *more])
        assert result.exit_code == 1
        assert str(result.exception).startswith("baseline diverged: the student's held-out loss after training is")
        assert "everything is in" in result.output
    assert {"result.json", "results.md", "experiment.yaml"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_cache_then_cache_again(recipe_file: Path) -> None:
    first = runner.invoke(app, ["cache", str(recipe_file)])
    assert first.exit_code == 0, first.output
    assert "tokens per second" in first.output
    assert "was there already" in runner.invoke(app, ["cache", str(recipe_file)]).output


def test_evaluate(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run [kv] :key:"
    runner.invoke(app, ["train", str(recipe_file), "--output", str(run)])
    result = runner.invoke(app, ["evaluate", str(run), "--json", "--max-new-tokens", "4"])
    assert result.exit_code == 0, result.output
    assert [arm["arm"] for arm in json.loads(result.stdout)["arms"]] == ["baseline", "kv"]
    shown = runner.invoke(app, ["evaluate", str(run), "--only", "quality"])
    assert "bits_per_byte" in shown.output
    assert f"everything is in {run}" in shown.output
    noted = runner.invoke(app, ["note", str(run), "worth another look"])
    assert noted.exit_code == 0, noted.output
    assert "- worth another look" in (run / "experiment.yaml").read_text()


def test_progress_shows_a_name_with_brackets_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("capturing KV of 7B [/q4]", 1, "tokens") as advance:
        advance(1)
    assert "7B [/q4]" in capsys.readouterr().err


def test_errors_come_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "experiments/train_with_kv.py", str(tmp_path / "absent.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "error: no recipe at" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_a_mistake_in_a_recipe_do_not_wait_for_large_libraries() -> None:
    code = (
        "import sys\n"
        "from kvgraft.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print(sorted({'torch', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)))\n"
    )
    for command in (["--help"], ["train", "--help"], ["train", "absent.yaml"], ["compare", "absent.yaml"]):
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[-1] == "[]"
        assert done.returncode == ("absent.yaml" in command)


def test_help_is_broken_where_the_terminal_ends() -> None:
    output = runner.invoke(app, ["graft", "--help"], env={"COLUMNS": "80"}).output
    lines = [line.strip() for line in output.splitlines()]
    first = next(index for index, line in enumerate(lines) if line.startswith("Says how likely"))
    assert lines[first + 1].endswith("controls: another question's cache, the")


def test_what_the_hub_sends_keeps_its_bar() -> None:
    enable_progress_bars()  # whatever a test before it has left
    try:
        hide_bars_of_transformers()
        assert not is_progress_bar_enabled()
        assert not are_progress_bars_disabled()
        disable_progress_bars()
        hide_bars_of_transformers()
        assert are_progress_bars_disabled()
    finally:
        enable_progress_bars()


def test_the_package_names_what_it_offers() -> None:
    assert set(kvgraft.__all__) == set(kvgraft._MODULES) <= set(dir(kvgraft))
    for name in kvgraft.__all__:
        assert getattr(kvgraft, name).__name__ == name
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = kvgraft.nothing


def test_compare_without_a_recipe_asks_for_one() -> None:
    result = runner.invoke(app, ["compare"])
    assert result.exit_code == 2
    assert "RECIPE" in result.output


def test_fit_and_graft_run_a_recipe(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(fit_recipe(store={"path": str(tmp_path / "stores")}).to_yaml())
    for command, written in (("fit", "fit.md"), ("graft", "graft.md")):
        folder = tmp_path / command
        ran = CliRunner().invoke(app, [command, str(tmp_path / "recipe.yaml"), "--output", str(folder)])
        assert ran.exit_code == 0, ran.output
        assert (folder / written).is_file()


def test_a_fit_that_diverged_fails_once_all_is_written(fit_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = fit_recipe(
        store={"path": str(tmp_path / "stores")},
        projector={"init_method": "xavier", "mlp_ratio": 2.0},
        fit={"steps": 4, "learning_rate": 1e30},
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    for more in ([], ["--resume", "--json"]):
        words = ["fit", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "fit"), *more]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 1
        assert str(result.exception).startswith("the fit diverged: R2 on held-out text is no finite number")
    assert (tmp_path / "fit" / "fit.md").is_file()
