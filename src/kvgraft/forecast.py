"""What ``kvgraft train`` of a recipe will take, reckoned from a :class:`~kvgraft.calibration.Calibration`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kvgraft.calibration import ArmCalibration, Calibration, TeacherCalibration, calibrate
from kvgraft.distill.arms import SHARE_MEASUREMENTS, WITHOUT_KV
from kvgraft.memory import PeakMemory
from kvgraft.plan import Forecast
from kvgraft.recipe import Recipe, TrainingRecipe

_PARTS = ("training", "held-out")


def make_forecast(recipe: Recipe) -> Forecast:
    """Calibrate on this machine, and reckon what ``recipe`` will take. Takes the time of a few texts and steps.

    Raises:
        KVGraftError: what would stop the run stops this.
    """
    return forecast_from(recipe, calibrate(recipe))


def forecast_from(recipe: Recipe, calibration: Calibration) -> Forecast:
    """What ``recipe`` will take by ``calibration``."""
    teachers = calibration.capture.teachers
    return Forecast(
        store_bytes=sum(_store_bytes(teacher) for teacher in teachers.values()),
        peak_memory=_peak_memory(calibration),
        seconds=_seconds(recipe, calibration),
        calibration_seconds=calibration.seconds,
    )


def _store_bytes(teacher: TeacherCalibration) -> int:
    return sum(round(part.tokens * teacher.bytes_per_token) + teacher.once_bytes for part in teacher.whole)


def _peak_memory(calibration: Calibration) -> PeakMemory:
    capture, training = calibration.capture, calibration.training
    # Training reads the stores through maps of their files; while they are made, what is captured goes to the disk at
    # once.
    mapped = sum(_more_bytes(teacher) for teacher in capture.teachers.values())
    with_kv = any(arm not in WITHOUT_KV for arm in training.arms)
    return capture.peak.at_least(_with_more(training.peak, mapped if with_kv else 0))


def _more_bytes(teacher: TeacherCalibration) -> int:
    """Bytes of KV beyond those of the few texts."""
    more = sum(part.tokens for part in teacher.whole) - sum(teacher.captured_tokens)
    return round(max(0.0, more * teacher.bytes_per_token))


def _with_more(peak: PeakMemory, more: int) -> PeakMemory:
    return peak.model_copy(update={"host_bytes": peak.host_bytes + more})


def _seconds(recipe: Recipe, calibration: Calibration) -> dict[str, float]:
    capture, training = calibration.capture, calibration.training
    seconds = {"read text": capture.text_seconds}
    for phase, measured in {**capture.phase_seconds, **training.phase_seconds}.items():
        if phase.startswith(("identify ", "find layers ")):
            seconds[phase] = capture.phase_seconds[phase]
        elif phase.startswith("capture "):
            seconds |= _capture_seconds(phase, measured, capture.teachers)
        elif phase != "read text":
            seconds[phase] = measured / capture.text_share
    for arm, measured_arm in training.arms.items():
        seconds[f"train {arm}"] = _arm_seconds(
            recipe.training, measured_arm, training.evaluation_share, 0 if arm == "baseline" else SHARE_MEASUREMENTS
        )
    return seconds


def _capture_seconds(phase: str, measured: float, teachers: Mapping[str, TeacherCalibration]) -> dict[str, float]:
    for name, teacher in teachers.items():
        missing = [part.pass_tokens for part in teacher.whole]
        for index, part in enumerate(_PARTS):
            if phase == f"capture {name} ({part} text)":
                # The teacher is loaded once, for the first of its stores that lacks something.
                loads = missing[index] and not any(missing[:index])
                load = teacher.load_seconds if loads else 0.0
                return {phase: load + missing[index] / teacher.tokens_per_second}
    return {phase: measured}


def _arm_seconds(
    training: TrainingRecipe, arm: ArmCalibration, evaluation_share: float, share_measurements: int
) -> float:
    evaluations = 1 + math.ceil(training.steps / training.evaluate_every)
    checkpoints = math.ceil(training.steps / training.save_every)
    # What the first step took beyond the others was the shares of the gradient, which are measured again and again.
    more = max(0.0, arm.first_step - arm.step) * min(share_measurements, training.steps)
    return (
        arm.setup
        + evaluations * arm.evaluation / evaluation_share
        + training.steps * arm.step
        + more
        + checkpoints * arm.checkpoint
        + arm.closing
    )
