"""What came out of a comparison: every run, what the seeds say of each arm, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvgraft.compare.arms import ComparisonArm
from kvgraft.compare.matrix import Cell, Matrix
from kvgraft.compare.verdicts import Verdict, judge
from kvgraft.errors import ResultError
from kvgraft.evaluate.statistics import PairedDifference, Reach, Spread, corrected, paired_difference, reach, spread
from kvgraft.recipe import Arm
from kvgraft.report.results import ArmResult, Record, RunResult, SavedResult, TeacherResult, read_result

Results = Mapping[tuple[str, int], RunResult]


class ArmRun(Record):
    """One arm with one seed: where it is, the command that makes it, and what was measured (curves included)."""

    seed: int
    folder: str
    command: str
    result: ArmResult


class ArmStatistics(Record):
    """What the seeds say of one arm. Losses are held-out cross-entropy in nats per token.

    Attributes:
        final: loss at the end.
        lowest: lowest loss on the way.
        difference: of the final loss to that of the arm that all are compared with; None for that arm itself.
        difference_to_control: to the arm's control; None where it has none here.
        steps_to_target, seconds_to_target: until the loss that the compared arm of the same seed ends with. Seconds are
            of training, evaluations included, on whatever machine ran the cell; the teacher's pass is not in them.
    """

    final: Spread
    lowest: Spread
    difference: PairedDifference | None
    difference_to_control: PairedDifference | None
    steps_to_target: Reach
    seconds_to_target: Reach | None


class ArmComparison(Record):
    """One arm: what it changes, its runs, its statistics, and the verdict on it."""

    name: str
    meaning: str
    trains_as: Arm
    overrides: list[str]
    control: str | None
    runs: list[ArmRun]
    statistics: ArmStatistics
    verdict: Verdict


class Comparison(SavedResult):
    """Everything that a comparison measured.

    ``against`` names the arm that the others are compared with. ``recipe`` holds every field of the recipe before an
    arm changed it. ``capture_seconds`` is the teachers' pass over the text, once for all arms, or the
    search for it where it was stored already.
    """

    name: str
    date: str
    command: str
    against: str
    seeds: list[int]
    arms: list[ArmComparison]
    notes: list[str]
    recipe: dict[str, Any]
    student: str
    student_parameters: int
    train_texts: int
    train_tokens: int
    held_out_texts: int
    teachers: list[TeacherResult]
    capture_seconds: float
    versions: dict[str, str]

    def arm(self, name: str) -> ArmComparison | None:
        """Arm ``name``, or None if there is none."""
        return next((arm for arm in self.arms if arm.name == name), None)

    @classmethod
    def read(cls, path: Path) -> Comparison:
        """Load what ``write`` saved; see :func:`kvgraft.report.results.read_result`."""
        return read_result(cls, path)


def build_comparison(matrix: Matrix, results: Results) -> Comparison:
    """Set the results of ``matrix``'s cells, by arm and seed, beside each other.

    Raises:
        ResultError: cells of different data, or without a loss.
    """
    first = results[matrix.arms[0].name, matrix.seeds[0]]
    for cell in matrix.cells:
        _require_comparable(cell, results[cell.arm.name, cell.seed], matrix.cells[0], first)
    statistics = arm_statistics(
        matrix.arms,
        matrix.against,
        {arm.name: {seed: results[arm.name, seed].arms[0] for seed in matrix.seeds} for arm in matrix.arms},
    )
    captures = [_capture_seconds(result) for result in results.values()]
    return Comparison(
        name=matrix.recipe.name,
        date=max(result.date for result in results.values()),
        command=matrix.command,
        against=matrix.against,
        seeds=list(matrix.seeds),
        arms=[
            ArmComparison(
                name=arm.name,
                meaning=arm.meaning,
                trains_as=arm.trains_as,
                overrides=list(arm.overrides),
                control=arm.control,
                runs=[
                    ArmRun(
                        seed=cell.seed,
                        folder=str(cell.folder),
                        command=cell.command,
                        result=results[arm.name, cell.seed].arms[0],
                    )
                    for cell in matrix.cells
                    if cell.arm is arm
                ],
                statistics=statistics[arm.name],
                verdict=judge(arm, matrix.against, statistics),
            )
            for arm in matrix.arms
        ],
        notes=list(matrix.notes),
        recipe=matrix.recipe.model_dump(mode="json"),
        student=first.student,
        student_parameters=first.student_parameters,
        train_texts=first.train_texts,
        train_tokens=first.train_tokens,
        held_out_texts=first.held_out_texts,
        teachers=first.teachers,
        capture_seconds=max(captures),
        versions=first.versions,
    )


def arm_statistics(
    arms: Sequence[ComparisonArm], against: str, curves: Mapping[str, Mapping[int, ArmResult]]
) -> dict[str, ArmStatistics]:
    """Statistics of every arm from ``curves``, by arm and seed. P-values are corrected for the number of arms."""
    finals = {name: {seed: run.last["loss"] for seed, run in runs.items()} for name, runs in curves.items()}
    differences = corrected(
        {arm.name: paired_difference(finals[arm.name], finals[against]) for arm in arms if arm.name != against}
    )
    to_controls = corrected(
        {
            arm.name: paired_difference(finals[arm.name], finals[arm.control])
            for arm in arms
            if arm.control is not None and arm.control in finals
        }
    )
    return {
        name: ArmStatistics(
            final=spread(finals[name]),
            lowest=spread({seed: _lowest(run) for seed, run in runs.items()}),
            difference=differences.get(name),
            difference_to_control=to_controls.get(name),
            steps_to_target=reach({seed: _steps_to(run, finals[against][seed]) for seed, run in runs.items()}),
            seconds_to_target=_seconds_to(runs, finals[against]),
        )
        for name, runs in curves.items()
    }


def _lowest(run: ArmResult) -> float:
    return min(point.metrics["loss"] for point in run.evaluations)


def _steps_to(run: ArmResult, target: float) -> tuple[float, float] | None:
    """The last evaluated step before ``run`` reaches ``target``, and the first at which it has."""
    reached = run.steps_to(target)
    if reached is None:
        return None
    return max((point.step for point in run.evaluations if point.step < reached), default=reached), reached


def _seconds_to(runs: Mapping[int, ArmResult], targets: Mapping[int, float]) -> Reach | None:
    """None where a run was made before the clock was kept."""
    crossings: dict[int, tuple[float, float] | None] = {}
    for seed, run in runs.items():
        steps = _steps_to(run, targets[seed])
        if steps is not None and not set(steps) <= set(run.seconds_at):
            return None
        crossings[seed] = None if steps is None else (run.seconds_at[int(steps[0])], run.seconds_at[int(steps[1])])
    return reach(crossings)


def _capture_seconds(result: RunResult) -> float:
    return sum(seconds for phase, seconds in result.seconds.items() if phase.startswith("capture "))


def _require_comparable(cell: Cell, result: RunResult, first_cell: Cell, first: RunResult) -> None:
    run = f"{cell.arm.name} with seed {cell.seed} in {cell.folder}"
    if [arm.arm for arm in result.arms] != [cell.arm.trains_as]:
        raise ResultError(
            f"{run} should hold one arm, {cell.arm.trains_as}; it holds {[arm.arm for arm in result.arms]}. Remove the "
            f"folder and make it again: {cell.command}"
        )
    for field in ("train_texts", "train_tokens", "held_out_texts"):
        mine, other = getattr(result, field), getattr(first, field)
        if mine != other:
            raise ResultError(
                f"{run} and {first_cell.arm.name} with seed {first_cell.seed} were made from different data: {field} "
                f"{mine:,} and {other:,}. Losses on different text do not compare; if the text has changed since, "
                "remove the older folder and run the comparison again"
            )
    for point in result.arms[0].evaluations:
        if not math.isfinite(point.metrics.get("loss", math.nan)):
            raise ResultError(
                f"{run} has no held-out loss at step {point.step}: it is {point.metrics.get('loss', 'missing')}. If it "
                "diverged, compare without this arm, or give it a lower training.learning_rate and another name; the "
                "other runs are kept"
            )
    if not result.arms[0].evaluations:
        raise ResultError(f"{run} was never evaluated; make it again: {cell.command}")
