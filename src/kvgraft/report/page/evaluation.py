"""What ``kvgraft evaluate`` found, as figures: exact match, heat maps of similarity, and answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvgraft.evaluate.gsm8k import AnswerSample, ProblemScore
from kvgraft.evaluate.similarity import KINDS, LayerSimilarity
from kvgraft.report.evaluation import EVALUATION_FOLDER, SAMPLES_FILE, SavedEvaluation, SavedPart, read_evaluation
from kvgraft.report.page.commands import evaluate_command
from kvgraft.report.page.data import Figure, HeatMapFigure, Phrase, SamplesFigure, SampleText, TableFigure, Words
from kvgraft.report.run_folder import RunFolder

# Answers on the page; a test set of a thousand problems would be most of the file.
_MOST_SAMPLES = 20
# Titles of the measures of a layer, and what their colours reach over where that is known.
_MEASURES: dict[str, tuple[Phrase, tuple[float, float] | None]] = {
    "cka": (Phrase("Linear CKA of the student's and the teacher's KV"), (0, 1)),
    "least_squares_r2": (Phrase("R² of the teacher's KV from the student's, by least squares"), (0, 1)),
    "least_squares_cosine": (
        Phrase("Cosine of the teacher's KV and what least squares makes of the student's"),
        (0, 1),
    ),
    "projector_r2": (Phrase("R² of the run's own comparison, through the saved projector"), (0, 1)),
    "projector_cosine": (Phrase("Cosine of the run's own comparison, through the saved projector"), (0, 1)),
    "student_effective_rank": (Phrase("Effective rank of the student's KV"), None),
    "teacher_effective_rank": (Phrase("Effective rank of the teacher's KV"), None),
}


@dataclass(frozen=True)
class EvaluationFigures:
    """Figures of the evaluations of several runs, by the section that they belong to."""

    tables: Sequence[Figure]
    heat_maps: Sequence[Figure]
    samples: Sequence[Figure]


def evaluation_figures(runs: Sequence[RunFolder]) -> EvaluationFigures:
    """What is in the ``evaluation`` folders of ``runs``.

    Raises:
        ReportError: a file there that `kvgraft evaluate` did not write.
    """
    found = [(run, read_evaluation(run.path / EVALUATION_FOLDER)) for run in runs]
    return EvaluationFigures(
        tables=[figure for run, evaluation in found for figure in _tables(run, evaluation)],
        heat_maps=[figure for run, evaluation in found for figure in _heat_maps(run, evaluation)],
        samples=[figure for run, evaluation in found for figure in _samples(run, evaluation)],
    )


def _tables(run: RunFolder, evaluation: SavedEvaluation) -> list[Figure]:
    figures: list[Figure] = []
    if evaluation.problems is not None:
        figures.append(_exact_match(run, evaluation.problems))
    if evaluation.quality is not None:
        title = Phrase("Saved students on held-out text, seed {seed}", _seed(run))
        command = evaluate_command(run.path, "--only", "quality")
        figures.append(_numbers(title, command, evaluation.quality.arms))
    if evaluation.tasks is not None:
        title = Phrase("Tasks of lm-eval, seed {seed}", _seed(run))
        flat = {
            arm: {f"{task}: {name}": value for task, scores in tasks.items() for name, value in scores.items()}
            for arm, tasks in evaluation.tasks.arms.items()
        }
        figures.append(_numbers(title, _tasks_command(run, evaluation.tasks), flat))
    return figures


def _exact_match(run: RunFolder, part: SavedPart[ProblemScore]) -> TableFigure:
    asked = part.asked
    values = {"data": str(asked.get("data")), "shots": str(asked.get("shots")), **_seed(run)}
    rows: list[list[Words]] = [
        [
            arm,
            f"{score.accuracy:.1%} ({score.correct}/{score.problems})",
            "{:.1%} – {:.1%}".format(*score.interval),  # noqa: RUF001
            f"{score.answered:,}",
            f"{score.empty:,}",
            f"{score.without_room:,}",
            f"{score.tokens / score.seconds:,.0f}" if score.seconds else "-",
        ]
        for arm, score in part.arms.items()
    ]
    return TableFigure(
        title=Phrase("Exact match on {data}, {shots} solved problems before each, seed {seed}", values),
        note=Phrase("Sums are worked out for the student (calculator).") if asked.get("calculator") else None,
        command=problems_command(run, asked),
        columns=[
            Phrase("arm"),
            Phrase("exact match"),
            Phrase("95 % interval (Wilson)"),
            Phrase("with a final number"),
            Phrase("empty answers"),
            Phrase("without room for an answer"),
            Phrase("tokens per second"),
        ],
        rows=rows,
    )


def _numbers(title: Phrase, command: str, arms: Mapping[str, Mapping[str, float]]) -> TableFigure:
    """A row for each arm, a column for each metric that any has."""
    names = list(dict.fromkeys(name for metrics in arms.values() for name in metrics))
    rows: list[list[Words]] = [
        [arm, *(f"{metrics[name]:.3f}" if name in metrics else "-" for name in names)] for arm, metrics in arms.items()
    ]
    return TableFigure(title=title, command=command, columns=[Phrase("arm"), *names], rows=rows)


def _heat_maps(run: RunFolder, evaluation: SavedEvaluation) -> list[Figure]:
    """One figure for each teacher and measure: arms and kinds down, layers across."""
    if evaluation.similarity is None:
        return []
    arms = evaluation.similarity.arms
    figures: list[Figure] = []
    for teacher in dict.fromkeys(teacher for measured in arms.values() for teacher in measured):
        by_arm = {arm: measured[teacher] for arm, measured in arms.items() if teacher in measured}
        for field, (title, span) in _MEASURES.items():
            rows = _layer_rows(by_arm, field)
            if rows:
                figures.append(
                    HeatMapFigure(
                        title=title,
                        note=Phrase(
                            "Student layer ← teacher layer ({teacher}), held-out text, seed {seed}.",
                            {"teacher": teacher, **_seed(run)},
                        ),
                        command=evaluate_command(run.path, "--only", "similarity"),
                        rows=list(rows),
                        columns=_layer_pairs(next(iter(by_arm.values()))),
                        values=list(rows.values()),
                        span=span,
                    )
                )
    return figures


def _layer_rows(by_arm: Mapping[str, Sequence[LayerSimilarity]], field: str) -> dict[str, list[float | None]]:
    """Values by row; rows in which nothing was measured are left out."""
    rows = {
        f"{arm}: {kind}": [getattr(layer, field) for layer in layers if layer.kind == kind]
        for arm, layers in by_arm.items()
        for kind in KINDS
    }
    return {label: values for label, values in rows.items() if any(value is not None for value in values)}


def _layer_pairs(layers: Sequence[LayerSimilarity]) -> list[str]:
    return [f"{layer.student_layer}←{layer.teacher_layer}" for layer in layers if layer.kind == KINDS[0]]


def _samples(run: RunFolder, evaluation: SavedEvaluation) -> list[Figure]:
    by_prompt: dict[str, list[AnswerSample]] = {}
    for sample in evaluation.samples:
        by_prompt.setdefault(sample.prompt, []).append(sample)
    if not by_prompt:
        return []
    shown = list(by_prompt.items())[:_MOST_SAMPLES]
    counts = {"shown": str(len(shown)), "all": f"{len(by_prompt):,}", "file": f"{EVALUATION_FOLDER}/{SAMPLES_FILE}"}
    asked = evaluation.problems.asked if evaluation.problems is not None else {}
    return [
        SamplesFigure(
            title=Phrase("Answers of every arm, seed {seed}", _seed(run)),
            note=Phrase("{shown} of {all} problems; all answers are in {file}.", counts),
            command=problems_command(run, asked),
            samples=[
                SampleText(
                    prompt,
                    answers[0].answer,
                    {f"{sample.arm} {'✓' if sample.correct else '✗'}": sample.prediction for sample in answers},
                )
                for prompt, answers in shown
            ],
        )
    ]


def problems_command(run: RunFolder, asked: Mapping[str, Any]) -> str:
    """Asks the students of ``run`` the problems again as they were ``asked``."""
    options = ["--only", "gsm8k"]
    if asked.get("data") not in (None, run.recipe.data.held_out or run.recipe.data.train):
        options += ["--data", str(asked["data"])]
    for name in ("problems", "shots", "max_new_tokens", "batch_size"):
        if asked.get(name):
            options += [f"--{name.replace('_', '-')}", str(asked[name])]
    return evaluate_command(run.path, *options, *(["--calculator"] if asked.get("calculator") else []))


def _tasks_command(run: RunFolder, part: SavedPart[dict[str, dict[str, float]]]) -> str:
    names = dict.fromkeys(task for tasks in part.arms.values() for task in tasks)
    limit = part.asked.get("limit")
    limited = ["--task-limit", str(limit)] if limit else []
    return evaluate_command(run.path, "--only", "tasks", "--tasks", ",".join(names), *limited)


def _seed(run: RunFolder) -> dict[str, str]:
    return {"seed": str(run.seed)}
