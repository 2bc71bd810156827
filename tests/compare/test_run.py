"""``kvgraft compare`` as a user meets it: a whole comparison on a tiny random teacher, stopped and gone on with."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvgraft.cli import app
from kvgraft.cli.shared import repeat_options
from kvgraft.compare.comparison import Comparison
from kvgraft.distill.callbacks import InterruptCallback
from kvgraft.recipe import Recipe
from kvgraft.report.log import read_metrics
from kvgraft.store.format import read_manifest

runner = CliRunner()


@pytest.fixture
def command(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny_recipe(training={"steps": 2}).to_yaml(), encoding="utf-8")
    return [
        "compare",
        str(path),
        "--arms",
        "kv",
        "--seeds",
        "0",
        "1",
        "--output",
        str(tmp_path / "out"),
        "--no-controls",
    ]


def with_baseline(command: list[str]) -> list[str]:
    return [*command, "--arms", "baseline"]


def stop_at_step(monkeypatch: pytest.MonkeyPatch, step: int, folder: str) -> None:
    """Ctrl-C at ``step`` of the training whose folder's path holds ``folder``."""
    original = InterruptCallback.on_step_end

    def interrupting(self: InterruptCallback, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.interrupted = state.global_step == step and folder in args.output_dir
        original(self, args, state, control, **rest)

    monkeypatch.setattr(InterruptCallback, "on_step_end", interrupting)


def test_a_comparison_stopped_and_gone_on_with(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at_step(patch, 1, "kv/seed-1")
        stopped = runner.invoke(app, with_baseline(command))
    assert stopped.exit_code == 130, stopped.output
    assert "go on with: kvgraft compare" in stopped.output
    assert not (out / "kv" / "seed-1" / "result.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/seed-*/result.json")}
    assert len(finished) == 2

    done = runner.invoke(app, [*with_baseline(command), "--json"])
    assert done.exit_code == 0, done.output
    comparison = Comparison.read(out / "comparison.json")
    assert json.loads(done.stdout) == json.loads((out / "comparison.json").read_text())
    # What was finished was left alone, and what was stopped went on from its checkpoint.
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    steps = [
        record["step"] for record in read_metrics(out / "kv" / "seed-1" / "metrics.jsonl") if "eval_loss" in record
    ]
    assert steps == [0, 2]
    assert [(arm.name, [run.seed for run in arm.runs]) for arm in comparison.arms] == [
        ("kv", [0, 1]),
        ("baseline", [0, 1]),
    ]
    kv = comparison.arm("kv")
    assert kv is not None
    assert kv.statistics.difference is not None
    for run in kv.runs:
        result = json.loads((Path(run.folder) / "result.json").read_text())
        assert result["seed"] == run.seed
        assert result["arms"][0]["evaluations"][-1]["metrics"]["loss"] == kv.statistics.final.by_seed[run.seed]
    # One store, filled once.
    assert len(list((tmp_path / "stores").iterdir())) == 2
    assert comparison.teachers[0].captured_tokens > 0
    assert {path.name for path in out.iterdir() if path.is_file()} == {"comparison.json", "comparison.md", "curves.png"}

    shown = runner.invoke(app, [*with_baseline(command), "--no-train"])
    assert shown.exit_code == 0, shown.output
    assert "everything is in" in shown.output

    other = runner.invoke(app, [*with_baseline(command), "--set", "training.steps=3"])
    assert "holds a run of another recipe" in str(other.exception)
    result_file = out / "kv" / "seed-0" / "result.json"
    result_file.write_text(result_file.read_text().replace('"format_version": 1', '"format_version": 9'))
    newer = runner.invoke(app, [*with_baseline(command), "--no-train"])
    assert "written by a newer kvgraft (format 9" in str(newer.exception)


def test_runs_of_other_held_out_text_do_not_compare(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    texts = [f'{{"text": "Tom has {number} apples and Ann has {number + 2}."}}\n' for number in range(16)]
    held_out = tmp_path / "held_out.jsonl"
    (tmp_path / "train.jsonl").write_text("".join(texts), encoding="utf-8")
    data = {"train": str(tmp_path / "train.jsonl"), "held_out": str(held_out), "held_out_samples": None}
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(tiny_recipe(data=data, training={"steps": 1}).to_yaml(), encoding="utf-8")
    words = ["compare", str(path), "--arms", "baseline", "--no-controls", "--output", str(out), "--seeds"]
    results = []
    # As many texts of other words: no count tells.
    for text, seeds in (("Ann had 3 pears.", ["0"]), ("Tom had 4 pears.", ["0", "1"])):
        held_out.write_text(f'{{"text": "{text}"}}\n' * 4, encoding="utf-8")
        results.append(runner.invoke(app, [*words, *seeds]))
    assert results[0].exit_code == 0, results[0].output
    assert str(results[1].exception) == (
        f"baseline with seed 1 in {out}/baseline/seed-1 and baseline with seed 0 in {out}/baseline/seed-0 do not "
        "compare: held-out text changed between them. Bring back what it was, or remove the older folders and run the "
        "comparison again"
    )


def test_an_arm_with_another_dtype_reads_a_store_of_its_own(command: list[str], tmp_path: Path) -> None:
    command = [*command, "--arms", "compact:kv store.dtype=compact", "--against", "kv"]
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.output
    stores = [read_manifest(folder) for folder in (tmp_path / "stores").iterdir()]
    # Training and held-out text each.
    assert sorted(store.identity.dtype for store in stores if store) == ["compact"] * 2 + ["float16"] * 2
    statistics = Comparison.read(tmp_path / "out" / "comparison.json").arms[1].statistics
    assert statistics.difference is not None
    assert statistics.difference.mean != 0


def test_without_training_what_has_not_finished_is_named(command: list[str], tmp_path: Path) -> None:
    error = str(runner.invoke(app, [*with_baseline(command), "--no-train"]).exception)
    assert "4 of 4 runs have not finished" in error
    assert f"--output {tmp_path / 'out' / 'kv' / 'seed-1'} --resume" in error
    assert not (tmp_path / "out").exists()


def test_what_cannot_work_is_said_before_anything_runs(command: list[str], tmp_path: Path) -> None:
    result = runner.invoke(app, [*with_baseline(command), "--arms", "far:alignment.layers=[[0,99]]"])
    assert "teacher layers 0..3" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_printed_commands_are_the_cells_and_nothing_runs(command: list[str], tmp_path: Path) -> None:
    result = runner.invoke(app, [*with_baseline(command), "--print-commands"])
    lines = result.stdout.splitlines()
    assert [shlex.split(line)[-2] for line in lines] == [
        str(tmp_path / "out" / arm / f"seed-{seed}") for seed in (0, 1) for arm in ("kv", "baseline")
    ]
    assert not (tmp_path / "out").exists()


def test_several_values_after_one_option() -> None:
    given = ["r.yaml", "--arms", "kv", "own:a.b=1 c=2", "--seeds", "0", "1", "--set", "x=1", "--json"]
    assert repeat_options(given, ("--arms", "--seeds")) == [
        *["r.yaml", "--arms", "kv", "--arms", "own:a.b=1 c=2", "--seeds", "0", "--seeds", "1", "--set", "x=1", "--json"]
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--arms", "--seeds", "0"], "--arms is followed by no value"), (["--seeds", "a"], "must be whole numbers")],
)
def test_what_is_no_value_is_said(command: list[str], arguments: list[str], message: str) -> None:
    result = runner.invoke(app, [*command[:2], *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
