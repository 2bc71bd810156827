"""From the log events of runs to curves, one figure for each quantity that was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvgraft.report.page.data import Curve, CurveFigure, Phrase
from kvgraft.report.page.seeds import SeedMeasurements

SHARE_PREFIX, HELD_OUT_PREFIX = "gradient_share/", "eval_"
_TITLES = {
    "eval_loss": Phrase("Held-out loss (cross-entropy, nats per token)"),
    "eval_kv_loss": Phrase("Held-out KV loss (1 is what predicting the mean costs)"),
    "ce_loss": Phrase("Training loss (cross-entropy, nats per token)"),
    "kv_loss": Phrase("KV loss in training (1 is what predicting the mean costs)"),
    "eval_student_kv_effective_rank": Phrase("Effective rank of the student's own KV (falls when it collapses)"),
    "eval_student_kv_deviation": Phrase("Standard deviation of the student's own KV (falls when it shrinks)"),
    "grad_norm": Phrase("Gradient norm"),
    "eval_bits_per_byte": Phrase("Bits per byte of held-out text"),
    "eval_logit_loss": Phrase("Held-out logit loss"),
    "logit_loss": Phrase("Logit loss in training"),
    "weight/kv": Phrase("Weight of the KV loss"),
    "weight/logit": Phrase("Weight of the logit loss"),
    "kv_penalty": Phrase("What learned weights of the teachers add to the loss"),
    "seconds": Phrase("Seconds since training began"),
}
_TITLES_BY_TEACHER = {
    "eval_kv_loss": "Held-out KV loss, {teacher}",
    "kv_loss": "KV loss in training, {teacher}",
    "eval_logit_loss": "Held-out logit loss, {teacher}",
    "logit_loss": "Logit loss in training, {teacher}",
    "teacher_share": "Mean weight of {teacher} at a token",
    "eval_dead_units": "Share of the adapters' hidden units that are never active, {teacher}",
    "eval_keys_r2": "R² of the predicted keys, {teacher} (1 is exact, 0 the mean)",
    "eval_values_r2": "R² of the predicted values, {teacher} (1 is exact, 0 the mean)",
    "eval_kv_variance_ratio": "Variance of the predicted KV over that of {teacher}",
}
_FIRST = ("eval_loss", "eval_kv_loss", "ce_loss", "kv_loss")
# Told elsewhere, or settings rather than measurements.
_LEFT_OUT = {"step", "epoch", "loss", "learning_rate", "eval_perplexity", "real_tokens", "processed_tokens"}
# What the Trainer says of a whole training, once at its end, is no curve.
_LEFT_OUT |= {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}


def main_curves(runs: Sequence[SeedMeasurements], command: str) -> list[CurveFigure]:
    """Losses on held-out and on training text."""
    return _figures(runs, _FIRST, command)


def other_curves(runs: Sequence[SeedMeasurements], command: str) -> list[CurveFigure]:
    """Everything else that was logged, known quantities first."""
    names = _metric_names(runs, lambda name: name not in _LEFT_OUT and name not in _FIRST)
    # A loss of one teacher is the whole of it where there is one teacher.
    teachers = {name.partition("_loss/")[2] for name in names if "_loss/" in name}
    names = [name for name in names if not (len(teachers) == 1 and "_loss/" in name)]
    order = [*_TITLES_BY_TEACHER, *_TITLES]
    known = [name for name in names if isinstance(_title(name), Phrase)]
    known.sort(key=lambda name: order.index(name if name in _TITLES else name.partition("/")[0]))
    return _figures(runs, [*known, *(name for name in names if name not in known)], command)


def share_curves(runs: Sequence[SeedMeasurements], command: str) -> list[CurveFigure]:
    """The share that each loss part beside cross-entropy has in the student's gradient."""
    names = _metric_names(runs, lambda name: True, shares=True)
    return [
        CurveFigure(
            title=Phrase("Share of the {part} loss in the student's gradient", {"part": part}),
            note=Phrase("Gradient norm of this part over the sum of the norms of all parts."),
            command=command,
            curves=_curves(runs, f"{SHARE_PREFIX}{part}"),
            share=True,
        )
        for part in (name.removeprefix(SHARE_PREFIX) for name in names)
        if part != "ce"
    ]


def _metric_names(runs: Sequence[SeedMeasurements], wanted: Callable[[str], bool], shares: bool = False) -> list[str]:
    names = dict.fromkeys(
        name
        for run in runs
        for record in run.events
        for name, value in record.items()
        if isinstance(value, (int, float)) and name.startswith(SHARE_PREFIX) == shares
    )
    return [name for name in names if wanted(name)]


def _figures(runs: Sequence[SeedMeasurements], names: Sequence[str], command: str) -> list[CurveFigure]:
    figures = []
    for name in names:
        curves = _curves(runs, name)
        if curves:
            figures.append(CurveFigure(title=_title(name), command=command, curves=curves))
    return figures


def _title(name: str) -> Phrase | str:
    quantity, _, teacher = name.partition("/")
    if quantity in _TITLES_BY_TEACHER and teacher:
        return Phrase(_TITLES_BY_TEACHER[quantity], {"teacher": teacher})
    return _TITLES.get(name, name)


def _curves(runs: Sequence[SeedMeasurements], metric: str) -> list[Curve]:
    """One curve for each run and arm that has ``metric``; after a resume the later record of a step counts."""
    curves = []
    for run in runs:
        points: dict[str, dict[int, float]] = {}
        for arm, step, value in _points(run, metric):
            points.setdefault(arm, {})[step] = value
        for arm, values in points.items():
            steps = sorted(values)
            curves.append(Curve(arm, run.seed, np.array(steps), np.array([values[step] for step in steps], float)))
    return curves


def _points(run: SeedMeasurements, metric: str) -> list[tuple[str, int, float]]:
    if metric.startswith(HELD_OUT_PREFIX):
        name = metric.removeprefix(HELD_OUT_PREFIX)
        return [
            (arm.arm, point.step, point.metrics[name])
            for arm in run.arms
            for point in arm.evaluations
            if name in point.metrics
        ]
    return [
        (record["arm"], int(record["step"]), float(record[metric]))
        for record in run.events
        if metric in record and "arm" in record and "step" in record
    ]
