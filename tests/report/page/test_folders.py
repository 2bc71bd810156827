"""Which page folders get, and what is no page at all."""

from pathlib import Path

import pytest

from kvgraft.errors import KVGraftError, ReportError
from kvgraft.report.page import default_place, page_of_folders
from tests.report.page.made_comparison import make_comparison
from tests.report.page.made_runs import make_run


def test_where_the_page_goes(tmp_path: Path) -> None:
    assert default_place([tmp_path / "run"]) == tmp_path / "run" / "report.html"
    assert default_place([tmp_path / "a", tmp_path / "b"]) == tmp_path / "report.html"
    with pytest.raises(ReportError, match="--output FILE"):
        default_place([tmp_path / "a", tmp_path / "x" / "b"])


def test_runs_and_comparisons_are_told_apart(tmp_path: Path) -> None:
    make_comparison(tmp_path / "comparison")
    make_run(tmp_path / "run")
    sections = {
        name: [section.name for section in page_of_folders([tmp_path / name], with_strips=False).sections]
        for name in ("comparison", "run")
    }
    assert "log" in sections["run"]
    assert "log" not in sections["comparison"]
    # A run of a comparison has a page too.
    assert page_of_folders([tmp_path / "comparison" / "kv" / "seed-0"], with_strips=False).title == "made"


def broken(folder: Path, what: str) -> list[Path]:
    file = folder / "comparison.json"
    if what == "neither":
        return [folder.parent]
    if what == "two":
        return [folder, folder / "kv" / "seed-0"]
    if what == "newer":
        file.write_text('{"format_version": 99}', encoding="utf-8")
    elif what == "damaged":
        file.write_text("{}", encoding="utf-8")
    elif what == "unfinished":
        file.unlink()
        (folder / "kv" / "seed-1" / "result.json").unlink()
    return [folder]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("neither", r"is neither a run \(it has no recipe\.yaml\) nor a comparison \(it has no comparison\.json\)"),
        ("two", "is a comparison, which has a page of its own"),
        ("newer", r"comparison\.json was written by a newer kvgraft \(format 99"),
        ("damaged", r"comparison\.json is not what kvgraft writes"),
        ("unfinished", r"the comparison in .* did not finish: .*unfinished runs of those begun: kv/seed-1\)"),
    ],
)
def test_what_has_no_page_is_named(tmp_path: Path, what: str, message: str) -> None:
    make_comparison(tmp_path / "comparison")
    with pytest.raises(KVGraftError, match=message):
        page_of_folders(broken(tmp_path / "comparison", what))
