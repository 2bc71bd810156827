"""The arms of a run: what is trained from the same weights on the same batches, with one thing changed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments

from kvgraft.data.batch_plan import plan_batches
from kvgraft.data.batching import EncodedExample
from kvgraft.distill.build import build_distillation
from kvgraft.distill.callbacks import EvaluateLastCallback, InterruptCallback, MetricsCallback, ProgressCallback
from kvgraft.distill.checkpoints import CHECKPOINTS_FOLDER, last_checkpoint, saving_into, train_from
from kvgraft.distill.dataset import DistillationCollator, DistillationDataset, PlannedBatches, TeacherSource
from kvgraft.distill.logit_part import LogitPart
from kvgraft.distill.logit_sources import LogitSource
from kvgraft.distill.model import DistillationModel
from kvgraft.distill.trackers import others_than_tensorboard, tracker_callbacks
from kvgraft.distill.trainer import PROJECTOR_FOLDER, KVTrainer
from kvgraft.errors import RecipeError, TrainingInterruptedError
from kvgraft.models.loading import load_weights
from kvgraft.processes import on_cpu, process_state
from kvgraft.progress import progress_bar
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import Arm, Recipe
from kvgraft.recipe.sections import LOGIT_ARMS
from kvgraft.report.log import read_metrics
from kvgraft.report.results import METRICS_FILE

STUDENT_FOLDER = "student"
SHARE_MEASUREMENTS = 10
WITHOUT_KV: tuple[Arm, ...] = ("baseline", "logits")


@dataclass(frozen=True)
class ArmData:
    """What every arm of a run shares."""

    make_student: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    train: list[EncodedExample]
    held_out: list[EncodedExample]
    train_sources: list[TeacherSource]
    held_out_sources: list[TeacherSource]
    teacher_configs: dict[str, dict[str, int]]
    layer_maps: dict[str, list[tuple[int, int]]]
    logits: LogitPart | None = None
    train_logit_sources: list[LogitSource] = field(default_factory=list)
    held_out_logit_sources: list[LogitSource] = field(default_factory=list)

    def train_set(self, arm: Arm, seed: int) -> DistillationDataset:
        """Training text as ``arm`` sees it."""
        return DistillationDataset(
            self.train,
            [] if arm in WITHOUT_KV else self.train_sources,
            mismatch_seed=seed if arm == "mismatched" else None,
            logit_sources=self.train_logit_sources if arm in LOGIT_ARMS else [],
        )

    def held_out_set(self, arm: Arm) -> DistillationDataset:
        """Held-out text as ``arm`` sees it; its KV is always its own."""
        return DistillationDataset(
            self.held_out,
            [] if arm in WITHOUT_KV else self.held_out_sources,
            logit_sources=self.held_out_logit_sources if arm in LOGIT_ARMS else [],
        )

    @property
    def collator(self) -> DistillationCollator:
        """Pads with the student's padding token."""
        return DistillationCollator(self.tokenizer.pad_token_id)


def build_arm(recipe: Recipe, arm: Arm, data: ArmData) -> DistillationModel:
    """Student and projector of ``arm`` before training."""
    objective = "shared" if arm == "shared_objective" else recipe.kv_loss.objective
    return build_distillation(
        recipe,
        data.make_student(),
        recipe.kv_loss.model_copy(update={"objective": objective}),
        {} if arm in WITHOUT_KV else data.layer_maps,
        data.teacher_configs,
        data.train_set(arm, recipe.seed),
        data.collator,
        data.logits if arm in LOGIT_ARMS else None,
    )


def load_arm(recipe: Recipe, arm: Arm, data: ArmData, folder: Path) -> DistillationModel:
    """The student and projector that :func:`train_arm` saved in ``folder``."""
    model = build_arm(recipe, arm, data)
    load_weights(model.student, folder / STUDENT_FOLDER)
    if model.projector is not None:
        model.projector.load_state_dict(KVDimensionProjector.from_pretrained(folder / PROJECTOR_FOLDER).state_dict())
    return model.eval()


def train_arm(recipe: Recipe, arm: Arm, data: ArmData, folder: Path, callbacks: Sequence[TrainerCallback] = ()) -> int:
    """Train one arm, from its last checkpoint if ``folder`` has one, and save student and projector into ``folder``.

    Metrics go to ``folder/metrics.jsonl``. ``callbacks`` are the Trainer's, beside our own. Returns the number of the
    projector's parameters.

    Raises:
        TrainingInterruptedError: Ctrl-C; a checkpoint was left.
    """
    model = build_arm(recipe, arm, data)
    checkpoints = folder / CHECKPOINTS_FOLDER
    checkpoint, done = last_checkpoint(checkpoints)
    interrupt = InterruptCallback()
    steps = recipe.training.steps
    with progress_bar(f"training {arm}", steps, "steps", done=done) as advance:
        trainer = KVTrainer(
            model,
            training_arguments(recipe, checkpoints),
            training_batches(recipe, data.train_set(arm, recipe.seed), data.collator),
            data.held_out_set(arm),
            data.tokenizer,
            data_collator=data.collator,
            callbacks=[
                *tracker_callbacks(recipe.training.report_to, folder),
                ProgressCallback(advance),
                MetricsCallback(folder / METRICS_FILE, arm),
                EvaluateLastCallback(),
                interrupt,
                *callbacks,
            ],
            projector_learning_rate=recipe.training.projector_learning_rate,
            kv_weight_schedule=_SCHEDULES[recipe.kv_loss.schedule],
            logit_weight_schedule=_SCHEDULES[recipe.logit_loss.schedule],
            gradient_shares=gradient_shares_of(recipe, model),
            measure_shares_every=max(1, steps // SHARE_MEASUREMENTS) if arm != "baseline" else 0,
        )
        # With its own bars off, the Trainer would print every log.
        trainer.remove_callback(PrinterCallback)
        if checkpoint is None:
            trainer.evaluate()
        train_from(trainer, checkpoint, done)
        if interrupt.interrupted and trainer.state.global_step < steps:
            raise TrainingInterruptedError(
                f"stopped at step {trainer.state.global_step} of {steps} of arm {arm}; a checkpoint is in {checkpoints}"
            )
    with saving_into(folder):
        trainer.save_model(str(folder / STUDENT_FOLDER))
    if trainer.is_world_process_zero():
        _keep_projector_beside(folder)
    return model.projector.count_parameters() if model.projector is not None else 0


def training_arguments(recipe: Recipe, output: Path) -> TrainingArguments:
    """The Trainer's arguments for a recipe; the global batch is split over processes and accumulation steps."""
    training = recipe.training
    pieces = _batch_pieces(recipe)
    planned = training.batching != "shuffled"
    if training.batch_size % pieces and not planned:
        raise RecipeError(
            f"training.batch_size {training.batch_size} cannot be split over {process_state().num_processes} processes "
            f"and {training.gradient_accumulation_steps} accumulation steps; make it a multiple of {pieces}"
        )
    checkpointing: dict[str, Any] = (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        if recipe.student.gradient_checkpointing
        else {}
    )
    return TrainingArguments(
        output_dir=str(output),
        max_steps=training.steps,
        # What is planned comes as whole batches.
        per_device_train_batch_size=1 if planned else training.batch_size // pieces,
        per_device_eval_batch_size=training.eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        eval_strategy="steps",
        eval_steps=training.evaluate_every,
        save_steps=training.save_every,
        save_total_limit=2,
        logging_steps=max(1, min(10, training.evaluate_every)),
        bf16=training.bf16,
        report_to=others_than_tensorboard(training.report_to) or "none",
        run_name=str(output.parent),
        # Trackio's, which no environment variable sets.
        project=recipe.name,
        seed=recipe.seed,
        data_seed=recipe.seed,
        remove_unused_columns=False,
        use_cpu=on_cpu(),
        dataloader_pin_memory=not on_cpu(),
        label_names=["labels"],
        disable_tqdm=True,
        **checkpointing,
    )


def training_batches(
    recipe: Recipe, dataset: DistillationDataset, collator: DistillationCollator
) -> DistillationDataset | PlannedBatches:
    """``dataset`` for the Trainer to shuffle, or all batches of the training where the recipe has them planned."""
    training = recipe.training
    if training.batching == "shuffled":
        return dataset
    lengths = [len(example.input_ids) for example in dataset.examples]
    pieces, packed = _batch_pieces(recipe), training.batching == "packed"
    budget = tokens_per_batch(recipe, lengths) // pieces
    plan = plan_batches(lengths, budget, training.steps * pieces, recipe.seed, packed=packed)
    return PlannedBatches(dataset, collator, plan, packed)


def tokens_per_batch(recipe: Recipe, lengths: Sequence[int]) -> int:
    """Most tokens of a planned batch over texts of ``lengths`` tokens, by the recipe or else by its ``batch_size``."""
    training = recipe.training
    return training.tokens_per_batch or round(training.batch_size * sum(lengths) / len(lengths))


def _batch_pieces(recipe: Recipe) -> int:
    """Batches of the data loader that make one of the recipe's."""
    return recipe.training.gradient_accumulation_steps * process_state().num_processes


def evaluations(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Held-out metrics by step, from an arm's log; after a resume the later record of a step counts."""
    by_step = {}
    for record in read_metrics(folder / METRICS_FILE):
        if "eval_loss" in record:
            metrics = {name.removeprefix("eval_"): value for name, value in record.items() if name.startswith("eval_")}
            by_step[int(record["step"])] = metrics
    return sorted(by_step.items())


def seconds_at_evaluations(folder: Path) -> dict[int, float]:
    """Wall time of an arm's training up to each evaluated step, from its log."""
    records = read_metrics(folder / METRICS_FILE)
    return {
        int(record["step"]): record["seconds"] for record in records if "eval_loss" in record and "seconds" in record
    }


def gradient_shares(folder: Path) -> dict[str, float]:
    """Mean share of each loss part in the student's gradient norm over an arm's log."""
    found: dict[str, list[float]] = {}
    for record in _training_records(folder):
        for name, value in record.items():
            if name.startswith("gradient_share/"):
                found.setdefault(name.removeprefix("gradient_share/"), []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def real_token_share(folder: Path) -> float | None:
    """Share of the tokens that an arm's student ran over that were no padding, from its log."""
    counts = [
        (record["real_tokens"], record["processed_tokens"])
        for record in _training_records(folder)
        if "processed_tokens" in record
    ]
    processed = sum(count for _, count in counts)
    return sum(count for count, _ in counts) / processed if processed else None


def gradient_shares_of(recipe: Recipe, model: DistillationModel) -> dict[str, float]:
    """Share of the gradient that the recipe gives to each part of ``model``'s loss, where it gives one."""
    shares = {
        "kv": recipe.kv_loss.gradient_share if model.layer_maps else None,
        "logit": recipe.logit_loss.gradient_share if model.logits is not None else None,
    }
    return {part: share for part, share in shares.items() if share is not None}


def non_finite_steps(folder: Path) -> int:
    """Steps of an arm's log whose loss or gradient norm is NaN or infinite."""
    return sum(
        not all(math.isfinite(record.get(name, 0.0)) for name in ("loss", "ce_loss", "kv_loss", "grad_norm"))
        for record in _training_records(folder)
    )


def _training_records(folder: Path) -> list[dict[str, Any]]:
    """What an arm's log says of training, once for each step; after a resume the later record of a step counts."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in read_metrics(folder / METRICS_FILE):
        if "loss" in record:
            # What was measured before the checkpoint may be in the earlier record alone.
            by_step.setdefault(int(record["step"]), {}).update(record)
    return list(by_step.values())


_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share_done: 1.0,
    "linear_decay": lambda share_done: max(0.0, 1.0 - share_done),
}


def _keep_projector_beside(folder: Path) -> None:
    inside, beside = folder / STUDENT_FOLDER / PROJECTOR_FOLDER, folder / PROJECTOR_FOLDER
    if inside.is_dir():
        shutil.rmtree(beside, ignore_errors=True)
        inside.rename(beside)
