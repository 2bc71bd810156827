from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kvgraft.errors import ProjectorError
from kvgraft.projector.migrate import migrate_linear_checkpoint

CONFIGS = {"Qwen2.5-7B": {"d_model": 24, "num_layers": 3}, "org/b": {"d_model": 32, "num_layers": 3}}
STUDENT = 10


def old_maps() -> dict[str, dict[str, nn.Linear]]:
    """What the old projector held: one nn.Linear per teacher for keys and one for values."""
    return {
        name: {kind: nn.Linear(config["d_model"], STUDENT) for kind in ("key", "value")}
        for name, config in CONFIGS.items()
    }


def state_dict(maps: dict[str, dict[str, nn.Linear]], prefix: str = "", short: bool = False) -> dict[str, Tensor]:
    return {
        f"{prefix}{kind[0] if short else kind}_adapters.{name}.{part}": tensor.detach()
        for name, kinds in maps.items()
        for kind, linear in kinds.items()
        for part, tensor in linear.named_parameters()
    }


def assert_same_maps(projector, maps: dict[str, dict[str, nn.Linear]], exact: bool = True) -> None:
    for name, config in CONFIGS.items():
        keys, values = torch.randn(2, 2, 3, 5, config["d_model"]).unbind(0)
        for given, linear in zip(projector.project_teacher_kv(name, keys, values), maps[name].values(), strict=True):
            expected = linear(keys if linear is maps[name]["key"] else values)
            torch.testing.assert_close(given, expected, **({"atol": 0, "rtol": 0} if exact else {}))


@pytest.mark.parametrize("prefix", ["", "module.projector."])
@pytest.mark.parametrize("short", [False, True])
def test_step_zero_equals_the_old_maps(prefix: str, short: bool) -> None:
    maps = old_maps()
    projector = migrate_linear_checkpoint(state_dict(maps, prefix, short), CONFIGS, mlp_ratio=0.5)
    assert_same_maps(projector.train(), maps)
    assert projector.config["skip"] is True
    assert projector.config["mlp_ratio"] == 0.5


def test_from_a_safetensors_file(tmp_path: Path) -> None:
    maps = old_maps()
    save_file(state_dict(maps), tmp_path / "old.safetensors")
    assert_same_maps(migrate_linear_checkpoint(tmp_path / "old.safetensors", CONFIGS), maps)


def test_from_pairs_without_bias_and_per_layer() -> None:
    maps = old_maps()
    pairs = {name: {kind: (linear.weight, None) for kind, linear in kinds.items()} for name, kinds in maps.items()}
    for kinds in maps.values():
        for linear in kinds.values():
            nn.init.zeros_(linear.bias)
    projector = migrate_linear_checkpoint(pairs, CONFIGS, per_layer=True)
    assert projector.adapters("org/b")[0].num_layers == 3
    assert_same_maps(projector, maps, exact=False)


def test_names_that_lost_their_dots_are_found() -> None:
    maps = old_maps()
    renamed = {name.replace(".", "_").replace("/", "_"): kinds for name, kinds in maps.items()}
    assert_same_maps(migrate_linear_checkpoint(state_dict(renamed), CONFIGS), maps)


def test_one_old_teacher_does_not_serve_two() -> None:
    linear = (torch.zeros(4, 6), None)
    pairs = {"a_b": {"key": linear, "value": linear}, "c": {"key": linear, "value": linear}}
    config = {"d_model": 6, "num_layers": 1}
    with pytest.raises(ProjectorError, match="exactly those"):
        migrate_linear_checkpoint(pairs, {"a.b": config, "a_b": config})


def test_the_migrated_projector_learns() -> None:
    projector = migrate_linear_checkpoint(state_dict(old_maps()), CONFIGS)
    keys, values = projector.project_teacher_kv("org/b", torch.randn(1, 3, 4, 32), torch.randn(1, 3, 4, 32))
    (keys.square().sum() + values.square().sum()).backward()
    assert projector.adapters("org/b")[1].down.weight.grad.abs().max() > 0


@pytest.mark.parametrize("per_layer", [False, True])
def test_it_trains_on_to_less_than_the_best_of_the_old_map(per_layer: bool) -> None:
    """A target that bends: where the linear map was the best of its kind, the bottleneck goes below it."""
    torch.manual_seed(0)
    x, noise = torch.randn(1, 3, 200, 24), torch.randn(1, 3, 200, STUDENT)
    bend = torch.tanh(x @ torch.randn(24, STUDENT))
    rows, target = x.reshape(-1, 24), (bend + 0.01 * noise).reshape(-1, STUDENT)
    padded = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    best = torch.linalg.lstsq(padded, target).solution
    linear = (best[:-1].T.contiguous(), best[-1])
    projector = migrate_linear_checkpoint(
        {"t": {"key": linear, "value": linear}}, {"t": {"d_model": 24, "num_layers": 3}}, per_layer=per_layer
    )

    def loss() -> Tensor:
        return (projector.eval().project_teacher_kv("t", x, x)[0].reshape(-1, STUDENT) - target).square().mean()

    start = loss().item()
    assert start == pytest.approx((padded @ best - target).square().mean().item(), rel=1e-4)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.9 * start


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "old.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ProjectorError, match="damaged"):
        migrate_linear_checkpoint(tmp_path / "old.safetensors", CONFIGS)
    with pytest.raises(ProjectorError, match="no old checkpoint"):
        migrate_linear_checkpoint(tmp_path / "absent.safetensors", CONFIGS)
    (tmp_path / "old.npz").write_bytes(b"")
    with pytest.raises(ProjectorError, match=r"suffix '\.npz'.*\.safetensors"):
        migrate_linear_checkpoint(tmp_path / "old.npz", CONFIGS)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_from_a_state_dict_that_torch_saved(tmp_path: Path, suffix: str, zipped: bool) -> None:
    maps = old_maps()
    path = tmp_path / f"old{suffix}"
    torch.save(OrderedDict(state_dict(maps)), path, _use_new_zipfile_serialization=zipped)
    assert_same_maps(migrate_linear_checkpoint(path, CONFIGS), maps)


def test_the_state_dict_of_the_old_module_as_it_was_saved(tmp_path: Path) -> None:
    """One nn.Linear for keys and one for values per teacher, in module dicts; parameters and not bare tensors."""
    names = {"a": {"d_model": 24, "num_layers": 3}}
    old = nn.ModuleDict({f"{kind}_adapters": nn.ModuleDict({"a": nn.Linear(24, STUDENT)}) for kind in ("key", "value")})
    torch.save(dict(old.named_parameters()), tmp_path / "old.pt")
    projector = migrate_linear_checkpoint(tmp_path / "old.pt", names)
    x = torch.randn(2, 3, 5, 24)
    keys, values = projector.project_teacher_kv("a", x, x)
    torch.testing.assert_close(keys, old["key_adapters"]["a"](x), atol=1e-6, rtol=0)
    torch.testing.assert_close(values, old["value_adapters"]["a"](x), atol=1e-6, rtol=0)


class RunsCode:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    torch.save({**state_dict(old_maps()), "extra": RunsCode(tmp_path / "ran")}, tmp_path / "old.pt")
    with pytest.raises(ProjectorError, match=r"old\.pt is no state dict of tensors alone.*torch\.save"):
        migrate_linear_checkpoint(tmp_path / "old.pt", CONFIGS)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "old.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            nn.Linear(2, 2),
            r"no state dict of tensors alone.*GLOBAL torch\.nn\.modules\.linear\.Linear[^\x1b]*by default$",
        ),
        ([torch.zeros(2)], "holds a list and no state dict"),
        ({"state_dict": {"key_adapters.t.weight": torch.zeros(2, 2)}, "step": 3}, "no named tensors: state_dict, step"),
        ({1: torch.zeros(2, 2)}, "no named tensors: 1"),
    ],
)
def test_other_things_that_torch_saved_are_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "old.pt")
    with pytest.raises(ProjectorError, match=message):
        migrate_linear_checkpoint(tmp_path / "old.pt", CONFIGS)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_what_torch_cannot_read_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "old.pt").write_bytes(content)
    with pytest.raises(ProjectorError, match=r"old\.pt"):
        migrate_linear_checkpoint(tmp_path / "old.pt", CONFIGS)


def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    torch.save(state_dict(old_maps()), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "old.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ProjectorError, match="damaged"):
        migrate_linear_checkpoint(tmp_path / "old.pt", CONFIGS)


def test_incomplete_checkpoints_say_what_is_missing() -> None:
    weights = state_dict(old_maps())
    without_weight = {name: tensor for name, tensor in weights.items() if name != "value_adapters.org/b.weight"}
    with pytest.raises(ProjectorError, match=r"no value weight.*'org/b'"):
        migrate_linear_checkpoint(without_weight, CONFIGS)
    with pytest.raises(ProjectorError, match="exactly those"):
        migrate_linear_checkpoint(weights, {"org/b": CONFIGS["org/b"]})
    with pytest.raises(ProjectorError, match=r"student\.lm_head"):
        migrate_linear_checkpoint({**weights, "student.lm_head": torch.zeros(1)}, CONFIGS)
    with pytest.raises(ProjectorError, match="is empty"):
        migrate_linear_checkpoint({}, CONFIGS)
    with pytest.raises(ProjectorError, match=r"bias.*org/b"):
        migrate_linear_checkpoint({**weights, "key_adapters.org/b.bias": torch.zeros(3)}, CONFIGS)


def test_two_projectors_in_one_checkpoint_are_refused() -> None:
    average, weights = state_dict(old_maps(), "average."), state_dict(old_maps(), "model.")
    with pytest.raises(ProjectorError, match=r"more than one key weight.*'Qwen2\.5-7B'.*'model\.key_adapters"):
        migrate_linear_checkpoint({**average, **weights}, CONFIGS)
    biases = {name: tensor for name, tensor in weights.items() if name.endswith("bias")}
    with pytest.raises(ProjectorError, match=r"more than one key bias"):
        migrate_linear_checkpoint({**average, **biases}, CONFIGS)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("weight", torch.full((STUDENT, 32), float("nan")), "NaN"),
        ("bias", torch.full((STUDENT,), float("inf")), "infinity"),
        ("weight", torch.ones(STUDENT, 32, dtype=torch.int8), r"torch\.int8"),
    ],
)
def test_numbers_that_no_map_can_hold_are_refused(part: str, tensor: Tensor, message: str) -> None:
    weights = {**state_dict(old_maps()), f"value_adapters.org/b.{part}": tensor}
    with pytest.raises(ProjectorError, match=rf"old value {part} of teacher 'org/b'.*{message}"):
        migrate_linear_checkpoint(weights, CONFIGS)


def test_widths_that_do_not_fit_are_named() -> None:
    weights = state_dict(old_maps())
    with pytest.raises(ProjectorError, match=r"takes width 32.*says 40"):
        migrate_linear_checkpoint(weights, {**CONFIGS, "org/b": {"d_model": 40, "num_layers": 3}})
    weights["key_adapters.org/b.weight"], weights["key_adapters.org/b.bias"] = torch.zeros(9, 32), torch.zeros(9)
    with pytest.raises(ProjectorError, match=r"several widths: \[9, 10\]"):
        migrate_linear_checkpoint(weights, CONFIGS)
