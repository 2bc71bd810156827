"""What a page says of a comparison."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvgraft.cli import app
from kvgraft.report.notes import NOTES_FILE
from kvgraft.report.page import page_of_comparison, render_page
from kvgraft.report.page.data import CurveFigure, PageData, TextFigure, Words
from tests.report.page.made_comparison import make_comparison, remove_runs
from tests.report.page.made_runs import held_out_loss, make_evaluation

ARMS = ["baseline", "mismatched", "kv", "own"]


def english(words: Words) -> str:
    return words if isinstance(words, str) else words.english.format(**words.values)


def shown(page: PageData, section: str) -> dict[str, object]:
    """Figures of a section by title."""
    (found,) = (part for part in page.sections if part.name == section)
    return {english(figure.title): figure for figure in (*found.figures, *found.more)}


def test_the_headline_holds_verdicts_and_what_they_stand_on(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path / "out", seeds=(0, 1, 2))
    page = page_of_comparison(comparison, tmp_path / "out", with_strips=False)
    tables = shown(page, "results")
    table = tables["Every arm against baseline"]
    rows = {row[0]: [english(cell) for cell in row[1:]] for row in table.rows}
    assert list(rows) == ARMS
    baseline, kv = held_out_loss(0, 1, 100), held_out_loss(2, 1, 100)
    assert rows["baseline"][:3] == ["what the others are compared with", f"{baseline:.3f} (0.100)", "-"]
    # The arms are 1.0 apart with every seed alike, which no test can judge.
    assert rows["kv"] == ["not tested", f"{kv:.3f} (0.100)", "+1.000", "none", "-", "-", "never", "never"]
    seeds = tables["Held-out loss of each seed"]
    assert seeds.rows[2][1:4] == [f"{held_out_loss(2, seed, 100):.3f}" for seed in range(3)]
    assert tables["The arms, and the verdicts in full"].rows[3][2] == "projector.dropout=0.3"
    assert [tile.value for tile in page.tiles] == ["+0.500", "+1.000", "+1.500"]
    assert page.notices == []


def test_curves_have_every_arm_under_its_own_name(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path / "out")
    page = page_of_comparison(comparison, tmp_path / "out", with_strips=False)
    curves = shown(page, "curves")
    every = {(arm, seed) for arm in ARMS for seed in (0, 1)}
    for title in ("Held-out loss (cross-entropy, nats per token)", "Training loss (cross-entropy, nats per token)"):
        assert {(curve.arm, curve.seed) for curve in curves[title].curves} == every
    held_out = {(curve.arm, curve.seed): curve for curve in curves[next(iter(curves))].curves}
    assert held_out["own", 1].values[-1] == held_out_loss(3, 1, 100)
    kv = curves["Held-out KV loss (1 is what predicting the mean costs)"]
    assert {curve.arm for curve in kv.curves} == {"mismatched", "kv", "own"}
    (share,) = (figure for figure in shown(page, "gradients").values() if isinstance(figure, CurveFigure))
    assert {curve.arm for curve in share.curves} == {"mismatched", "kv", "own"}


def test_notes_commands_and_machines_are_shown(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path / "out")
    (tmp_path / "out" / "own" / "seed-1" / NOTES_FILE).write_text("looked at by hand\n", encoding="utf-8")
    page = page_of_comparison(comparison, tmp_path / "out", with_strips=False)
    notes = shown(page, "notes")["Notes on the arms and from people"]
    assert isinstance(notes, TextFigure)
    assert notes.text == "own, seed 1: looked at by hand"
    setup = shown(page, "setup")
    commands = setup["The command of each run"].text
    assert all(run.command in commands for arm in comparison.arms for run in arm.runs)
    html = render_page(page)
    assert "a processor, 2 CPUs, 16 GB, a card" in html
    assert comparison.command in html.replace("&#39;", "'")


def test_evaluations_of_single_runs_are_shown_by_arm_and_seed(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    comparison = make_comparison(folder)
    for arm, trained_as, seed, answer in (
        ("baseline", "baseline", 0, ""),
        ("own", "kv", 0, "#### 4"),
        ("own", "kv", 1, ""),
    ):
        make_evaluation(folder / arm / f"seed-{seed}", {trained_as: answer}, problems=4)
    page = page_of_comparison(comparison, folder, with_strips=False)
    tables = shown(page, "evaluation")
    assert list(tables) == [
        "Exact match on 4 problems of word_problems, 2 solved ones before each",
        "Bits per byte of held-out text",
    ]
    match, bits = tables.values()
    assert match.rows == [
        ["baseline", "0.0% (0/4)", "-", "0.0%"],
        ["own", "100.0% (4/4)", "0.0% (0/4)", "50.0% (70.7%)"],
    ]
    assert bits.rows[1] == ["own", "1.500", "1.500", "1.500 (0.000)"]
    assert f"kvgraft evaluate {folder / 'own' / 'seed-1'} --only gsm8k" in match.command
    make_evaluation(folder / "kv" / "seed-0", {"kv": "#### 4"}, problems=2)
    assert len(shown(page_of_comparison(comparison, folder, with_strips=False), "evaluation")) == 3


def test_a_comparison_without_evaluations_says_how_to_make_them(tmp_path: Path) -> None:
    page = page_of_comparison(make_comparison(tmp_path / "out"), tmp_path / "out", with_strips=False)
    (section,) = (part for part in page.sections if part.name == "evaluation")
    assert section.missing.values["command"].startswith("kvgraft evaluate ")
    assert "No run of this comparison was evaluated" in render_page(page)


def test_a_comparison_without_its_runs_is_shown_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    comparison = make_comparison(tmp_path / "out", seeds=(0,))
    remove_runs(tmp_path / "out")
    page = page_of_comparison(comparison, tmp_path / "out")
    assert "4 of 4 runs have no log beside the comparison" in caplog.text
    assert ["One seed" in english(notice) for notice in page.notices] == [True, False]
    assert "Held-out loss (cross-entropy, nats per token)" in shown(page, "curves")
    assert "not recorded by this run" not in render_page(page)


def test_a_run_made_anew_after_the_comparison_is_not_mixed_in(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path / "out")
    result = tmp_path / "out" / "kv" / "seed-0" / "result.json"
    text = result.read_text(encoding="utf-8")
    result.write_text(text.replace('"seconds": 3.0', '"seconds": 4.0', 1), encoding="utf-8")
    page = page_of_comparison(comparison, tmp_path / "out", with_strips=False)
    assert page.notices[0].values == {"some": "1", "all": "8"}


def test_the_command_takes_a_comparison(tmp_path: Path) -> None:
    make_comparison(tmp_path / "out")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "The arms, and the verdicts in full" in html
