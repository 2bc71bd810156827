"""The guide's verification of the upgrade from Linear to Elastic Bottleneck: ``python tests/verify_mlp_upgrade.py``.

Checks what can be checked (shapes, counts, LayerNorm, migration) and repeats the synthetic scenario behind the guide's
loss figures: random targets, 256 tokens, 40 steps (SPEC ruling R4). Exits with 1 if a check fails, one of which is that
on this scenario the Elastic Bottleneck beats the linear layer it replaces. `kvgraft ablate` does the same over seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from kvgraft.projector.ablation import DOUBLE, HALF, OLD_LINEAR, STANDARD, Ablation, ablate
from kvgraft.projector.adapters import ElasticBottleneck, MlpRatio
from kvgraft.projector.claims import judge
from kvgraft.projector.migrate import migrate_linear_checkpoint
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.projector.scenario import STEPS, STUDENT_WIDTH, SYNTHETIC_WARNING, TEACHER_WIDTH, synthetic
from kvgraft.projector.sizing import adapter_parameters
from kvgraft.report.ablation import ablation_report, ablation_tables

GUIDE_MILLIONS: dict[MlpRatio, float] = {"linear": 7.86, 0.5: 17.0, 1.0: 34.1, 2.0: 68.2}


@dataclass(frozen=True)
class Check:
    """One thing that has to hold."""

    name: str
    passed: bool
    detail: str


def run_checks() -> list[Check]:
    """Shapes, parameter counts, LayerNorm on and off, and migration."""
    return [check_shapes(), *check_counts(), check_layer_norm(), check_migration()]


def check_shapes() -> Check:
    """Both input layouts of two teachers come out in the student's width, names with dots included."""
    configs = {"Qwen2.5-7B": {"d_model": 24, "num_layers": 2}, "Qwen2-14B": {"d_model": 32, "num_layers": 3}}
    projector = KVDimensionProjector(configs, 16)
    joined, with_heads = torch.randn(2, 2, 5, 24), torch.randn(2, 3, 4, 5, 8)
    projected = projector.project_multi_teacher_kv(
        {"Qwen2.5-7B": (joined, joined), "Qwen2-14B": (with_heads, with_heads)}
    )
    shapes = [tuple(tensor.shape) for pair in projected.values() for tensor in pair]
    expected = [(2, 2, 5, 16)] * 2 + [(2, 3, 5, 16)] * 2
    return Check("shapes", shapes == expected, f"{shapes}")


def check_counts() -> list[Check]:
    """Weight matrices at the guide's full widths, in millions, and the sum over teachers, keys and values."""
    checks = []
    for ratio, millions in GUIDE_MILLIONS.items():
        counted = adapter_parameters(TEACHER_WIDTH, STUDENT_WIDTH, ratio, weights_only=True)
        detail = f"{counted / 1e6:.2f}M in weight matrices, the guide says {millions}M"
        checks.append(Check(f"parameters, {ratio}", abs(counted / 1e6 - millions) < 0.06, detail))
    configs = {name: {"d_model": TEACHER_WIDTH, "num_layers": 40} for name in ("a", "b")}
    with torch.device("meta"):
        total = KVDimensionProjector(configs, STUDENT_WIDTH).count_parameters()
    expected = adapter_parameters(TEACHER_WIDTH, STUDENT_WIDTH, 1.0) * len(configs) * 2
    return [*checks, Check("parameters, two teachers", total == expected, f"{total:,} = one adapter x 2 x 2 (K and V)")]


def check_layer_norm() -> Check:
    """With LayerNorm a teacher's scale does not reach the student; without, it does."""
    x = torch.randn(1, 1, 8, 64)
    moved = {}
    for layer_norm in (True, False):
        adapter = ElasticBottleneck(64, 16, layer_norm=layer_norm).eval()
        with torch.no_grad():
            moved[layer_norm] = (adapter(10 * x) - adapter(x)).abs().mean().item()
    passed = moved[True] < 1e-3 < moved[False]
    detail = f"input x10 moves the output by {moved[True]:.1e} with it, {moved[False]:.1e} without"
    return Check("LayerNorm on and off", passed, detail)


def check_migration() -> Check:
    """An old linear checkpoint gives the same output to the bit after the upgrade."""
    old = {kind: nn.Linear(24, 16) for kind in ("key", "value")}
    state = {f"{kind}_adapters.t.{name}": p.detach() for kind in old for name, p in old[kind].named_parameters()}
    projector = migrate_linear_checkpoint(state, {"t": {"d_model": 24, "num_layers": 2}})
    x = torch.randn(2, 2, 5, 24)
    keys, values = projector.project_teacher_kv("t", x, x)
    same = torch.equal(keys, old["key"](x)) and torch.equal(values, old["value"](x))
    return Check("migration", same, "the old linear map is the new projector's output at step 0")


def checks_table(checks: Sequence[Check]) -> Table:
    """The checks and how they went."""
    table = Table("check", "result", "detail", title="What has to hold")
    for check in checks:
        table.add_row(check.name, "[green]ok[/]" if check.passed else "[red]FAILED[/]", check.detail)
    return table


def check_scenario(measured: Ablation) -> list[Check]:
    """After the guide's steps every Elastic Bottleneck is below the linear layer at its old learning rate."""
    old = measured.arm(OLD_LINEAR)
    assert old is not None
    checks = []
    for arm in (HALF, STANDARD, DOUBLE):
        result = measured.arm(arm)
        assert result is not None
        pairs = list(zip(result.runs, old.runs, strict=True))
        detail = ", ".join(f"{new.final_loss:.3f} against {linear.final_loss:.3f}" for new, linear in pairs)
        passed = all(new.final_loss < linear.final_loss for new, linear in pairs)
        checks.append(Check(f"{arm.name} beats {OLD_LINEAR.name} after {measured.steps} steps", passed, detail))
    return checks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verification; returns the exit status."""
    parser = argparse.ArgumentParser(description="Verify the upgrade from Linear to Elastic Bottleneck.")
    parser.add_argument(
        "--width-divisor", type=int, default=8, help="divide 5120 and 1536 by this (1 for the guide's own widths)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (the guide: 40)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not 1 <= options.width_divisor <= STUDENT_WIDTH or options.steps < 1:
        parser.error(f"--width-divisor must be 1 to {STUDENT_WIDTH} and --steps at least 1")
    console = Console()
    torch.manual_seed(options.seed)
    measured = ablate(
        lambda seed: synthetic(seed, options.width_divisor),
        only=["width", "layer_norm"],
        seeds=[options.seed],
        steps=options.steps,
    )
    console.print(*ablation_tables(ablation_report(measured, judge(measured))), sep="\n")
    console.print(SYNTHETIC_WARNING)
    checks = [*run_checks(), *check_scenario(measured)]
    console.print(checks_table(checks))
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
