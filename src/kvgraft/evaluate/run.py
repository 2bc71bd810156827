"""``kvgraft evaluate``: the saved students of a finished run, measured in every way we have."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kvgraft.data.datasets import Example, in_template, load_examples
from kvgraft.distill.arms import STUDENT_FOLDER, ArmData, load_arm
from kvgraft.distill.dataset import Batches, DistillationDataset
from kvgraft.distill.model import DistillationModel
from kvgraft.errors import DataError, ProjectorError, RecipeError
from kvgraft.evaluate.gsm8k import AnswerSample, AnswerSettings, Problem, answer_problems, problems_of
from kvgraft.evaluate.harness import require_tasks, task_scores
from kvgraft.evaluate.quality import held_out_quality
from kvgraft.evaluate.similarity import LayerSimilarity, layer_similarity
from kvgraft.models.loading import load_model, load_tokenizer
from kvgraft.prepare import load_examples_of, prepare
from kvgraft.processes import process_state
from kvgraft.recipe import Recipe, load_recipe
from kvgraft.report.evaluation import EVALUATION_FOLDER, ArmEvaluation, EvaluationReport, write_evaluation
from kvgraft.report.results import RECIPE_FILE, RESULT_FILE, RunResult
from kvgraft.report.run_folder import holds_a_fit
from kvgraft.run import arm_data

logger = logging.getLogger(__name__)

PARTS = ("quality", "similarity", "gsm8k", "tasks")
# Training texts that least squares is fitted on.
_FITTED_TEXTS = 128


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure.

    Attributes:
        only: names of ``PARTS``; default all that there is data for.
        data: source of problems in GSM8K's form, as a recipe's ``data.train``; default the run's held-out text.
        problems: how many of them; default all.
        answers: how they are put to the student.
        tasks: of lm-eval.
        task_limit: examples of each; default all.
    """

    only: Sequence[str] = ()
    data: str | None = None
    problems: int | None = None
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    tasks: Sequence[str] = ()
    task_limit: int | None = None

    def wants(self, part: str) -> bool:
        """Whether ``part`` is to be measured."""
        return part in self.only or not self.only


def evaluate(folder: Path, settings: EvaluationSettings | None = None, output: Path | None = None) -> EvaluationReport:
    """Measure the students that a finished run saved.

    Args:
        folder: the run's; nothing but ``output`` is written to.
        output: default ``evaluation`` in ``folder``.

    Raises:
        RecipeError: ``folder`` is no run, or one that is not finished.
        ResultError: the run is of a newer version.
        DataError: problems, tasks or similarity were asked for and there are none.
    """
    settings = settings or EvaluationSettings()
    _require_measurable(settings)
    recipe, _ = open_finished_run(folder)
    tokenizer = load_tokenizer(str(folder / recipe.arms[0] / STUDENT_FOLDER))
    train_examples, held_out_examples = load_examples_of(recipe, tokenizer)
    problems, shots = _problems(recipe, tokenizer, train_examples, held_out_examples, settings)
    # Only what looks at the teachers' KV needs it: exact match and tasks work on any machine that has the run.
    data = arm_data(prepare(recipe)) if settings.wants("quality") or settings.wants("similarity") else None
    arms: list[ArmEvaluation] = []
    samples: list[AnswerSample] = []
    for arm in recipe.arms:
        measured = ArmEvaluation(arm=arm)
        if data is not None:
            model = load_arm(recipe, arm, data, folder / arm).to(process_state().device)
            if settings.wants("quality"):
                measured.quality = _quality(model, recipe, data.held_out_set(arm), data)
            if settings.wants("similarity"):
                measured.similarity = _similarity(model, recipe, data, settings)
        if problems:
            student = load_model(str(folder / arm / STUDENT_FOLDER), dtype=recipe.student.dtype)
            measured.problems, answered = answer_problems(arm, student, tokenizer, problems, settings.answers, shots)
            samples += answered
        if settings.tasks:
            measured.tasks = task_scores(
                folder / arm / STUDENT_FOLDER,
                settings.tasks,
                limit=settings.task_limit,
                batch_size=settings.answers.batch_size,
                device=str(process_state().device),
            )
        arms.append(measured)
    asked = {
        "gsm8k": {"data": _source(recipe, settings), "problems": len(problems), **asdict(settings.answers)},
        "tasks": {"limit": settings.task_limit},
    }
    report = EvaluationReport(name=recipe.name, held_out_texts=len(held_out_examples), asked=asked, arms=arms)
    if process_state().is_main_process:
        write_evaluation(report, samples, output or folder / EVALUATION_FOLDER)
    return report


def open_finished_run(folder: Path) -> tuple[Recipe, RunResult]:
    """Recipe and result of the run in ``folder``.

    Raises:
        RecipeError: it is no run, or one that is not finished.
        ResultError: the run is of a newer version.
    """
    if not (folder / RECIPE_FILE).is_file():
        raise RecipeError(f"{folder} is no run folder: it has no {RECIPE_FILE}; name one that `kvgraft train` wrote")
    if holds_a_fit(folder):
        raise RecipeError(
            f"{folder} is what `kvgraft fit` or `kvgraft graft` wrote: read its fit.md or graft.md; name a folder that "
            "`kvgraft train` wrote"
        )
    if not (folder / RESULT_FILE).is_file():
        raise RecipeError(
            f"the run in {folder} is not finished: it has no {RESULT_FILE}. Finish it: "
            f"kvgraft train {folder / RECIPE_FILE} --output {folder} --resume"
        )
    result = RunResult.read(folder / RESULT_FILE)
    for arm in result.arms:
        if not (folder / arm.arm / STUDENT_FOLDER).is_dir():
            raise RecipeError(
                f"{folder / arm.arm} has no {STUDENT_FOLDER}: the run was not copied whole; bring it back"
            )
    return load_recipe(folder / RECIPE_FILE), result


def _require_measurable(settings: EvaluationSettings) -> None:
    unknown = sorted(set(settings.only) - set(PARTS))
    if unknown:
        raise DataError(f"nothing called {', '.join(unknown)} can be measured; there are {', '.join(PARTS)}")
    if "tasks" in settings.only and not settings.tasks:
        raise DataError("tasks are to be measured and none is named; give --tasks, such as --tasks arc_easy")
    if settings.tasks:
        require_tasks(settings.tasks)


def _quality(
    model: DistillationModel, recipe: Recipe, held_out: DistillationDataset, data: ArmData
) -> dict[str, float]:
    batches = Batches(held_out, data.collator, recipe.training.eval_batch_size, process_state().device)
    return held_out_quality(model, batches, held_out.predicted_bytes).metrics()


def _similarity(
    model: DistillationModel, recipe: Recipe, data: ArmData, settings: EvaluationSettings
) -> dict[str, list[LayerSimilarity]]:
    """By teacher. Students that saw none are compared too: what they share with it is what training has to beat.

    A teacher that answers for no token of the text is left out, and a student that diverged, whose KV is no numbers,
    unless this part was asked for by name.
    """
    how = (data.collator, recipe.training.eval_batch_size, process_state().device)
    train = Batches(DistillationDataset(data.train[:_FITTED_TEXTS], data.train_sources), *how)
    held_out = Batches(DistillationDataset(data.held_out, data.held_out_sources), *how)
    found = {}
    for teacher, pairs in data.layer_maps.items():
        try:
            found[teacher] = layer_similarity(model, teacher, pairs, train, held_out)
        except (DataError, ProjectorError) as error:
            if "similarity" in settings.only:
                raise
            logger.warning("KV is not compared: %s", error)
    return found


def _source(recipe: Recipe, settings: EvaluationSettings) -> str:
    return settings.data or recipe.data.held_out or recipe.data.train


def _problems(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Example],
    held_out: list[Example],
    settings: EvaluationSettings,
) -> tuple[list[Problem], list[Problem]]:
    """Problems to ask, and solved ones to show before; none where the run has none and none were asked for."""
    if not settings.wants("gsm8k"):
        return [], []
    source = _source(recipe, settings)
    if settings.data is None:
        examples = [in_template(example, tokenizer) for example in held_out]
    else:
        examples = load_examples(settings.data, "held_out", seed=recipe.data.seed, tokenizer=tokenizer)
    try:
        problems = problems_of(examples, source)[: settings.problems]
    except DataError as error:
        if "gsm8k" in settings.only or settings.data is not None:
            raise
        logger.info("exact match is not measured: %s", error)
        return [], []
    if not settings.answers.shots:
        return problems, []
    train = [in_template(example, tokenizer) for example in train]
    shots = problems_of(train, f"{recipe.data.train} (from which --shots are taken)")
    if len(shots) < settings.answers.shots:
        raise DataError(f"--shots {settings.answers.shots}, and {recipe.data.train} has {len(shots)} training problems")
    return problems, shots[: settings.answers.shots]
