"""Training the adapters alone, on pairs of KV, with the transformers Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerControl, TrainingArguments

from kvgraft.distill.callbacks import InterruptCallback, MetricsCallback, ProgressCallback
from kvgraft.distill.checkpoints import CHECKPOINTS_FOLDER, CheckpointingTrainer, last_checkpoint, train_from
from kvgraft.distill.trainer import PROJECTOR_FOLDER
from kvgraft.errors import TrainingInterruptedError
from kvgraft.fit.data import KVRows, PairDataset, TokenBatches
from kvgraft.processes import on_cpu
from kvgraft.progress import progress_bar
from kvgraft.projector.layerwise import layerwise_loss
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import ContinuationRecipe, FitRecipe
from kvgraft.report.results import METRICS_FILE

_WARMUP_SHARE = 0.1


class FitModel(nn.Module, ABC):
    """What :func:`train_fit` trains: ``forward`` gives ``loss`` for a batch."""

    @abstractmethod
    def held_out_losses(self) -> dict[str, float]:
        """``loss`` and its parts on held-out text; called with dropout off."""

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Groups of the optimizer; none for what the Trainer makes of all parameters."""
        return []

    @abstractmethod
    def save_trained(self, folder: Path) -> None:
        """Write what is trained."""

    @abstractmethod
    def load_trained(self, folder: Path) -> None:
        """Read what :meth:`save_trained` wrote."""


class RegressionModel(FitModel):
    """The projector and its squared error on a batch of tokens.

    Args:
        projector: standardised, so that an error of 1 is what predicting the mean costs.
        teacher: its name.
        key_metric: ``[output layers, heads, head_dim, head_dim]``, what the errors of each key head are multiplied by
            before they are squared (:func:`key_metric_from`); default nothing.
        held_out: tokens to watch it on.
    """

    def __init__(
        self,
        projector: KVDimensionProjector,
        teacher: str,
        key_metric: Tensor | None = None,
        held_out: KVRows | None = None,
    ) -> None:
        super().__init__()
        self.projector, self.teacher, self.held_out = projector, teacher, held_out
        self.key_metric: Tensor | None
        self.register_buffer("key_metric", key_metric, persistent=False)

    def forward(self, source: Tensor, target: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Mean squared error of keys and of values over the target's variance, each layer counting alike.

        Args:
            source: ``[2, source layers, tokens, width]``, keys first.
            target: ``[2, output layers, tokens, width]``.
            weights: ``[output layers, tokens]``, how much each token counts, about 1 on average; default alike.
        """
        wanted = self.projector.targets_of(self.teacher, *target[:, None])
        sources = self.projector.sources_of_rows(self.teacher, *source[:, None])
        metrics = (self.key_metric, None)
        adapters = self.projector.adapters(self.teacher)
        keys_loss, values_loss = (
            layerwise_loss(adapter, x, partial(_squared_error, y, metric, weights))
            for adapter, x, y, metric in zip(adapters, sources, wanted, metrics, strict=True)
        )
        return {"loss": keys_loss + values_loss, "keys_loss": keys_loss, "values_loss": values_loss}

    @torch.no_grad()
    def held_out_losses(self) -> dict[str, float]:
        """Loss of keys and of values, which is one minus their R2; tokens count alike."""
        assert self.held_out is not None
        device = next(self.parameters()).device
        losses = self(self.held_out.source.to(device), self.held_out.target.to(device))
        return {name: float(loss) for name, loss in losses.items()}

    def save_trained(self, folder: Path) -> None:
        """The projector."""
        self.projector.save_pretrained(folder / PROJECTOR_FOLDER)

    def load_trained(self, folder: Path) -> None:
        """The projector."""
        self.projector.load_state_dict(KVDimensionProjector.from_pretrained(folder / PROJECTOR_FOLDER).state_dict())


class FitTrainer(CheckpointingTrainer):
    """The Trainer over a :class:`FitModel`, which says what is measured, optimized and saved."""

    control: TrainerControl

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The model's losses on held-out text."""
        model = self._fit_model
        model.eval()
        metrics = {f"{metric_key_prefix}_{name}": loss for name, loss in model.held_out_losses().items()}
        model.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the model's groups, where it has some."""
        groups = self._fit_model.parameter_groups(self.args.learning_rate)
        if not groups:
            return super().create_optimizer()
        self.optimizer = torch.optim.AdamW(groups, weight_decay=self.args.weight_decay)
        return self.optimizer

    @property
    def _fit_model(self) -> FitModel:
        return self.accelerator.unwrap_model(self.model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        self._fit_model.save_trained(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._fit_model.load_trained(Path(resume_from_checkpoint))


def train_projector(model: RegressionModel, settings: FitRecipe, train: PairDataset, folder: Path, seed: int) -> None:
    """Train ``model`` on the tokens of ``train``; otherwise as :func:`train_fit`."""
    batches = TokenBatches(train, settings.tokens_per_step, seed)
    train_fit(model, settings, batches, _only, folder, seed, "fitting the projector")


def train_fit(
    model: FitModel,
    settings: FitRecipe | ContinuationRecipe,
    batches: Dataset[Any] | list[Any],
    collator: Callable[[list[Any]], dict[str, Tensor]],
    folder: Path,
    seed: int,
    label: str,
) -> None:
    """Train ``model`` for ``settings.steps`` steps, from the last checkpoint in ``folder`` if it holds one.

    Metrics go to ``folder/metrics.jsonl``.

    Args:
        batches: each item is a batch.
        collator: makes the model's arguments of a list of one item.
        label: what the progress bar says.

    Raises:
        TrainingInterruptedError: Ctrl-C; a checkpoint was left.
    """
    checkpoints = folder / CHECKPOINTS_FOLDER
    last, done = last_checkpoint(checkpoints)
    interrupt = InterruptCallback()
    with progress_bar(label, settings.steps, "steps", done=done) as advance:
        trainer = FitTrainer(
            model=model,
            args=_arguments(settings, checkpoints, seed),
            train_dataset=batches,
            eval_dataset=[],
            data_collator=collator,
            callbacks=[ProgressCallback(advance), MetricsCallback(folder / METRICS_FILE, "fit"), interrupt],
        )
        trainer.remove_callback(PrinterCallback)
        train_from(trainer, last, done)
    if interrupt.interrupted and trainer.state.global_step < settings.steps:
        raise TrainingInterruptedError(
            f"stopped at step {trainer.state.global_step} of {settings.steps}; a checkpoint is in {checkpoints}"
        )
    model.eval()


def key_metric_from(query_moments: Tensor, layers: Sequence[int]) -> Tensor:
    """The square roots ``[chosen layers, heads, head_dim, head_dim]`` of ``query_moments``, per layer of mean square 1.

    A difference of keys times such a root, squared, is the squared difference of scores; on average over channels it
    counts as much as the difference alone.

    Args:
        query_moments: as in :class:`kvgraft.models.attention.Reading`.
    """
    chosen = query_moments[list(layers)].double()
    values, vectors = torch.linalg.eigh(chosen)
    roots = vectors * values.clamp_min(0).sqrt()[..., None, :] @ vectors.mT
    level = values.clamp_min(0).mean((1, 2)).sqrt()
    return (roots / level[:, None, None, None]).float()


def _squared_error(
    target: Tensor, metric: Tensor | None, weights: Tensor | None, output: Tensor, layers: slice
) -> Tensor:
    """What ``output [1, layers, tokens, width]`` adds to the mean over all layers of ``target``."""
    difference = output - target[:, layers]
    if metric is not None:
        difference = _in_metric(difference, metric[layers])
    error = difference.square()
    if weights is not None:
        error = error * weights[layers, :, None]
    return error.sum() / target.numel()


def _in_metric(difference: Tensor, metric: Tensor) -> Tensor:
    """``difference [1, layers, tokens, width]`` of keys, each head times ``metric [layers, heads, dim, dim]``."""
    layers, tokens, _ = difference.shape[1:]
    heads = difference[0].reshape(layers, tokens, *metric.shape[1:3]).transpose(1, 2)
    return (heads @ metric).transpose(1, 2).flatten(2)[None]


def _arguments(settings: FitRecipe | ContinuationRecipe, output: Path, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.steps * _WARMUP_SHARE),
        max_grad_norm=1.0,
        bf16=settings.bf16,
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
        label_names=[],
        # An item is a batch already, to be neither split nor sent around.
        accelerator_config={"dispatch_batches": False},
    )


def _only(rows: list[KVRows]) -> dict[str, Tensor]:
    """A batch of the data set is a batch of the Trainer already."""
    batch = {"source": rows[0].source, "target": rows[0].target}
    return batch if rows[0].weights is None else {**batch, "weights": rows[0].weights}
