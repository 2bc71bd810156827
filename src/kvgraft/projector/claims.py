"""What the founding guide claims of the Elastic Bottleneck, each decided from an ablation by a stated rule."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

from kvgraft.projector.ablation import (
    DOUBLE,
    DROPOUT_HIGH,
    DROPOUT_LOW,
    GELU,
    HALF,
    KAIMING,
    LEAST_SQUARES,
    LINEAR,
    NO_NORM,
    OLD_LINEAR,
    OLD_RATE,
    RELU,
    STANDARD,
    Ablation,
    Arm,
    smoothed,
)
from kvgraft.projector.scenario import STEPS, STUDENT_WIDTH, TEACHER_WIDTH
from kvgraft.projector.sizing import adapter_parameters
from kvgraft.projector.verdicts import (
    TOLERANCE,
    Judgement,
    beats,
    deviation_of,
    faster,
    loss_field,
    losses,
    of_seeds,
    ratio,
    speed_up,
    times,
    value_of,
    verdict_of,
    within,
    words,
)

# "99 %+": the share of the loss that LayerNorm may leave, with the same tolerance.
_LEFT_BY_NORM = 0.01 * TOLERANCE
# Dead units below this share of the hidden ones are chance.
_DEAD = 1e-3


@dataclass(frozen=True)
class BenchmarkRow:
    """One row of the guide's benchmark; ``steps`` None is "40+"."""

    arm: Arm
    millions: float
    loss: float
    steps: float | None
    time: float


BENCHMARK = (
    BenchmarkRow(OLD_LINEAR, 7.9, 6.09, None, 1.0),
    BenchmarkRow(HALF, 17.0, 0.12, 25, 1.2),
    BenchmarkRow(STANDARD, 34.0, 0.05, 15, 1.5),
    BenchmarkRow(DOUBLE, 68.0, 0.03, 12, 2.0),
)


def judge(ablation: Ablation) -> list[Judgement]:
    """Every claim whose arms were run, in the guide's order; counts are computed and always there."""
    claims = [
        *_layer_norm(ablation),
        *_activations(ablation),
        *_initialisations(ablation),
        *_dropout(ablation),
        *(judged for row in BENCHMARK for judged in _benchmark_row(ablation, row)),
        *_width_order(ablation),
        *_surpassed(ablation),
        *_learning_rate(ablation),
        *_migration(ablation),
    ]
    return [*claims, *_computed()]


def _layer_norm(ablation: Ablation) -> list[Judgement]:
    with_norm, without = ablation.arm(STANDARD), ablation.arm(NO_NORM)
    if with_norm is None or without is None:
        return []
    pairs = list(zip(with_norm.runs, without.runs, strict=True))
    left = [ratio(a.final_loss, b.final_loss) for a, b in pairs]
    held_out = [ratio(a.held_out_loss, b.held_out_loss) for a, b in pairs]
    measured = f"final training loss {losses(with_norm)} with, {losses(without)} without"
    reach = f"{1 - mean(left):.0%} lower in training, {1 - mean(held_out):.0%} on held-out tokens"
    return [
        Judgement(
            claim="LayerNorm takes 99 % of the loss away",
            guide="6.09 without, 0.05 with",
            measured=f"{measured}: {reach}",
            verdict=verdict_of(max(left) <= _LEFT_BY_NORM),
            why=f"reproduced where at most {_LEFT_BY_NORM:.1%} of the final training loss is left in every seed",
        ),
        Judgement(
            claim="without LayerNorm the loss is 10 times as high (the log template)",
            guide="10x",
            measured=times([1 / value if value else float("inf") for value in left]),
            verdict=verdict_of(max(left) <= TOLERANCE / 10),
            why=f"reproduced where it is at least {10 / TOLERANCE:.1f}x in every seed",
        ),
    ]


def _activations(ablation: Ablation) -> list[Judgement]:
    silu, relu, gelu = (ablation.arm(arm) for arm in (STANDARD, RELU, GELU))
    if silu is None or relu is None or gelu is None:
        return []
    dead = {result.name: result.measure("dead_units") for result in (silu, relu, gelu)}
    relu_dead, silu_dead = (value_of(dead[result.name]) for result in (relu, silu))
    shares = ", ".join(f"{name} {value_of(share):.2%}" for name, share in dead.items())
    gelu_slower, relu_slower = faster(silu, gelu), faster(silu, relu)
    deviations = {result.name: deviation_of(result.measure("final_loss")) for result in (silu, relu, gelu)}
    spread = ", ".join(f"{name} {deviation:.2g}" for name, deviation in deviations.items())
    spread = spread if len(ablation.seeds) > 1 else "unknown of one seed"
    several = len(ablation.seeds) > 2
    return [
        Judgement(
            claim="some ReLU units die",
            guide="yes",
            measured=f"dead hidden units after training: {shares}",
            verdict=verdict_of(relu_dead > _DEAD and relu_dead > silu_dead),
            why=f"reproduced where over {_DEAD:.1%} of ReLU's units give 0 on every token, and more than of SiLU's",
        ),
        Judgement(
            claim="GELU converges a little slower than SiLU",
            guide="yes",
            measured=f"SiLU gets to GELU's final training loss first in {of_seeds(gelu_slower)}",
            verdict=verdict_of(all(gelu_slower)),
            why="reproduced where SiLU is there in fewer steps in every seed",
        ),
        Judgement(
            claim="SiLU converges fastest",
            guide="yes",
            measured=f"ahead of GELU in {of_seeds(gelu_slower)}, of ReLU in {of_seeds(relu_slower)}",
            verdict=verdict_of(all([*gelu_slower, *relu_slower])),
            why="reproduced where SiLU gets to either's final training loss in fewer steps in every seed",
        ),
        Judgement(
            claim="SiLU is the most stable",
            guide="yes",
            measured=f"deviation of the final training loss between seeds: {spread}",
            verdict=verdict_of(deviations[silu.name] < min(deviations[relu.name], deviations[gelu.name]), several),
            why="reproduced where SiLU's is the smallest" if several else "needs at least three seeds",
        ),
    ]


def _initialisations(ablation: Ablation) -> list[Judgement]:
    xavier, kaiming = ablation.arm(STANDARD), ablation.arm(KAIMING)
    if xavier is None or kaiming is None:
        return []
    ahead = faster(kaiming, xavier)
    return [
        Judgement(
            claim="kaiming converges a little faster than xavier",
            guide="yes",
            measured=f"kaiming gets to xavier's final training loss first in {of_seeds(ahead)}; final training loss "
            f"{losses(kaiming)} against {losses(xavier)}",
            verdict=verdict_of(all(ahead)),
            why="reproduced where kaiming is there in fewer steps in every seed",
        )
    ]


def _dropout(ablation: Ablation) -> list[Judgement]:
    low, high = ablation.arm(DROPOUT_LOW), ablation.arm(DROPOUT_HIGH)
    if low is None or high is None:
        return []
    better = [b.held_out_loss < a.held_out_loss for a, b in zip(low.runs, high.runs, strict=True)]
    return [
        Judgement(
            claim="on little data dropout 0.2 guards against overfitting",
            guide="0.2 under 10K samples, 0.05 over 100K",
            measured=f"held-out loss {losses(high, 'held_out_loss')} at 0.2, {losses(low, 'held_out_loss')} at 0.05",
            verdict=verdict_of(all(better), not ablation.synthetic),
            why="held-out tokens of random targets hold nothing that could be learned"
            if ablation.synthetic
            else "reproduced where 0.2 has the lower held-out loss in every seed",
        )
    ]


def _benchmark_row(ablation: Ablation, row: BenchmarkRow) -> list[Judgement]:
    """The guide's final losses, steps and speeds, which hold for its own widths and steps alone."""
    result = ablation.arm(row.arm)
    if result is None:
        return []
    obstacle = _not_the_guides(ablation)
    final, relative = value_of(result.measure("final_loss")), ablation.relative_time(result)
    reached = [float("inf") if run.steps is None else run.steps for run in result.runs]
    converged = min(reached) >= STEPS if row.steps is None else within(mean(reached), row.steps)
    tolerance = f"reproduced within a factor of {TOLERANCE}"
    return [
        Judgement(
            claim=f"{row.arm.name}: final loss",
            guide=f"{row.loss}",
            measured=losses(result),
            verdict=verdict_of(within(final, row.loss), not obstacle),
            why=obstacle or tolerance,
        ),
        Judgement(
            claim=f"{row.arm.name}: steps to converge",
            guide=f"{STEPS}+" if row.steps is None else f"{row.steps:g}",
            measured=", ".join("none" if run.steps is None else str(run.steps) for run in result.runs) + " (by seed)",
            verdict=verdict_of(converged, not obstacle),
            why=obstacle or (tolerance if row.steps else f"reproduced where no seed converges in {STEPS}"),
        ),
        Judgement(
            claim=f"{row.arm.name}: time of a step, Linear = 1",
            guide=f"{row.time}x",
            measured="-" if relative is None else f"{relative.mean:.1f}x",
            verdict=verdict_of(relative is not None and within(relative.mean, row.time), not obstacle),
            why=obstacle or f"{tolerance}; its column says speed, which cannot rise with four times the weights",
        ),
    ]


def _width_order(ablation: Ablation) -> list[Judgement]:
    found = [result for row in BENCHMARK if (result := ablation.arm(row.arm))]
    if len(found) != len(BENCHMARK):
        return []
    field = loss_field(ablation)
    by_seed = list(zip(*([getattr(run, field) for run in result.runs] for result in found), strict=True))
    falls = [all(narrow > wide for narrow, wide in pairwise(row)) for row in by_seed]
    return [
        Judgement(
            claim="the wider, the lower the loss",
            guide="6.09 > 0.12 > 0.05 > 0.03",
            measured=" > ".join(losses(result, field) for result in found) + f": so in {of_seeds(falls)}",
            verdict=verdict_of(all(falls)),
            why=f"reproduced where the {words(field)} falls at every widening in every seed",
        )
    ]


def _surpassed(ablation: Ablation) -> list[Judgement]:
    elastic = [result for arm in (HALF, STANDARD, DOUBLE) if (result := ablation.arm(arm))]
    maps = [result for arm in (OLD_LINEAR, LINEAR, LEAST_SQUARES) if (result := ablation.arm(arm))]
    if len(elastic) + len(maps) != 6:
        return []
    field = loss_field(ablation)
    old = maps[0]
    beats_old = beats(elastic, [old], field)
    beats_all = beats(elastic, maps, field)
    lowest = min(maps, key=lambda result: value_of(result.measure(field)))
    shown = ", ".join(f"{result.name} {losses(result, field)}" for result in elastic)
    return [
        Judgement(
            claim="every MLP beats the old linear projector at its learning rate",
            guide="6.09 against 0.12, 0.05, 0.03",
            measured=f"{words(field)}: {old.name} {losses(old, field)}; {shown}",
            verdict=verdict_of(all(beats_old)),
            why=f"reproduced where the {words(field)} of all three is below it in every seed",
        ),
        Judgement(
            claim="Linear is fully surpassed",
            guide="not recommended any more",
            measured=f"the best linear map is {lowest.name}, {words(field)} {losses(lowest, field)}; {shown}",
            verdict=verdict_of(all(beats_all)),
            why=f"reproduced where the {words(field)} of all three is below every linear map's, least squares "
            "included, in every seed (SPEC R5)",
        ),
    ]


def _learning_rate(ablation: Ablation) -> list[Judgement]:
    slow, quick = ablation.arm(OLD_RATE), ablation.arm(STANDARD)
    linear = ablation.arm(LINEAR)
    if slow is None or quick is None or linear is None:
        return []
    field = loss_field(ablation)
    return [
        Judgement(
            claim="the MLP wants ten times the linear projector's learning rate",
            guide="1e-4 to 1e-3",
            measured=f"{words(field)} of MLP 1.0 {losses(slow, field)} at 1e-4, {losses(quick, field)} at 1e-3; of "
            f"Linear at 1e-3 {losses(linear, field)}",
            verdict=verdict_of(all(beats([quick], [slow], field))),
            why="reproduced where MLP 1.0 is lower at 1e-3 in every seed; a linear layer may want it too",
        )
    ]


def _migration(ablation: Ablation) -> list[Judgement]:
    old, new = ablation.arm(OLD_LINEAR), ablation.arm(STANDARD)
    if old is None or new is None:
        return []
    field = loss_field(ablation)
    left = [ratio(getattr(b, field), getattr(a, field)) for a, b in zip(old.runs, new.runs, strict=True)]
    gains = speed_up(new, old)
    ahead = all(b.curve[0] <= smoothed(a.curve)[-1] for a, b in zip(old.runs, new.runs, strict=True))
    return [
        Judgement(
            claim="upgrading takes 80 to 95 % of the loss away",
            guide="80-95 %",
            measured=f"{1 - mean(left):.0%} of the {words(field)}",
            verdict=verdict_of(max(left) <= 0.2),
            why="reproduced where at least 80 % goes in every seed, Linear at 1e-4 against MLP 1.0 at 1e-3",
        ),
        Judgement(
            claim="upgrading makes it converge 2 to 3 times as fast",
            guide="2-3x",
            measured=f"{times(gains)} as fast to where the linear layer ends",
            verdict=verdict_of(min(gains) >= 2, not ahead),
            why=f"before its first step MLP 1.0 is below where the linear layer is after {ablation.steps}: that "
            "compares where they start, not how fast they go"
            if ahead
            else "reproduced where it takes at most half the steps in every seed",
        ),
    ]


def _computed() -> list[Judgement]:
    """Counts at the guide's widths, which need no training (SPEC R2)."""
    judgements = []
    for row in BENCHMARK:
        counted = adapter_parameters(TEACHER_WIDTH, STUDENT_WIDTH, row.arm.mlp_ratio, weights_only=True) / 1e6
        judgements.append(
            Judgement(
                claim=f"{row.arm.name}: weights of an adapter, {TEACHER_WIDTH} to {STUDENT_WIDTH}",
                guide=f"{row.millions:g}M",
                measured=f"{counted:.2f}M",
                verdict=verdict_of(abs(counted / row.millions - 1) <= 0.01),
                why="computed; reproduced within 1 %",
            )
        )
    sizes = [adapter_parameters(TEACHER_WIDTH, STUDENT_WIDTH, arm.mlp_ratio) for arm in (OLD_LINEAR, STANDARD)]
    judgements.append(
        Judgement(
            claim="upgrading takes about 4 times the memory",
            guide="4x",
            measured=f"{sizes[1] / sizes[0]:.2f}x (weights, gradients and AdamW's moments alike)",
            verdict=verdict_of(within(sizes[1] / sizes[0], 4.0)),
            why=f"computed at the guide's widths; reproduced within a factor of {TOLERANCE}",
        )
    )
    return judgements


def _not_the_guides(ablation: Ablation) -> str:
    """Why the guide's absolute figures cannot be compared with this run, or nothing."""
    if not ablation.synthetic:
        return "the guide's figures are of random targets, these of real KV"
    if (ablation.in_dim, ablation.out_dim) != (TEACHER_WIDTH, STUDENT_WIDTH):
        return (
            f"the guide's figures are of {TEACHER_WIDTH} to {STUDENT_WIDTH}, these of {ablation.in_dim} to "
            f"{ablation.out_dim}; --width-divisor 1 compares"
        )
    return "" if ablation.steps == STEPS else f"the guide's figures are of {STEPS} steps, these of {ablation.steps}"
