"""The guide's verification of the upgrade from Linear to Elastic Bottleneck: ``python tests/verify_mlp_upgrade.py``.

Checks what can be checked (shapes, counts, LayerNorm, migration) and repeats the synthetic scenario behind the guide's
loss figures: random targets, 256 tokens, 40 steps (SPEC ruling R4). Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from kvgraft.projector.adapters import ElasticBottleneck, MlpRatio
from kvgraft.projector.closed_form import LeastSquares
from kvgraft.projector.migrate import migrate_linear_checkpoint
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.projector.sizing import adapter_parameters

TEACHER_WIDTH, STUDENT_WIDTH = 5120, 1536
TOKENS = 256
# Mean and deviation that the guide prints for Qwen-14B's KV.
INPUT_MEAN, INPUT_STD = 0.15, 1.2
# A run has converged where its loss first falls under this share of where it began.
CONVERGED = 0.1
GUIDE_MILLIONS: dict[MlpRatio, float] = {"linear": 7.86, 0.5: 17.0, 1.0: 34.1, 2.0: 68.2}
WARNING = (
    "The losses come from random targets for 256 tokens: they show how fast an adapter memorises noise and are "
    "not evidence about real models. Least squares, without training, is the baseline to beat there."
)


@dataclass(frozen=True)
class Arm:
    """One adapter of the scenario, and what the guide claims for it."""

    name: str
    mlp_ratio: MlpRatio
    learning_rate: float
    layer_norm: bool = True
    claimed_loss: str = ""
    claimed_steps: str = ""
    claimed_time: str = ""


@dataclass(frozen=True)
class Measured:
    """What training an arm gave: losses are mean squared errors, ``steps`` is None if it did not converge."""

    parameters: int
    first_loss: float
    final_loss: float
    steps: int | None
    seconds_per_step: float


@dataclass(frozen=True)
class Check:
    """One thing that has to hold."""

    name: str
    passed: bool
    detail: str


ARMS = (
    Arm("Linear, lr 1e-4", "linear", 1e-4, claimed_loss="6.09", claimed_steps="40+", claimed_time="1.0x"),
    Arm("Linear, lr 1e-3", "linear", 1e-3),
    Arm("MLP 0.5", 0.5, 1e-3, claimed_loss="0.12", claimed_steps="25", claimed_time="1.2x"),
    Arm("MLP 1.0", 1.0, 1e-3, claimed_loss="0.05", claimed_steps="15", claimed_time="1.5x"),
    Arm("MLP 2.0", 2.0, 1e-3, claimed_loss="0.03", claimed_steps="12", claimed_time="2.0x"),
    Arm("MLP 1.0, no norm", 1.0, 1e-3, layer_norm=False, claimed_loss="6.09"),
)


def scenario(in_dim: int, out_dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Input ``[1, 1, 256, in_dim]`` with the guide's statistics, and random targets ``[1, 1, 256, out_dim]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, TOKENS, in_dim, generator=generator) * INPUT_STD + INPUT_MEAN
    return x, torch.randn(1, 1, TOKENS, out_dim, generator=generator)


def train(arm: Arm, x: Tensor, target: Tensor, num_steps: int, seed: int) -> Measured:
    """Fit one arm with AdamW at its learning rate on the whole scenario at each step."""
    torch.manual_seed(seed)
    adapter = ElasticBottleneck(x.shape[-1], target.shape[-1], arm.mlp_ratio, layer_norm=arm.layer_norm)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=arm.learning_rate)
    losses, start = [], time.perf_counter()
    for _ in range(num_steps):
        loss = functional.mse_loss(adapter(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = (time.perf_counter() - start) / num_steps
    with torch.no_grad():
        final = functional.mse_loss(adapter.eval()(x), target).item()
    steps = next((step for step, loss in enumerate(losses) if loss < CONVERGED * losses[0]), None)
    return Measured(sum(p.numel() for p in adapter.parameters()), losses[0], final, steps, seconds)


def least_squares_loss(x: Tensor, target: Tensor) -> float:
    """Loss of the closed-form linear map on the same tokens."""
    solver = LeastSquares(1, x.shape[-1], target.shape[-1])
    solver.add(x, target, torch.ones(1, TOKENS, dtype=torch.bool))
    weight, bias = solver.solve()
    return functional.mse_loss(x[0, 0].double() @ weight[0].T + bias[0], target[0, 0].double()).item()


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


def scenario_table(in_dim: int, out_dim: int, num_steps: int, seed: int) -> Table:
    """Every arm's measurement beside the guide's claim."""
    x, target = scenario(in_dim, out_dim, seed)
    title = f"Synthetic scenario: {in_dim} to {out_dim}, {TOKENS} tokens, random targets, {num_steps} steps"
    caption = (
        "loss: mean squared error after the last step, without dropout; steps: until a tenth of the first loss; "
        f"time: per step, against the first row; guide: what it claims at {TEACHER_WIDTH} to {STUDENT_WIDTH}"
    )
    table = Table(title=title, caption=caption)
    for column in ("adapter", "params", "loss", "guide", "steps", "guide", "time", "guide"):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    measured = {arm: train(arm, x, target, num_steps, seed) for arm in ARMS}
    base = measured[ARMS[0]].seconds_per_step
    for arm, result in measured.items():
        table.add_row(
            arm.name,
            f"{result.parameters / 1e6:.3g}M",
            f"{result.final_loss:.3f}",
            arm.claimed_loss,
            f"{num_steps}+" if result.steps is None else str(result.steps),
            arm.claimed_steps,
            f"{result.seconds_per_step / base:.1f}x",
            arm.claimed_time,
        )
    parameters = adapter_parameters(in_dim, out_dim, "linear")
    closed_form = f"{least_squares_loss(x, target):.3f}"
    table.add_row("Least squares", f"{parameters / 1e6:.3g}M", closed_form, "", "none", "", "", "")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verification; returns the exit status."""
    parser = argparse.ArgumentParser(description="Verify the upgrade from Linear to Elastic Bottleneck.")
    parser.add_argument(
        "--width-divisor", type=int, default=8, help="divide 5120 and 1536 by this (1 for the guide's own widths)"
    )
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (the guide: 40)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not 1 <= options.width_divisor <= STUDENT_WIDTH or options.steps < 1:
        parser.error(f"--width-divisor must be 1 to {STUDENT_WIDTH} and --steps at least 1")
    console = Console()
    torch.manual_seed(options.seed)
    checks = run_checks()
    console.print(checks_table(checks))
    widths = TEACHER_WIDTH // options.width_divisor, STUDENT_WIDTH // options.width_divisor
    console.print(scenario_table(*widths, options.steps, options.seed))
    console.print(WARNING)
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
