"""The guide's ablations: adapters that differ in one setting, trained on the same tokens, over several seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional

from kvgraft.errors import ProjectorError
from kvgraft.progress import progress_bar
from kvgraft.projector.adapters import Activation, ElasticBottleneck, InitMethod, MlpRatio, dead_unit_share
from kvgraft.projector.closed_form import LeastSquares, solve_with_chosen_ridge
from kvgraft.projector.scenario import AblationData

# A run has converged where its loss is this share of what predicting the target's mean costs.
CONVERGED = 0.1
CONVERGENCE_RULE = (
    f"the first step whose training loss is at most {CONVERGED} of what predicting the target's mean costs"
)
# Steps over which a training loss is averaged before two arms are compared: dropout and batches make it jump.
SMOOTHING = 5
_DEAD_UNIT_TOKENS = 2048
# One fitting token in so many chooses the ridge of least squares.
_RIDGE_SHARE = 10
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Arm:
    """One adapter to train, in the guide's standard setting but for what its name says.

    ``training`` is ``adam`` (AdamW from ``init_method``), ``from_least_squares`` (AdamW from the closed-form map, in a
    skip beside the bottleneck) or ``closed_form`` (that map as it is, no step).
    """

    name: str
    mlp_ratio: MlpRatio = 1.0
    learning_rate: float = 1e-3
    layer_norm: bool = True
    activation: Activation = "silu"
    init_method: InitMethod = "xavier"
    dropout: float = 0.1
    training: Literal["adam", "from_least_squares", "closed_form"] = "adam"


STANDARD = Arm("MLP 1.0 (standard)")
OLD_LINEAR = Arm("Linear, lr 1e-4", "linear", learning_rate=1e-4)
LINEAR = Arm("Linear, lr 1e-3", "linear")
LEAST_SQUARES = Arm("least squares", "linear", training="closed_form")
OLD_RATE = Arm("MLP 1.0, lr 1e-4", learning_rate=1e-4)
HALF, DOUBLE = Arm("MLP 0.5", 0.5), Arm("MLP 2.0", 2.0)
NO_NORM = Arm("no LayerNorm", layer_norm=False)
RELU, GELU = Arm("ReLU", activation="relu"), Arm("GELU", activation="gelu")
KAIMING, NORMAL = Arm("kaiming", init_method="kaiming"), Arm("normal", init_method="normal")
FROM_LEAST_SQUARES = Arm("from least squares", training="from_least_squares")
DROPOUT_LOW, DROPOUT_MIDDLE, DROPOUT_HIGH = (Arm(f"dropout {rate}", dropout=rate) for rate in (0.05, 0.15, 0.2))

GROUPS: dict[str, tuple[Arm, ...]] = {
    "width": (OLD_LINEAR, LINEAR, HALF, STANDARD, DOUBLE, LEAST_SQUARES),
    "layer_norm": (STANDARD, NO_NORM),
    "activation": (STANDARD, RELU, GELU),
    "init": (STANDARD, KAIMING, NORMAL, FROM_LEAST_SQUARES),
    "learning_rate": (OLD_LINEAR, LINEAR, OLD_RATE, STANDARD),
    "dropout": (DROPOUT_LOW, STANDARD, DROPOUT_MIDDLE, DROPOUT_HIGH),
}


class ArmRun(BaseModel):
    """One arm with one seed. Losses are mean squared errors; those named first and final are without dropout.

    ``curve`` is the training loss of every step, with dropout, before the step. R2 is the mean over layers, against
    the held-out tokens' own mean. ``steps`` follows :data:`CONVERGENCE_RULE`, None where it was not reached.
    ``seconds_per_step`` is processor time, of the fastest step, None without any.
    """

    seed: int
    parameters: int
    first_loss: float
    final_loss: float
    held_out_loss: float
    held_out_r2: float
    steps: int | None
    seconds_per_step: float | None
    dead_units: float | None
    curve: list[float]


class Measure(BaseModel):
    """Mean over seeds, and the deviation between them (None with one seed or where it is not finite)."""

    mean: float
    deviation: float | None


class ArmResult(BaseModel):
    """An arm over all seeds."""

    name: str
    runs: list[ArmRun]

    def measure(self, field: str) -> Measure | None:
        """A field of :class:`ArmRun` over seeds; None where a seed has none."""
        return measure_of([getattr(run, field) for run in self.runs])


class Ablation(BaseModel):
    """Everything that :func:`ablate` measured; ``groups`` names the arms of each."""

    source: str
    synthetic: bool
    num_layers: int
    in_dim: int
    out_dim: int
    tokens: int
    held_out_tokens: int
    steps: int
    batch_tokens: int
    seeds: list[int]
    target_variance: float
    groups: dict[str, list[str]]
    arms: list[ArmResult]

    def arm(self, arm: Arm) -> ArmResult | None:
        """The result of ``arm``, or None if its group was not run."""
        return next((result for result in self.arms if result.name == arm.name), None)

    def relative_time(self, result: ArmResult) -> Measure | None:
        """Processor time of a step over that of a linear layer with the same seed."""
        linear = self.arm(LINEAR)
        if linear is None:
            return None
        pairs = zip(result.runs, linear.runs, strict=True)
        return measure_of(
            [
                run.seconds_per_step / base.seconds_per_step if run.seconds_per_step and base.seconds_per_step else None
                for run, base in pairs
            ]
        )


def ablate(
    data_of_seed: Callable[[int], AblationData],
    *,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 40,
    batch_tokens: int = 1024,
) -> Ablation:
    """Train every arm of the groups once per seed and measure it.

    Args:
        data_of_seed: the data of a seed; real KV is the same for all of them.
        only: names in :data:`GROUPS`, default all. The linear layer is trained anyway: times are relative to it.
        seeds: of weights, batches and dropout, and of synthetic data.
        steps: of AdamW.
        batch_tokens: tokens of a step, the same for every layer; all of them where there are no more.

    Raises:
        ProjectorError: an unknown group, no seed or a repeated one, or fewer than one step or token.
    """
    groups = _chosen(only)
    _require_settings(seeds, steps, batch_tokens)
    arms = list(dict.fromkeys([*(arm for group in groups.values() for arm in group), LINEAR]))
    runs: dict[Arm, list[ArmRun]] = {arm: [] for arm in arms}
    data, solved = None, None
    with progress_bar("ablations", len(arms) * len(seeds) * steps, "steps") as advance:
        for seed in seeds:
            given = data_of_seed(seed)
            if given is not data:
                data, solved = given, None
            for arm in arms:
                if arm.training != "adam":
                    solved = solved or solve_least_squares(data)
                advance(0, f"{arm.name}, seed {seed}")
                runs[arm].append(train_arm(arm, data, steps, batch_tokens, seed, solved, lambda: advance(1)))
                if arm.training == "closed_form":
                    advance(steps)
    assert data is not None
    return Ablation(
        source=data.source,
        synthetic=data.synthetic,
        num_layers=data.num_layers,
        in_dim=data.x.shape[3],
        out_dim=data.y.shape[3],
        tokens=data.x.shape[2],
        held_out_tokens=data.held_out_x.shape[2],
        steps=steps,
        batch_tokens=min(batch_tokens, data.x.shape[2]),
        seeds=list(seeds),
        target_variance=target_variance(data.y),
        groups={name: [arm.name for arm in group] for name, group in groups.items()},
        arms=[ArmResult(name=arm.name, runs=runs[arm]) for arm in arms],
    )


def train_arm(
    arm: Arm,
    data: AblationData,
    steps: int,
    batch_tokens: int,
    seed: int,
    solved: tuple[Tensor, Tensor] | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> ArmRun:
    """Train one arm with AdamW, one adapter per layer of ``data``.

    Args:
        solved: what :func:`solve_least_squares` gave, for the arms that start from it; computed where it is missing.
        after_step: called after every step.
    """
    adapter = build_adapter(arm, data, seed, solved)
    first_loss = _errors(adapter, data.x, data.y)[0]
    curve: list[float] = []
    seconds = None
    if arm.training != "closed_form":
        curve, seconds = _train(adapter, arm.learning_rate, data, steps, batch_tokens, seed, after_step)
    held_out_loss, held_out_r2 = _errors(adapter, data.held_out_x, data.held_out_y)
    bar = CONVERGED * target_variance(data.y)
    calibration = data.x[:, :, :_DEAD_UNIT_TOKENS]
    return ArmRun(
        seed=seed,
        parameters=sum(parameter.numel() for parameter in adapter.parameters()),
        first_loss=first_loss,
        final_loss=_errors(adapter, data.x, data.y)[0],
        held_out_loss=held_out_loss,
        held_out_r2=held_out_r2,
        steps=next((step for step, loss in enumerate(curve) if loss <= bar), None),
        seconds_per_step=seconds,
        dead_units=None if arm.mlp_ratio == "linear" else dead_unit_share(adapter, calibration),
        curve=curve,
    )


def build_adapter(
    arm: Arm, data: AblationData, seed: int, solved: tuple[Tensor, Tensor] | None = None
) -> ElasticBottleneck:
    """The adapter of ``arm`` before its first step, one map per layer of ``data``."""
    from_least_squares = arm.training != "adam"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = ElasticBottleneck(
            data.x.shape[3],
            data.y.shape[3],
            mlp_ratio=arm.mlp_ratio,
            dropout=arm.dropout,
            init_method=arm.init_method,
            num_layers=data.num_layers,
            layer_norm=arm.layer_norm,
            activation=arm.activation,
            skip=from_least_squares and arm.mlp_ratio != "linear",
        )
    if from_least_squares:
        adapter.load_linear(*(solved or solve_least_squares(data)))
    return adapter


def solve_least_squares(data: AblationData) -> tuple[Tensor, Tensor]:
    """Weights ``[layers, out_dim, in_dim]`` and biases ``[layers, out_dim]`` of the best linear maps.

    The ridge of each is chosen on the last of the fitting tokens. Random targets have nothing to choose it by.
    """
    cut = data.x.shape[2]
    if not data.synthetic:
        cut -= cut // _RIDGE_SHARE
    solver, chooser = (LeastSquares(data.num_layers, data.x.shape[3], data.y.shape[3]) for _ in range(2))
    for equations, part in ((solver, slice(cut)), (chooser, slice(cut, None))):
        x, y = data.x[:, :, part], data.y[:, :, part]
        equations.add(x, y, torch.ones(1, x.shape[2], dtype=torch.bool))
    return solve_with_chosen_ridge(solver, chooser)


def target_variance(y: Tensor) -> float:
    """What predicting each channel's mean costs on ``y [1, layers, tokens, out_dim]``, as a mean squared error."""
    return (y - y.mean(2, keepdim=True)).square().mean().item()


def steps_to_reach(curve: Sequence[float], loss: float) -> int | None:
    """The first step at which the running mean of a training loss is at most ``loss``; None if there is none."""
    return next((step for step, value in enumerate(smoothed(curve)) if value <= loss), None)


def smoothed(curve: Sequence[float]) -> list[float]:
    """Mean of each loss and those of the :data:`SMOOTHING` - 1 steps before it."""
    return [mean(curve[max(0, step + 1 - SMOOTHING) : step + 1]) for step in range(len(curve))]


def measure_of(values: Sequence[float | None]) -> Measure | None:
    """Mean and deviation; None where a value is missing."""
    known = [float(value) for value in values if value is not None]
    if not known or len(known) != len(values):
        return None
    finite = all(abs(value) < float("inf") for value in known)
    return Measure(mean=mean(known), deviation=stdev(known) if finite and len(known) > 1 else None)


def _train(
    adapter: ElasticBottleneck,
    learning_rate: float,
    data: AblationData,
    steps: int,
    batch_tokens: int,
    seed: int,
    after_step: Callable[[], None],
) -> tuple[list[float], float]:
    """Training losses, and the processor time of the fastest step: a busy machine stretches any other measure."""
    optimizer = torch.optim.AdamW(adapter.train().parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    curve, seconds = [], []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(steps):
            x, y = _batch(data, batch_tokens, generator)
            start = time.process_time()
            loss = functional.mse_loss(adapter(x), y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            curve.append(_finite(loss.item()))
            seconds.append(time.process_time() - start)
            after_step()
    adapter.eval()
    return curve, min(seconds)


def _batch(data: AblationData, batch_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = data.x.shape[2]
    if tokens <= batch_tokens:
        return data.x, data.y
    index = torch.randint(tokens, (batch_tokens,), generator=generator)
    return data.x[:, :, index], data.y[:, :, index]


@torch.no_grad()
def _errors(adapter: ElasticBottleneck, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean squared error, and R2 averaged over layers, without dropout."""
    adapter.eval()
    residual = torch.zeros(x.shape[1], dtype=torch.float64)
    for start in range(0, x.shape[2], _ROWS_AT_ONCE):
        chunk_x, chunk_y = (tensor[:, :, start : start + _ROWS_AT_ONCE] for tensor in (x, y))
        residual += (adapter(chunk_x) - chunk_y).double().square().sum((0, 2, 3))
    total = (y - y.mean(2, keepdim=True)).double().square().sum((0, 2, 3))
    r2 = (1 - residual / total.clamp_min(1e-30)).mean().item()
    return _finite(residual.sum().item() / y.numel()), -_finite(-r2)


def _finite(loss: float) -> float:
    """Losses that came out as NaN are infinite: training diverged."""
    return loss if loss == loss else float("inf")


def _chosen(only: Sequence[str]) -> dict[str, tuple[Arm, ...]]:
    unknown = [name for name in only if name not in GROUPS]
    if unknown:
        raise ProjectorError(f"no ablation group {', '.join(unknown)}; the groups are {', '.join(GROUPS)}")
    return {name: arms for name, arms in GROUPS.items() if name in only or not only}


def _require_settings(seeds: Sequence[int], steps: int, batch_tokens: int) -> None:
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ProjectorError(f"seeds must be different whole numbers from 0 on, at least one; got {list(seeds)}")
    for name, value in (("steps", steps), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise ProjectorError(f"{name} must be at least 1; got {value}")
