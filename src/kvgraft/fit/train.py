"""Training the adapters alone, on pairs of KV, with the transformers Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerControl, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from kvgraft.distill.callbacks import InterruptCallback, MetricsCallback, ProgressCallback
from kvgraft.distill.trainer import PROJECTOR_FOLDER
from kvgraft.errors import TrainingInterruptedError
from kvgraft.fit.data import KVRows, PairDataset, TokenBatches
from kvgraft.processes import on_cpu
from kvgraft.progress import progress_bar
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import FitRecipe

METRICS_FILE, CHECKPOINTS_FOLDER = "metrics.jsonl", "checkpoints"
_WARMUP_SHARE = 0.1
_EVALUATION_TOKENS = 2048


class FitModel(nn.Module):
    """The projector and its loss on a batch of tokens.

    Args:
        projector: standardised, so that an error of 1 is what predicting the mean costs.
        teacher: its name.
        key_metric: ``[output layers, width]``, how much the squared error of each key channel counts, 1 on average;
            default alike.
    """

    def __init__(self, projector: KVDimensionProjector, teacher: str, key_metric: Tensor | None = None) -> None:
        super().__init__()
        self.projector, self.teacher = projector, teacher
        self.key_metric: Tensor | None
        self.register_buffer("key_metric", key_metric, persistent=False)

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Mean squared error of keys and of values over the target's variance, each layer counting alike.

        Args:
            source: ``[2, source layers, tokens, width]``, keys first.
            target: ``[2, output layers, tokens, width]``.
        """
        wanted = self.projector.targets_of(self.teacher, *target[:, None])
        sources = self.projector.sources_of_rows(self.teacher, *source[:, None])
        errors = [
            (adapter(x) - y).square()
            for adapter, x, y in zip(self.projector.adapters(self.teacher), sources, wanted, strict=True)
        ]
        if self.key_metric is not None:
            errors[0] = errors[0] * self.key_metric[:, None]
        keys_loss, values_loss = (error.mean() for error in errors)
        return {"loss": keys_loss + values_loss, "keys_loss": keys_loss, "values_loss": values_loss}


class FitTrainer(Trainer):
    """The Trainer over :class:`TokenBatches`; checkpoints hold the projector."""

    control: TrainerControl

    def __init__(self, *args: Any, held_out: KVRows, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held_out = held_out

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss of keys and of values on held-out tokens, which is one minus their R2."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        with torch.no_grad():
            losses = model(self.held_out.source.to(self.args.device), self.held_out.target.to(self.args.device))
        model.train()
        metrics = {f"{metric_key_prefix}_{name}": float(value) for name, value in losses.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        projector = self.accelerator.unwrap_model(self.model).projector
        projector.save_pretrained(Path(output_dir or self.args.output_dir) / PROJECTOR_FOLDER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = KVDimensionProjector.from_pretrained(Path(resume_from_checkpoint) / PROJECTOR_FOLDER)
        self.accelerator.unwrap_model(self.model).projector.load_state_dict(saved.state_dict())


def train_projector(
    model: FitModel, settings: FitRecipe, train: PairDataset, held_out: PairDataset, folder: Path, seed: int
) -> None:
    """Train ``model`` for ``settings.steps`` steps, from the last checkpoint in ``folder`` if it holds one.

    Metrics go to ``folder/metrics.jsonl``.

    Raises:
        TrainingInterruptedError: Ctrl-C; a checkpoint was left.
    """
    checkpoints = folder / CHECKPOINTS_FOLDER
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    done = int(last.rsplit("-", 1)[1]) if last else 0
    interrupt = InterruptCallback()
    with progress_bar("fitting the projector", settings.steps, "steps", done=done) as advance:
        trainer = FitTrainer(
            model=model,
            args=_arguments(settings, checkpoints, seed),
            train_dataset=TokenBatches(train, settings.tokens_per_step, seed),
            eval_dataset=[],
            data_collator=_only,
            callbacks=[ProgressCallback(advance), MetricsCallback(folder / METRICS_FILE, "fit"), interrupt],
            held_out=held_out.rows(_EVALUATION_TOKENS),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=last)
    if interrupt.interrupted and trainer.state.global_step < settings.steps:
        raise TrainingInterruptedError(
            f"stopped at step {trainer.state.global_step} of {settings.steps}; a checkpoint is in {checkpoints}"
        )
    model.eval()


def key_metric_from(query_moments: Tensor, layers: Sequence[int]) -> Tensor:
    """``[layers, kv heads, head_dim]`` mean squares of the queries as a metric ``[chosen layers, width]`` of mean 1."""
    chosen = query_moments[list(layers)].flatten(1)
    return chosen / chosen.mean(1, keepdim=True)


def _arguments(settings: FitRecipe, output: Path, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.steps * _WARMUP_SHARE),
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=settings.evaluate_every,
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=min(10, settings.evaluate_every),
        report_to="none",
        seed=seed,
        remove_unused_columns=False,
        use_cpu=on_cpu(),
        disable_tqdm=True,
        dataloader_pin_memory=False,
        label_names=["target"],
    )


def _only(rows: list[KVRows]) -> dict[str, Tensor]:
    """A batch of the data set is a batch of the Trainer already."""
    return {"source": rows[0].source, "target": rows[0].target}
