"""The founding guide's snippets, run as printed, and its verification script."""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from experiments.kv_dimension_projector import KVDimensionProjector
from kvgraft.distill.losses import compute_kv_loss
from kvgraft.projector.adapters import ElasticBottleneck
from kvgraft.projector.sizing import auto_mlp_ratio

ROOT = Path(__file__).parents[2]
GUIDE = ROOT.parent / "shared" / "spec" / "elastic-bottleneck-guide.zh.md"

# The guide's runnable blocks without their comments, for a checkout that does not have the guide beside it.
COPY = [
    """projector = KVDimensionProjector(
    teacher_configs={"Qwen2-7B": {"d_model": 3584, "num_layers": 28}},
    student_d_model=2048, mlp_ratio=0.5, dropout=0.1, init_method="xavier", trainable=True
)""",
    """projector = KVDimensionProjector(
    teacher_configs={"Qwen2-14B": {"d_model": 5120, "num_layers": 40}},
    student_d_model=1536, mlp_ratio=1.0, dropout=0.1, init_method="xavier", trainable=True
)""",
    """projector = KVDimensionProjector(
    teacher_configs={"Llama-3-70B": {"d_model": 8192, "num_layers": 80}},
    student_d_model=2048, mlp_ratio=2.0, dropout=0.15, init_method="xavier", trainable=True
)""",
    """from experiments.kv_dimension_projector import KVDimensionProjector
teacher_configs = {
    "Qwen2-7B": {"d_model": 3584, "num_layers": 28},
    "Qwen2-14B": {"d_model": 5120, "num_layers": 40}
}
projector = KVDimensionProjector(
    teacher_configs=teacher_configs,
    student_d_model=2048, mlp_ratio=1.0, dropout=0.1, init_method="xavier", trainable=True
).to(device)
optimizer = AdamW([
    {'params': student_model.parameters(), 'lr': 5e-5},
    {'params': projector.parameters(), 'lr': 1e-3}
])
for batch in dataloader:
    aligned_kvs = projector.project_multi_teacher_kv(teacher_kvs)
    loss = compute_kv_loss(student_kv, aligned_kvs)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
""",
    "nn.LayerNorm(teacher_d_model)",
    'init_method="xavier"',
    'init_method="kaiming"',
    'init_method="normal"',
    """if teacher_d_model < 4096:
    mlp_ratio = 0.5
elif teacher_d_model < 6144:
    mlp_ratio = 1.0
else:
    mlp_ratio = 2.0
""",
    """projector = KVDimensionProjector(
    teacher_configs={
        "Qwen2-7B": {"d_model": 3584, "num_layers": 28},
        "Qwen2-14B": {"d_model": 5120, "num_layers": 40},
        "Qwen2-72B": {"d_model": 8192, "num_layers": 80}
    },
    student_d_model=2048, mlp_ratio=1.0
)""",
    """projector = KVDimensionProjector(
    teacher_configs=configs, student_d_model=2048, init_method="xavier", trainable=True
)""",
    """projector = KVDimensionProjector(
    teacher_configs=configs, student_d_model=2048, mlp_ratio=1.0, dropout=0.1, init_method="xavier", trainable=True
)""",
    """optimizer = AdamW([
    {'params': student.parameters(), 'lr': 5e-5},
    {'params': projector.parameters(), 'lr': 1e-3}
])""",
]
# The one block that is a formula and no Python.
FORMULA = "SiLU(x) = x * sigmoid(x)"

SMALL = {"3584": "24", "5120": "32", "2048": "16", "28": "3", "40": "3"}


def guide_blocks() -> list[str]:
    if not GUIDE.is_file():
        return COPY
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    return [block for block in blocks if block.strip() != FORMULA]


BLOCKS = guide_blocks()
CONSTRUCTIONS = [block for block in BLOCKS if "KVDimensionProjector(" in block and "for batch" not in block]
LOOP = next(block for block in BLOCKS if "for batch" in block)
OPTIMIZER = next(block for block in BLOCKS if block.lstrip("# \n").find("student.parameters()") >= 0)


def namespace(**names: Any) -> dict[str, Any]:
    """What the snippets take for granted."""
    return {
        "KVDimensionProjector": KVDimensionProjector,
        "AdamW": AdamW,
        "nn": nn,
        "compute_kv_loss": compute_kv_loss,
        "configs": {"Qwen2-7B": {"d_model": 3584, "num_layers": 28}},
        "teacher_d_model": 3584,
        **names,
    }


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "<guide>", "exec"), names)
    return names


def call_keywords(code: str) -> dict[str, Any]:
    """Keywords of the projector's construction as the text prints them, names left out."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    call = next(node for node in calls if getattr(node.func, "id", "") == "KVDimensionProjector")
    printed = {keyword.arg: keyword.value for keyword in call.keywords}
    return {name: ast.literal_eval(value) for name, value in printed.items() if not isinstance(value, ast.Name)}


def shrink(code: str) -> str:
    return re.sub(r"\b\d+\b", lambda match: SMALL.get(match[0], match[0]), code)


@pytest.mark.skipif(not GUIDE.is_file(), reason="the guide is not beside this checkout")
def test_the_kept_copy_says_what_the_guide_says() -> None:
    assert [ast.dump(ast.parse(block)) for block in BLOCKS] == [ast.dump(ast.parse(block)) for block in COPY]


def test_the_guide_has_the_snippets_that_we_run() -> None:
    assert len(CONSTRUCTIONS) == 6
    assert len(BLOCKS) == 13


@pytest.mark.parametrize("code", CONSTRUCTIONS, ids=range(len(CONSTRUCTIONS)))
def test_constructions_run_as_printed(code: str) -> None:
    with torch.device("meta"):
        projector = run(code, namespace())["projector"]
    printed = call_keywords(code)
    assert printed["student_d_model"] in (1536, 2048)
    assert {name: projector.config[name] for name in printed} == printed
    for name, config in projector.config["teacher_configs"].items():
        ratio = printed.get("mlp_ratio", 1.0)
        for adapter in projector.adapters(name):
            assert adapter.up.weight.shape == (1, int(config["d_model"] * ratio), config["d_model"])
            assert adapter.down.weight.shape == (1, printed["student_d_model"], int(config["d_model"] * ratio))


def test_training_snippet_sets_up_at_full_width() -> None:
    student = nn.Linear(2, 2)
    with torch.device("meta"):
        names = run(LOOP, namespace(device="meta", student_model=student, dataloader=[], teacher_kvs={}))
    assert [group["lr"] for group in names["optimizer"].param_groups] == [5e-5, 1e-3]
    assert names["projector"].adapters("Qwen2-14B")[0].in_dim == 5120


def test_training_snippet_trains_student_and_projector() -> None:
    """The printed text with smaller numbers; layers are mapped before, so both teachers bring the student's three."""
    torch.manual_seed(0)
    student, hidden = nn.Linear(6, 2 * 16), torch.randn(2, 3, 5, 6)
    distances: list[float] = []

    def recording_loss(student_kv: Any, aligned_kvs: Any) -> torch.Tensor:
        assert list(aligned_kvs) == ["Qwen2-7B", "Qwen2-14B"]
        assert all(tensor.shape == (2, 3, 5, 16) for pair in aligned_kvs.values() for tensor in pair)
        # Not the loss itself, which divides by the spread of a target that the guide's objective shrinks (SPEC R6).
        gaps = [own - aligned for pair in aligned_kvs.values() for own, aligned in zip(student_kv, pair, strict=True)]
        distances.append(torch.stack(gaps).square().mean().item())
        return compute_kv_loss(student_kv, aligned_kvs)

    def batches() -> Iterator[int]:
        for step in range(40):
            names["student_kv"] = student(hidden).chunk(2, dim=-1)
            yield step

    teacher_kvs = {
        name: tuple(torch.randn(2, 3, 5, width) for _ in range(2))
        for name, width in (("Qwen2-7B", 24), ("Qwen2-14B", 32))
    }
    names = namespace(
        device="cpu",
        student_model=student,
        dataloader=batches(),
        teacher_kvs=teacher_kvs,
        compute_kv_loss=recording_loss,
    )
    before = student.weight.detach().clone()
    run(shrink(LOOP), names)
    assert len(distances) == 40
    assert distances[-1] < 0.9 * distances[0]
    assert not torch.equal(student.weight, before)
    # A zero bias is where every adapter starts: one that moved has been trained.
    assert all(
        adapter.down.bias.abs().max() > 0 for name in teacher_kvs for adapter in names["projector"].adapters(name)
    )


def test_optimizer_snippet_takes_the_two_groups() -> None:
    projector = KVDimensionProjector({"t": {"d_model": 4, "num_layers": 1}}, 4)
    names = run(OPTIMIZER, namespace(student=nn.Linear(2, 2), projector=projector))
    groups = names["optimizer"].param_groups
    assert [group["lr"] for group in groups] == [5e-5, 1e-3]
    assert sum(parameter.numel() for parameter in groups[1]["params"]) == projector.count_parameters()


def test_printed_init_methods_are_settings() -> None:
    printed = [run(block, namespace())["init_method"] for block in BLOCKS if block.startswith("init_method=")]
    assert printed == ["xavier", "kaiming", "normal"]
    for init_method in printed:
        KVDimensionProjector({"t": {"d_model": 4, "num_layers": 1}}, 4, init_method=init_method)


def test_printed_ratio_rule_is_auto() -> None:
    rule = next(block for block in BLOCKS if "if teacher_d_model" in block)
    widths = [1, 3584, 4095, 4096, 5120, 6143, 6144, 8192]
    printed = [run(rule, namespace(teacher_d_model=width))["mlp_ratio"] for width in widths]
    assert printed == [auto_mlp_ratio(width) for width in widths]


@pytest.fixture
def verification(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("verify_mlp_upgrade", ROOT / "tests" / "verify_mlp_upgrade.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_verification_passes_and_disowns_its_numbers(
    verification: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert verification.main(["--width-divisor", "64", "--steps", "5"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "not evidence about real models" in printed
    assert "FAILED" not in printed
    for claim in ("6.09", "0.12", "0.05", "0.03", "80 to 24"):
        assert claim in printed


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("adapter_parameters", lambda *args, **kwargs: 1),
        ("migrate_linear_checkpoint", lambda state, configs: KVDimensionProjector(configs, 16)),
        ("ElasticBottleneck", lambda *args, layer_norm: SimpleNamespace(eval=lambda: lambda x: x)),
    ],
)
def test_verification_fails_where_the_upgrade_is_broken(
    verification: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any
) -> None:
    monkeypatch.setattr(verification, name, broken)
    assert not all(check.passed for check in verification.run_checks())


def test_verification_fails_where_the_bottleneck_does_not_beat_linear(
    verification: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same scenario with an Elastic Bottleneck that cannot learn."""
    monkeypatch.setattr("kvgraft.projector.ablation.ElasticBottleneck", FrozenBottleneck)
    monkeypatch.setenv("COLUMNS", "200")
    assert verification.main(["--width-divisor", "64", "--steps", "40"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(failed) == 3
    assert all("beats Linear, lr 1e-4" in line for line in failed)


class FrozenBottleneck(ElasticBottleneck):
    """Far from its target, and with no gradient to get there; a linear one is left alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out if self.mlp_ratio == "linear" else 10 + 0 * out
