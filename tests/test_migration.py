"""``kvgraft migrate`` as a user meets it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from kvgraft.cli import app
from kvgraft.errors import ProjectorError
from kvgraft.migration import migrate_checkpoint, teacher_layers
from kvgraft.projector.projector import KVDimensionProjector
from tests.docs.pages import blocks

runner = CliRunner()


@pytest.fixture
def old_linear() -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    return {"key": nn.Linear(24, 10), "value": nn.Linear(24, 10)}


@pytest.fixture
def old(old_linear: dict[str, nn.Linear], tmp_path: Path) -> Path:
    """Saved by the old projector, whose modules could not hold the dot of org/small-1.5."""
    torch.save(state_dict(old_linear, "org_small-1_5"), tmp_path / "old.pt")
    return tmp_path / "old.pt"


def state_dict(maps: dict[str, nn.Linear], teacher: str) -> dict[str, Tensor]:
    return {
        f"{kind}_adapters.{teacher}.{name}": tensor.detach()
        for kind, linear in maps.items()
        for name, tensor in linear.named_parameters()
    }


@pytest.mark.parametrize("options", [[], ["--per-layer", "--mlp-ratio", "0.5", "--dropout", "0.2"]])
def test_the_new_projector_gives_what_the_old_one_gave(
    old: Path, old_linear: dict[str, nn.Linear], tmp_path: Path, options: list[str]
) -> None:
    new = tmp_path / "deep" / "new"
    result = runner.invoke(app, ["migrate", str(old), str(new), "--teacher", "org/small-1.5=3", *options, "--json"])
    assert result.exit_code == 0, result.output
    projector = KVDimensionProjector.from_pretrained(new)
    x = torch.randn(2, 3, 7, 24)
    for given, linear in zip(
        projector.train().project_teacher_kv("org/small-1.5", x, x), old_linear.values(), strict=True
    ):
        torch.testing.assert_close(given, linear(x), atol=1e-6, rtol=0)
    told = json.loads(result.stdout)
    assert told["teachers"] == [{"name": "org/small-1.5", "width": 24, "num_layers": 3}]
    assert told["old_parameters"] == 2 * (24 * 10 + 10)
    assert told["new_parameters"] == projector.count_parameters()
    assert told["largest_difference"] < 1e-6
    assert projector.sharing == ("per_layer" if options else "shared")
    assert [path.name for path in new.parent.iterdir()] == ["new"]


def test_the_code_that_the_page_prints_trains_with_dropout(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = blocks(Path("docs/from-linear-projector.md"), "python")
    migrate_checkpoint(old, tmp_path / "projector", num_layers=3)
    monkeypatch.chdir(tmp_path)
    names = {
        "KVDimensionProjector": KVDimensionProjector,
        "AdamW": torch.optim.AdamW,
        "configs": {"t": {"d_model": 4, "num_layers": 1}},
        "student": nn.Linear(2, 2),
    }
    exec(compile(code, "<page>", "exec"), names)
    assert names["projector"].training
    assert [group["lr"] for group in names["optimizer"].param_groups] == [5e-5, 1e-3]


def test_a_difference_would_be_told(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(*arguments: object, **settings: object) -> KVDimensionProjector:
        projector = migrate_linear_checkpoint(*arguments, **settings)
        with torch.no_grad():
            projector.key_adapters[0].skip.bias += 0.5
        return projector

    from kvgraft.projector.migrate import migrate_linear_checkpoint

    monkeypatch.setattr("kvgraft.migration.migrate_linear_checkpoint", shifted)
    assert migrate_checkpoint(old, tmp_path / "new", num_layers=2).largest_difference == pytest.approx(0.5, abs=1e-5)


def test_half_precision_is_read_as_it_is(old_linear: dict[str, nn.Linear], tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in state_dict(old_linear, "t").items()}
    save_file(halves, tmp_path / "old.safetensors")
    assert migrate_checkpoint(tmp_path / "old.safetensors", tmp_path / "new", num_layers=2).largest_difference < 1e-6


def test_what_is_there_is_not_touched(old: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "projector.safetensors").write_bytes(b"mine")
    with pytest.raises(ProjectorError, match="exists already"):
        migrate_checkpoint(old, tmp_path / "new", num_layers=3)
    assert [path.read_bytes() for path in (tmp_path / "new").iterdir()] == [b"mine"]


def test_a_save_that_fails_leaves_nothing(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: KVDimensionProjector, folder: Path) -> None:
        folder.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(KVDimensionProjector, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        migrate_checkpoint(old, tmp_path / "new", num_layers=3)
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt"]


def test_layers_come_from_the_option_the_number_or_the_known_model() -> None:
    assert teacher_layers(["Qwen2-7B"]) == {"Qwen2-7B": ("Qwen2-7B", 28)}
    assert teacher_layers(["Qwen1_5-14B"]) == {"Qwen1_5-14B": ("Qwen1_5-14B", 40)}
    assert teacher_layers(["Qwen2-7B", "b"], num_layers=5) == {"Qwen2-7B": ("Qwen2-7B", 5), "b": ("b", 5)}
    assert teacher_layers(["x_y", "b"], ["x/y=2"], 5) == {"x/y": ("x_y", 2), "b": ("b", 5)}
    assert teacher_layers(["a=b"], ["a=b=4"]) == {"a=b": ("a=b", 4)}


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ([], r"how many layers .*--teacher 'mine=LAYERS'"),
        (["other=3"], "no teacher other; it has mine"),
        (["mine"], "NAME=LAYERS.*got 'mine'"),
        (["mine=0"], "got 'mine=0'"),
        (["=3"], "got '=3'"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(teachers: list[str], message: str) -> None:
    with pytest.raises(ProjectorError, match=message):
        teacher_layers(["mine"], teachers)


def test_help_teaches() -> None:
    output = " ".join(runner.invoke(app, ["migrate", "--help"], env={"COLUMNS": "120"}).output.split())
    for text in ("key_adapters.NAME.weight", "Example: kvgraft migrate old.pt", "from_pretrained", "1e-3"):
        assert text in output


def test_the_table_says_that_nothing_was_lost(old: Path, tmp_path: Path) -> None:
    output = runner.invoke(app, ["migrate", str(old), str(tmp_path / "new"), "--num-layers", "3"]).output
    assert "24 -> 10, 3 layers" in output
    assert "largest difference at step 0" in output


def test_a_ratio_that_is_no_number_is_refused(old: Path, tmp_path: Path) -> None:
    assert runner.invoke(app, ["migrate", str(old), str(tmp_path / "new"), "--mlp-ratio", "wide"]).exit_code == 2


def test_names_that_are_alike_without_their_signs_stay_apart(tmp_path: Path) -> None:
    assert teacher_layers(["模型", "教师"], ["模型=3", "教师=4"]) == {"模型": ("模型", 3), "教师": ("教师", 4)}
    assert teacher_layers(["a-b", "a_b"], ["a-b=2"], 5) == {"a-b": ("a-b", 2), "a_b": ("a_b", 5)}
    for found, teachers in ((["a_b"], ["a.b=2", "a-b=3"]), (["a_b"], ["a_b=2", "a_b=3"]), (["a-b", "a_b"], ["a.b=2"])):
        with pytest.raises(ProjectorError, match="a_b"):
            teacher_layers(found, teachers, 5)
    old = {
        f"{kind}_adapters.{name}.weight": torch.randn(4, 6) for kind in ("key", "value") for name in ("模型", "教师")
    }
    torch.save(old, tmp_path / "old.pt")
    migrate_checkpoint(tmp_path / "old.pt", tmp_path / "new", teachers=["模型=3", "教师=4"])
    projector = KVDimensionProjector.from_pretrained(tmp_path / "new")
    assert list(projector.teachers) == ["模型", "教师"]
    x = torch.randn(1, 3, 5, 6)
    keys, _ = projector.project_teacher_kv("模型", x, x)
    torch.testing.assert_close(keys, x @ old["key_adapters.模型.weight"].T)
