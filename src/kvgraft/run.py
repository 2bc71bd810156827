"""One run from recipe to report: the place where the rooms meet."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from kvgraft.data.batching import EncodedExample
from kvgraft.distill.arms import (
    ArmData,
    evaluations,
    gradient_shares,
    non_finite_steps,
    real_token_share,
    seconds_at_evaluations,
    train_arm,
)
from kvgraft.distill.checkpoints import CHECKPOINTS_FOLDER
from kvgraft.errors import RecipeError
from kvgraft.memory import peak_memory
from kvgraft.models.geometry import depth_of
from kvgraft.plan import count_parameters, require_workable
from kvgraft.prepare import Prepared, prepare
from kvgraft.prepare_logits import prepare_logits
from kvgraft.processes import process_state
from kvgraft.projector.settings import teacher_config_from
from kvgraft.recipe import Recipe, load_recipe
from kvgraft.recipe.differences import differences
from kvgraft.report.environment import describe_environment
from kvgraft.report.layers import layers_markdown, save_layer_maps
from kvgraft.report.log import write_experiment_log
from kvgraft.report.plots import save_curves
from kvgraft.report.results import (
    LOG_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    RESULT_FILE,
    ArmResult,
    Evaluation,
    RunResult,
    TeacherResult,
)
from kvgraft.report.run_folder import holds_a_fit
from kvgraft.report.tables import markdown
from kvgraft.store.atomic_file import write_text_atomically

logger = logging.getLogger(__name__)

ARM_FILE, INPUTS_FILE = "arm.json", "inputs.json"
_VERSIONS = ("kvgraft", "torch", "transformers", "accelerate")


def run(recipe: Recipe, folder: Path, *, resume: bool = False, overwrite: bool = False) -> RunResult:
    """Do what ``recipe`` says and leave everything in ``folder``.

    ``folder`` gets ``recipe.yaml`` (every default written out), ``experiment.yaml``, ``result.json``, ``results.md``,
    ``metrics.jsonl``, ``curves.png``, and for each arm a folder with ``student`` and ``projector``.

    Args:
        folder: the run's own.
        resume: go on with what is there; arms that were finished are not done again.
        overwrite: start over, removing what is there.

    Raises:
        RecipeError: the folder exists and neither was asked for, or it holds another recipe's run.
        TrainingInterruptedError: Ctrl-C; a checkpoint was left.
    """
    require_workable(recipe)
    if process_state().is_main_process:
        if resume and holds_a_fit(folder):
            raise RecipeError(
                f"{folder} holds what `kvgraft fit` or `kvgraft graft` wrote; give another --output FOLDER"
            )
        open_run_folder(recipe, folder, resume, overwrite)
    process_state().wait_for_everyone()
    prepared = prepare(recipe)
    require_same_inputs(folder, _inputs(prepared))
    if (folder / RESULT_FILE).is_file():
        earlier = RunResult.read(folder / RESULT_FILE)
        if [arm.arm for arm in earlier.arms] == list(recipe.arms):
            logger.info("%s is finished and is not run again", folder)
            return earlier
    result = _describe(prepared)
    data = arm_data(prepared)
    for arm in recipe.arms:
        if not (folder / arm / ARM_FILE).is_file():
            with prepared.phases.timed(f"train {arm}"):
                parameters = train_arm(recipe, arm, data, folder / arm)
            _finish_arm(folder / arm, arm, recipe, parameters, prepared.phases.seconds[f"train {arm}"])
        else:
            logger.info("arm %s was finished before and is not trained again", arm)
            if process_state().is_main_process:
                # A kill just after the arm's file was written leaves them.
                shutil.rmtree(folder / arm / CHECKPOINTS_FOLDER, ignore_errors=True)
        result.arms.append(_read_arm(folder / arm))
    # Those of arms that were finished before are in their own files.
    result.seconds = prepared.phases.seconds | {f"train {arm.arm}": arm.seconds for arm in result.arms}
    result.peak_memory = peak_memory()
    if process_state().is_main_process:
        write_report(recipe, result, folder)
    return result


def write_report(recipe: Recipe, result: RunResult, folder: Path) -> None:
    """Log, tables and picture of a run."""
    (folder / "results.md").write_text(markdown(result) + layers_markdown(result), encoding="utf-8")
    write_experiment_log(folder / LOG_FILE, recipe, result)
    save_curves([result], folder / "curves.png")
    save_layer_maps(result, folder)
    lines = [(folder / arm.arm / METRICS_FILE).read_text(encoding="utf-8") for arm in result.arms]
    (folder / METRICS_FILE).write_text("".join(lines), encoding="utf-8")
    # Written last: a run with this file is finished.
    result.write(folder / RESULT_FILE)


def open_run_folder(recipe: Recipe, folder: Path, resume: bool, overwrite: bool) -> None:
    """Make ``folder`` and write the resolved recipe; see :func:`run` for what is refused."""
    if resume and overwrite:
        raise RecipeError(f"--resume keeps what is in {folder} and --overwrite removes it; give one of them")
    there = folder.is_dir() and any(folder.iterdir())
    if there and not (folder / RECIPE_FILE).is_file():
        first = min(path.name for path in folder.iterdir())
        raise RecipeError(
            f"{folder} holds {first} and no {RECIPE_FILE}: it is not the folder of a run and is left alone. "
            "Give another --output FOLDER"
        )
    if there and overwrite:
        if Path.cwd().is_relative_to(folder.resolve()):
            raise RecipeError(f"--overwrite would remove {folder}, where you work; give another --output FOLDER")
        shutil.rmtree(folder)
    elif there and not resume:
        raise RecipeError(
            f"{folder} holds a run already. Go on with it: --resume. Keep it and write elsewhere: --output FOLDER. "
            "Remove it and start over: --overwrite."
        )
    elif there:
        earlier = load_recipe(folder / RECIPE_FILE)
        if earlier.fingerprint() != recipe.fingerprint():
            changed = differences(earlier, recipe, but=("name", "arms"))
            told = ", ".join(f"{field}: {there} there, {given} given" for field, (there, given) in changed.items())
            raise RecipeError(
                f"{folder} was made by another recipe (differs in {told}) and cannot be resumed with this one; give "
                "--output FOLDER for a new run, or --overwrite"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / RECIPE_FILE, recipe.to_yaml())


def _inputs(prepared: Prepared) -> dict[str, str]:
    """What the recipe names and does not hold: digests of the text as the student reads it, and of the teachers."""
    texts = prepared.texts
    return {
        "training text": _text_digest(texts.train),
        "held-out text": _text_digest(texts.held_out),
        **{f"teacher {teacher.recipe.name}": teacher.store.identity.model for teacher in prepared.teachers},
    }


def _text_digest(examples: Sequence[EncodedExample]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.sample_key} {example.input_ids} {example.labels}\n".encode())
    return digest.hexdigest()


def require_same_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Raise RecipeError where what is in ``folder`` was made of something else; runs of before hold no record."""
    path = folder / INPUTS_FILE
    earlier = json.loads(path.read_bytes()) if path.is_file() else inputs
    changed = [name for name, digest in inputs.items() if earlier.get(name) != digest]
    if changed:
        raise RecipeError(
            f"{folder} was begun with something else behind the same recipe: {', '.join(changed)} changed since. What "
            "is there goes with what it was; bring that back, or give --output FOLDER for a new run, or --overwrite"
        )
    process_state().wait_for_everyone()
    if process_state().is_main_process and not path.is_file():
        write_text_atomically(path, json.dumps(inputs, indent=1))


def _describe(prepared: Prepared) -> RunResult:
    recipe, texts = prepared.recipe, prepared.texts
    student = recipe.student.model or f"new {prepared.student_config.model_type}"
    if recipe.student.cut_from is not None:
        student = f"{recipe.student.cut_from}, {depth_of(prepared.student_config)} of its layers"
    return RunResult(
        name=recipe.name,
        date=datetime.date.today().isoformat(),
        seed=recipe.seed,
        student=student,
        student_parameters=count_parameters(prepared.student_config),
        started_embeddings=_started_embeddings(prepared),
        train_texts=len(texts.train),
        train_tokens=sum(len(example.input_ids) for example in texts.train),
        held_out_texts=len(texts.held_out),
        truncated_train_texts=sum(bool(example.truncated_bytes) for example in texts.train),
        teachers=[
            TeacherResult(
                name=teacher.recipe.name,
                model=teacher.recipe.model,
                layer_map=teacher.layer_map,
                tokens=teacher.store.num_tokens,
                captured_tokens=teacher.report.tokens,
                tokens_per_second=teacher.report.tokens_per_second,
                store_bytes=teacher.store.total_bytes,
                bytes_per_token=teacher.store.bytes_per_token,
                truncated_texts=teacher.report.truncated_texts,
                alignment_coverage=teacher.alignment.coverage,
                alignment_mean_span=teacher.alignment.mean_span,
                alignment_dropped=dict(teacher.alignment.dropped),
                store_fingerprint=teacher.store.identity.hash(),
                layer_evidence=teacher.evidence,
            )
            for teacher in prepared.teachers
        ],
        versions={name: version(name) for name in _VERSIONS},
        environment=describe_environment(),
    )


def _started_embeddings(prepared: Prepared) -> float | None:
    if prepared.embeddings is None:
        return None
    return len(prepared.embeddings.token_ids) / prepared.student_config.get_text_config().vocab_size


def arm_data(prepared: Prepared) -> ArmData:
    """What every arm of a run shares; the teachers' log-probabilities are stored here where an arm needs them."""
    logits = prepare_logits(prepared)
    return ArmData(
        make_student=prepared.make_student,
        tokenizer=prepared.texts.tokenizer,
        train=prepared.texts.train,
        held_out=prepared.texts.held_out,
        train_sources=[teacher.train for teacher in prepared.teachers],
        held_out_sources=[teacher.held_out for teacher in prepared.teachers],
        teacher_configs={
            teacher.recipe.name: {**teacher_config_from(teacher.config), "num_layers": len(teacher.layer_map)}
            for teacher in prepared.teachers
        },
        layer_maps={teacher.recipe.name: teacher.layer_map for teacher in prepared.teachers},
        logits=logits.part if logits else None,
        train_logit_sources=logits.train if logits else [],
        held_out_logit_sources=logits.held_out if logits else [],
    )


def _read_arm(folder: Path) -> ArmResult:
    return ArmResult.model_validate_json((folder / ARM_FILE).read_text(encoding="utf-8"))


def _finish_arm(folder: Path, arm: str, recipe: Recipe, projector_parameters: int, seconds: float) -> None:
    result = ArmResult(
        arm=arm,
        steps=recipe.training.steps,
        seconds=seconds,
        evaluations=[Evaluation(step=step, metrics=metrics) for step, metrics in evaluations(folder)],
        gradient_shares=gradient_shares(folder),
        non_finite_steps=non_finite_steps(folder),
        projector_parameters=projector_parameters,
        seconds_at=seconds_at_evaluations(folder),
        real_token_share=real_token_share(folder),
    )
    if process_state().is_main_process:
        # Written last: an arm with this file is finished.
        write_text_atomically(folder / ARM_FILE, result.model_dump_json(indent=2) + "\n")
        shutil.rmtree(folder / CHECKPOINTS_FOLDER, ignore_errors=True)
    process_state().wait_for_everyone()
