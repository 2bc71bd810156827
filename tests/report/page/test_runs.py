"""What a page says of runs, and what it refuses."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

from kvgraft.cli import app
from kvgraft.errors import KVGraftError, ReportError
from kvgraft.recipe import Recipe
from kvgraft.report.page import page_of_runs, render_page, write_page
from kvgraft.report.page.charts import arm_styles, curve_chart
from kvgraft.report.page.data import CurveFigure, HeatMapFigure, PageData, Phrase, SamplesFigure, TableFigure
from kvgraft.report.page.metrics import _LEFT_OUT, SHARE_PREFIX, _title
from kvgraft.run import run
from tests.report.page.made_runs import RECIPE, held_out_loss, make_evaluation, make_run


def figures(page: PageData, kind: type) -> list:
    shown = [figure for section in page.sections for figure in (*section.figures, *section.more)]
    return [figure for figure in shown if isinstance(figure, kind)]


def test_headline_is_the_mean_over_seeds_with_its_deviation(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), seed) for seed in (2, 0, 1)]
    page = page_of_runs(runs, with_strips=False)
    table = figures(page, TableFigure)[0]
    headings = [column.english for column in table.columns]
    kv = dict(zip(headings, table.rows[1], strict=True))
    end = held_out_loss(1, 1, 100)
    assert kv["held-out loss after"] == f"{end:.3f} (0.100)"
    # The arms are always 0.5 apart: a difference within a seed has no spread.
    assert kv["against the baseline"] == "+0.500 (0.000)"
    assert table.rows[0][headings.index("against the baseline")] == "-"
    assert kv["steps to the baseline's final loss"].english == "never"
    assert page.tiles[0].value == "+0.500 (0.000)"


def test_curves_have_every_arm_and_seed(tmp_path: Path) -> None:
    page = page_of_runs([make_run(tmp_path / str(seed), seed) for seed in (0, 1)], with_strips=False)
    by_title = {getattr(f.title, "english", f.title): f for f in figures(page, CurveFigure)}
    loss = by_title["Held-out loss (cross-entropy, nats per token)"]
    assert {(curve.arm, curve.seed) for curve in loss.curves} == {
        (arm, seed) for arm in ("baseline", "kv", "mismatched") for seed in (0, 1)
    }
    assert loss.curves[0].values[-1] == held_out_loss(0, 0, 100)
    share = by_title["Share of the {part} loss in the student's gradient"]
    assert share.share
    assert {curve.arm for curve in share.curves} == {"kv", "mismatched"}
    assert "Gradient norm" in by_title


def test_every_name_of_the_documentation_has_a_title() -> None:
    rows = [line.split("|")[1] for line in Path("docs/trackers.md").read_text().splitlines() if line.startswith("| `")]
    names = [name.replace("TEACHER", "big") for row in rows for name in re.findall("`([^`]+)`", row)]
    curves = [name for name in names if name not in _LEFT_OUT and not name.startswith(SHARE_PREFIX)]
    assert len(curves) > 20
    assert [name for name in curves if not isinstance(_title(name), Phrase)] == []


def test_what_logits_did_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", arms=("baseline", "logits"))
    result = json.loads((folder / "result.json").read_text())
    logits = result["arms"][1]
    logits["gradient_shares"] = {"ce": 0.7, "logit": 0.3}
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for point in logits["evaluations"]:
            loss = 2 / (1 + point["step"])
            point["metrics"] |= {"logit_loss": loss, "logit_loss/big": loss}
            logged = {"arm": "logits", "step": point["step"], "eval_logit_loss": loss, "eval_logit_loss/big": loss}
            file.write(json.dumps(logged) + "\n")
    (folder / "result.json").write_text(json.dumps(result))
    page = page_of_runs([folder], with_strips=False)
    titles = [figure.title for figure in figures(page, CurveFigure)]
    assert Phrase("Held-out logit loss") in titles
    # One teacher's is all of it.
    assert Phrase("Held-out logit loss, {teacher}", {"teacher": "big"}) not in titles
    details = figures(page, TableFigure)[1]
    found = dict(zip([column.english for column in details.columns], details.rows[1], strict=True))
    assert found["logit loss before"] == "2.000"
    assert found["logit loss after"] == f"{2 / 101:.3f}"
    assert found["logit loss's share of the gradient"] == "30.0%"


@pytest.mark.parametrize("ended", ["NaN", "Infinity"])
def test_a_seed_that_diverged_is_shown(tmp_path: Path, ended: str) -> None:
    runs = [make_run(tmp_path / str(seed), seed) for seed in (0, 1)]
    result = json.loads((runs[1] / "result.json").read_text())
    result["arms"][1]["evaluations"][-1]["metrics"]["loss"] = ended
    (runs[1] / "result.json").write_text(json.dumps(result))
    page = page_of_runs(runs, with_strips=False)
    baseline, kv, _ = figures(page, TableFigure)[0].rows
    assert kv[2] == f"{float(ended):.3f} (nan)"
    assert baseline[2] == f"{held_out_loss(0, 0, 100) + 0.05:.3f} (0.071)"
    assert "nan" in render_page(page)


def test_what_was_logged_once_is_seen(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    # The Trainer's summary at the end of a training, and a quantity that was logged once in all.
    once = {"arm": "kv", "step": 100, "train_runtime": 2.0, "total_flos": 0.0, "train_loss": 3.0, "own": 5.0}
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(once) + "\n")
    page = page_of_runs([folder], with_strips=False)
    by_title = {getattr(found.title, "english", found.title): found for found in figures(page, CurveFigure)}
    assert not {"train_runtime", "total_flos", "train_loss"} & set(by_title)
    glyphs = {
        title: [
            part["attributes"]["glyph"]["name"]
            for part in named_parts(curve_chart(by_title[title], arm_styles(page.arms)).item)
        ]
        for title in ("own", "Gradient norm")
    }
    assert glyphs == {"own": ["Scatter"], "Gradient norm": ["Line"] * 3}


def named_parts(item: Any) -> list[dict[str, Any]]:
    """The renderers of a chart that page.js knows as lines of arms."""
    plot = item["doc"]["roots"][0]["attributes"]
    return [part for part in plot["renderers"] if str(part["attributes"].get("name")).startswith("line ")]


def test_an_arm_that_some_seeds_lack_is_marked(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1, arms=("baseline", "kv"))]
    table = figures(page_of_runs(runs, with_strips=False), TableFigure)[0]
    assert table.rows[2][0].values == {"arm": "mismatched", "some": "1", "all": "2"}


def test_html_in_names_and_texts_is_escaped(tmp_path: Path) -> None:
    evil = "<script>window.hacked = 1</script>"
    recipe = {**RECIPE, "teachers": [{"name": evil, "model": "some/big"}]}
    folder = make_run(tmp_path / "run", teacher=evil, arms=("baseline", evil), recipe=recipe)
    (folder / "experiment.yaml").write_text(f"notes: '{evil}'", encoding="utf-8")
    make_evaluation(folder, {"baseline": "", evil: evil}, prompt=evil, teacher=evil)
    html = render_page(page_of_runs([folder], with_strips=False))
    assert "hacked" in html
    assert evil not in html
    assert "(empty)" in html


def test_what_evaluate_wrote_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", seed=3)
    empty = page_of_runs([folder], with_strips=False)
    assert not figures(empty, HeatMapFigure)
    assert "No answers yet: kvgraft evaluate" in render_page(empty)
    make_evaluation(folder, {"baseline": "no number", "kv": "#### 4"}, problems=30)
    page = page_of_runs([folder], with_strips=False)
    table, quality, tasks = next(section for section in page.sections if section.name == "evaluation").figures
    assert table.title.values == {"data": "word_problems", "shots": "2", "seed": "3"}
    interval = binomtest(30, 30).proportion_ci(method="wilson")
    assert table.rows[1][1:3] == ["100.0% (30/30)", f"{interval.low:.1%} – 100.0%"]  # noqa: RUF001
    assert table.rows[0][1] == "0.0% (0/30)"
    assert table.command.endswith("--only gsm8k --problems 30 --shots 2 --batch-size 16")
    assert quality.rows == [["baseline", "3.000", "1.500"], ["kv", "2.500", "1.250"]]
    assert (tasks.columns[1], tasks.rows[1][1]) == ("made: acc", "0.500")
    maps = {figure.title.english: figure for figure in figures(page, HeatMapFigure)}
    assert len(maps) == 7
    # The baseline trained no projector.
    projector = maps["R² of the run's own comparison, through the saved projector"]
    assert (projector.rows, projector.columns) == (["kv: keys", "kv: values"], ["0←0", "1←3"])
    assert projector.values == [[0.0, 1.0], [0.0, 1.0]]
    assert len(maps["Linear CKA of the student's and the teacher's KV"].rows) == 4
    (samples,) = figures(page, SamplesFigure)
    assert len(samples.samples) == 20
    assert samples.note.values["all"] == "30"
    assert samples.samples[0].answers == {"baseline ✗": "no number", "kv ✓": "#### 4"}
    assert samples.samples[0].reference == "#### 4"


def test_missing_metrics_are_said_on_the_page_and_the_rest_is_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    page = page_of_runs([folder], with_strips=False)
    assert "no training curves" in caplog.text
    assert page.notices[0].values["file"] == "metrics.jsonl"
    assert figures(page, CurveFigure)


def test_a_text_that_cannot_be_found_is_said_on_the_page(tmp_path: Path) -> None:
    html = render_page(page_of_runs([make_run(tmp_path / "run")]))
    assert "the two tokenizations cannot be shown" in html


def test_nothing_is_loaded_from_a_network(tmp_path: Path) -> None:
    html = render_page(page_of_runs([make_run(tmp_path / "run")], with_strips=False))
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"'](?!data:)", html)


def broken(folder: Path, what: str) -> None:
    result = folder / "result.json"
    if what == "no recipe":
        (folder / "recipe.yaml").unlink()
    elif what == "unfinished":
        result.unlink()
        (folder / "baseline").mkdir()
        (folder / "baseline" / "arm.json").touch()
    elif what == "newer":
        content = json.loads(result.read_text())
        result.write_text(json.dumps({**content, "format_version": 99}))
    elif what == "no JSON":
        result.write_text("{")
    elif what == "no arms":
        result.write_text(json.dumps({**json.loads(result.read_text()), "arms": []}))
    elif what == "bad metrics":
        (folder / "metrics.jsonl").write_text("{nonsense}\n")
    elif what == "bad samples":
        make_evaluation(folder, {"baseline": ""})
        (folder / "evaluation" / "samples.jsonl").write_text('{"arm": "kv"}\n')


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no recipe", r"is no run folder: it has no recipe\.yaml"),
        ("unfinished", r"did not finish: .*finished arms: baseline.*kvgraft train .*--resume"),
        ("newer", r"result\.json was written by a newer kvgraft \(format 99"),
        ("no JSON", r"result\.json is not what kvgraft writes"),
        ("no arms", "no arm at all"),
        ("bad metrics", r"metrics\.jsonl holds a line that is no JSON"),
        ("bad samples", r"samples\.jsonl is not what `kvgraft evaluate` writes: Field required at prompt"),
    ],
)
def test_what_cannot_be_shown_is_named(tmp_path: Path, what: str, message: str) -> None:
    folder = make_run(tmp_path / "run")
    broken(folder, what)
    with pytest.raises(KVGraftError, match=message):
        page_of_runs([folder], with_strips=False)


def test_runs_that_are_no_seeds_of_one_recipe_are_refused(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first")
    with pytest.raises(ReportError, match="both of seed 0"):
        page_of_runs([first, make_run(tmp_path / "second")], with_strips=False)
    other = make_run(tmp_path / "other", seed=1, recipe={**RECIPE, "data": {"max_length": 7}})
    with pytest.raises(ReportError, match=r"different recipes .*differ in data"):
        page_of_runs([first, other], with_strips=False)


def test_the_command_shows_a_real_run(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run(tiny_recipe(arms=["baseline", "kv"], training={"steps": 2}), tmp_path / "run")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "One text, two tokenizations" in html
    assert "cannot be shown" not in html
    assert "processor: " in html


def test_twenty_arms_five_seeds_and_a_thousand_steps(tmp_path: Path) -> None:
    arms = ("baseline", *(f"arm-{index}" for index in range(1, 20)))
    runs = [make_run(tmp_path / str(seed), seed, arms, tuple(range(1, 1001))) for seed in range(5)]
    write_page(page_of_runs(runs, with_strips=False), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
