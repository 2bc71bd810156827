import json
from pathlib import Path

import pytest
from rich.console import Console

from kvgraft.projector.ablation import Ablation, ablate
from kvgraft.projector.claims import judge
from kvgraft.projector.scenario import SYNTHETIC_WARNING, synthetic
from kvgraft.report.ablation import ablation_markdown, ablation_report, ablation_tables, group_rows, write_ablation


@pytest.fixture(scope="module")
def measured() -> Ablation:
    return ablate(lambda seed: synthetic(seed, 64), only=["width", "layer_norm"], seeds=[0, 1], steps=3)


def test_rows_hold_mean_and_deviation(measured: Ablation) -> None:
    rows = {row[0]: row for row in group_rows(measured, measured.groups["width"])}
    assert list(rows) == measured.groups["width"]
    linear = next(arm for arm in measured.arms if arm.name == "Linear, lr 1e-3")
    final = linear.measure("final_loss")
    _, parameters, _, loss, *_, steps, time, dead = rows["Linear, lr 1e-3"]
    assert (parameters, steps, time, dead) == ("1,944", "not in 3", "1.0 (0.0)", "-")
    assert loss == f"{final.mean:.3f} ({final.deviation:.3f})"
    assert rows["least squares"][6] == "-"


def test_steps_say_how_many_seeds_got_there(measured: Ablation) -> None:
    changed = measured.model_copy(deep=True)
    arm = next(arm for arm in changed.arms if arm.name == "MLP 2.0")
    arm.runs[0].steps = 2
    rows = {row[0]: row for row in group_rows(changed, changed.groups["width"])}
    assert rows["MLP 2.0"][6] == "2, 1 of 2"


def test_everything_is_written_and_synthetic_numbers_are_disowned(measured: Ablation, tmp_path: Path) -> None:
    report = ablation_report(measured, judge(measured))
    write_ablation(report, tmp_path / "deep" / "er")
    folder = tmp_path / "deep" / "er"
    assert (folder / "ablation.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((folder / "ablation.json").read_text())
    assert written["warning"] == SYNTHETIC_WARNING
    assert written["ablation"]["arms"][0]["runs"][1]["seed"] == 1
    assert {claim["verdict"] for claim in written["claims"]} <= {"reproduced", "not reproduced", "not comparable"}
    markdown = (folder / "ablation.md").read_text()
    assert f"**{SYNTHETIC_WARNING}**" in markdown
    assert "| Linear is fully surpassed | not recommended any more |" in markdown


def test_markdown_tables_are_rectangular(measured: Ablation) -> None:
    blocks: list[set[int]] = [set()]
    for line in ablation_markdown(ablation_report(measured, judge(measured))).splitlines():
        if line.startswith("|"):
            blocks[-1].add(line.count("|"))
        elif blocks[-1]:
            blocks.append(set())
    assert [len(block) for block in blocks if block] == [1, 1, 1]


def test_real_kv_carries_no_warning(measured: Ablation, tmp_path: Path) -> None:
    real = measured.model_copy(update={"synthetic": False})
    report = ablation_report(real, judge(real))
    assert report.warning == ""
    assert "not evidence" not in ablation_markdown(report)


def test_tables_print(measured: Ablation) -> None:
    console = Console(width=200, markup=False)  # as that of the commands
    with console.capture() as captured:
        console.print(*ablation_tables(ablation_report(measured, judge(measured))), sep="\n")
    text = captured.get()
    for shown in ("width (80 to 24", "layer_norm (80 to 24", "what the guide claims", "6.09", "not comparable"):
        assert shown in text
    assert "[/]" not in text
