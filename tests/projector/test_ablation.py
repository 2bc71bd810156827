import time
from dataclasses import replace

import pytest
import torch

from kvgraft.errors import ProjectorError
from kvgraft.projector import ablation
from kvgraft.projector.ablation import (
    FROM_LEAST_SQUARES,
    GROUPS,
    LEAST_SQUARES,
    LINEAR,
    NO_NORM,
    OLD_LINEAR,
    RELU,
    STANDARD,
    ablate,
    build_adapter,
    measure_of,
    smoothed,
    solve_least_squares,
    steps_to_reach,
    target_variance,
    train_arm,
)
from kvgraft.projector.closed_form import DEFAULT_RIDGE, RIDGES, LeastSquares
from kvgraft.projector.scenario import AblationData, synthetic

# Wide and quick enough for eight channels; a norm would take away their length, which the targets follow.
ABLE = replace(STANDARD, mlp_ratio=8.0, learning_rate=1e-2, dropout=0.0, layer_norm=False)


@pytest.fixture
def layered() -> AblationData:
    """Two layers whose targets are two nonlinear images of the input: something to learn that generalises."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 600, 8, generator=generator)
    maps = torch.randn(2, 8, 5, generator=generator)
    y = torch.einsum("bltd,ldo->blto", x, maps)
    y = y + 2 * torch.relu(y) + torch.tensor([5.0, -5.0])[None, :, None, None]
    return AblationData(x[:, :, :400], y[:, :, :400], x[:, :, 400:], y[:, :, 400:], "two layers").standardised()


def test_every_group_of_the_issue_is_there() -> None:
    settings = {
        "width": {arm.mlp_ratio for arm in GROUPS["width"]},
        "layer_norm": {arm.layer_norm for arm in GROUPS["layer_norm"]},
        "activation": {arm.activation for arm in GROUPS["activation"]},
        "init": {(arm.init_method, arm.training) for arm in GROUPS["init"]},
        "learning_rate": {(arm.mlp_ratio, arm.learning_rate) for arm in GROUPS["learning_rate"]},
        "dropout": {arm.dropout for arm in GROUPS["dropout"]},
    }
    assert settings == {
        "width": {"linear", 0.5, 1.0, 2.0},
        "layer_norm": {True, False},
        "activation": {"silu", "relu", "gelu"},
        "init": {(name, "adam") for name in ("xavier", "kaiming", "normal")} | {("xavier", "from_least_squares")},
        "learning_rate": {("linear", 1e-4), ("linear", 1e-3), (1.0, 1e-4), (1.0, 1e-3)},
        "dropout": {0.05, 0.1, 0.15, 0.2},
    }
    assert {arm.learning_rate for arm in GROUPS["width"] if arm.mlp_ratio == "linear"} == {1e-4, 1e-3}
    assert len({arm.name for group in GROUPS.values() for arm in group}) == 16


def test_all_groups_over_seeds() -> None:
    result = ablate(lambda seed: synthetic(seed, 64), seeds=[0, 5], steps=3)
    assert len(result.arms) == 16
    assert all([run.seed for run in arm.runs] == [0, 5] for arm in result.arms)
    standard, linear = result.arm(STANDARD), result.arm(LINEAR)
    assert standard.runs[0].parameters == 80 * 80 + 80 * 24 + 80 + 24 + 2 * 80
    assert linear.runs[0].parameters == 80 * 24 + 24
    assert standard.measure("final_loss").deviation > 0
    assert len(standard.runs[0].curve) == 3
    assert linear.runs[0].dead_units is None
    assert result.arm(LEAST_SQUARES).runs[0].curve == []
    assert result.relative_time(linear).mean == 1
    assert result.relative_time(result.arm(LEAST_SQUARES)) is None
    assert (result.steps, result.batch_tokens, result.target_variance) == (3, 256, pytest.approx(1, abs=0.1))


def test_only_one_group_and_its_reference() -> None:
    result = ablate(lambda seed: synthetic(seed, 128), only=["activation"], seeds=[0], steps=1)
    assert [arm.name for arm in result.arms] == [STANDARD.name, "ReLU", "GELU", LINEAR.name]
    assert list(result.groups) == ["activation"]
    assert result.arm(OLD_LINEAR) is None


def test_the_same_seed_gives_the_same_losses_and_leaves_the_callers_random_state() -> None:
    data = synthetic(0, 64)
    torch.manual_seed(7)
    first = train_arm(STANDARD, data, 4, 64, seed=2)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), after)
    assert train_arm(STANDARD, data, 4, 64, seed=2).curve == first.curve
    assert train_arm(STANDARD, data, 4, 64, seed=3).curve != first.curve


def test_adapters_are_one_for_each_layer(layered: AblationData) -> None:
    adapter = build_adapter(STANDARD, layered, seed=0)
    assert adapter.num_layers == 2
    run = train_arm(ABLE, layered, 200, 128, seed=0)
    assert run.held_out_r2 > 0.8
    assert run.held_out_r2 == pytest.approx(1 - run.held_out_loss / target_variance(layered.held_out_y), abs=0.02)


def test_starting_from_least_squares_is_least_squares_at_step_zero(layered: AblationData) -> None:
    closed = train_arm(LEAST_SQUARES, layered, 10, 128, seed=0)
    started = train_arm(FROM_LEAST_SQUARES, layered, 200, 128, seed=0)
    assert started.first_loss == pytest.approx(closed.first_loss, rel=1e-5)
    assert closed.first_loss == closed.final_loss
    assert closed.steps is None
    # The targets bend, so that training has something to add, on held-out tokens too.
    assert started.held_out_loss < 0.8 * closed.held_out_loss
    weight, bias = solve_least_squares(layered)
    residual = torch.einsum("loi,blti->blto", weight.float(), layered.x) + bias.float()[:, None] - layered.y
    assert closed.final_loss == pytest.approx(residual.square().mean().item(), rel=1e-4)


def test_the_ridge_of_real_data_is_chosen() -> None:
    """Many channels, few tokens and noise: a strong ridge is best; random targets have nothing to choose it by."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 400, 64, generator=generator)
    y = 0.2 * x[..., :4] + torch.randn(1, 1, 400, 4, generator=generator)
    data = AblationData(x[:, :, :100], y[:, :, :100], x[:, :, 100:], y[:, :, 100:], "noise")
    chosen, fixed = (solve_least_squares(given)[0] for given in (data, replace(data, synthetic=True)))
    solver = LeastSquares(1, 64, 4)
    solver.add(data.x, data.y, torch.ones(1, 100, dtype=torch.bool))
    torch.testing.assert_close(chosen, solver.solve(max(RIDGES))[0])
    torch.testing.assert_close(fixed, solver.solve(DEFAULT_RIDGE)[0])


def test_least_squares_is_solved_once_for_data_that_all_seeds_share(
    layered: AblationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(ablation, "solve_least_squares", lambda data: calls.append(data) or solve_least_squares(data))
    ablate(lambda seed: layered, only=["init"], seeds=[0, 1], steps=1)
    assert len(calls) == 1
    ablate(lambda seed: synthetic(seed, 128), only=["init"], seeds=[0, 1], steps=1)
    assert len(calls) == 3


def test_dead_units_are_counted_after_training() -> None:
    """Inputs far below zero without a norm: most of ReLU's units die, none of SiLU's."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(1, 1, 64, 16, generator=generator) + 20, torch.randn(1, 1, 64, 4, generator=generator)
    data = AblationData(x, y, x, y, "far from zero")
    shares = {
        arm.activation: train_arm(arm, data, 1, 64, seed=0).dead_units
        for arm in (replace(RELU, layer_norm=False), NO_NORM)
    }
    assert shares["relu"] > 0.2
    assert shares["silu"] == 0


def test_a_diverged_run_counts_as_infinite_loss() -> None:
    data = synthetic(0, 128)
    huge = AblationData(data.x * 1e30, data.y, data.held_out_x * 1e30, data.held_out_y, "huge")
    run = train_arm(replace(LINEAR, learning_rate=1e9), huge, 3, 256, seed=0)
    assert run.final_loss == float("inf")
    assert run.held_out_r2 == -float("inf")


def test_steps_follow_the_stated_rule(layered: AblationData) -> None:
    run = train_arm(ABLE, layered, 200, 400, seed=0)
    bar = 0.1 * target_variance(layered.y)
    assert run.steps is not None
    assert run.curve[run.steps] <= bar < min(run.curve[: run.steps])
    assert train_arm(OLD_LINEAR, layered, 3, 400, seed=0).steps is None


def test_time_of_a_step_leaves_out_what_else_the_machine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 10.0, 10.25, 20.0, 29.0])
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    assert train_arm(LINEAR, synthetic(0, 128), 3, 256, seed=0).seconds_per_step == 0.25


def test_curves_are_smoothed_before_they_are_compared() -> None:
    assert smoothed([5, 3, 1]) == [5, 4, 3]
    assert smoothed([0, 0, 0, 0, 0, 10])[-1] == 2
    assert steps_to_reach([5, 3, 1, 1], 3) == 2
    assert steps_to_reach([5, 3, 1, 1], 1) is None


def test_measures() -> None:
    assert measure_of([1.0, 3.0]).model_dump() == {"mean": 2.0, "deviation": pytest.approx(2**0.5)}
    assert measure_of([2.0]).deviation is None
    assert measure_of([1.0, None]) is None
    assert measure_of([1.0, float("inf")]).model_dump() == {"mean": float("inf"), "deviation": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": ["widht"]}, "no ablation group widht; the groups are width, layer_norm"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, r"different whole numbers.*\[1, 1\]"),
        ({"seeds": [-1]}, "from 0 on"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(settings: dict, message: str) -> None:
    def fail(seed: int) -> AblationData:
        raise AssertionError("data was asked for")

    with pytest.raises(ProjectorError, match=message):
        ablate(fail, **settings)
