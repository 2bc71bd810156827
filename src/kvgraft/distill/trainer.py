"""The transformers Trainer with a KV loss beside cross-entropy and a second optimizer group, and nothing more."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainingArguments

from kvgraft.data.batching import IGNORED
from kvgraft.distill.callbacks import ReadAheadCallback
from kvgraft.distill.checkpoints import CheckpointingTrainer
from kvgraft.distill.dataset import Batches, DistillationCollator, DistillationDataset, PlannedBatches
from kvgraft.distill.model import DistillationModel
from kvgraft.evaluate.quality import held_out_quality
from kvgraft.models.loading import load_weights
from kvgraft.models.lora import save_student
from kvgraft.projector.projector import KVDimensionProjector

PROJECTOR_FOLDER = "projector"
LOSS_WEIGHTS_FILE = "loss_weights.json"
TEACHER_WEIGHTS_FILE = "teacher_weights.safetensors"


class KVTrainer(CheckpointingTrainer):
    """Trains a :class:`DistillationModel`.

    Args:
        model: student and projector.
        args: the Trainer's own arguments; ``learning_rate`` is the student's.
        projector_learning_rate: rate of the second optimizer group (the guide: student 5e-5, projector 1e-3).
        kv_weight_schedule: factor on the KV loss's weight for a share of training done, in [0, 1]; default constant.
        logit_weight_schedule: the same for the logit loss.
        gradient_shares: for parts ``kv`` and ``logit``, the share of the student's gradient norm that the part is to
            have where both losses' gradients are measured; its weight is set then, before the schedule.
        measure_shares_every: steps between measurements of each loss part's share of the student's gradient; 0 never.

    The others are the Trainer's.
    """

    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(
        self,
        model: DistillationModel,
        args: TrainingArguments,
        train_dataset: DistillationDataset | PlannedBatches,
        eval_dataset: DistillationDataset,
        processing_class: PreTrainedTokenizerBase,
        *,
        data_collator: DistillationCollator,
        callbacks: list[TrainerCallback] | None = None,
        projector_learning_rate: float = 1e-3,
        kv_weight_schedule: Callable[[float], float] | None = None,
        logit_weight_schedule: Callable[[float], float] | None = None,
        gradient_shares: Mapping[str, float] | None = None,
        measure_shares_every: int = 0,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=_the_only_one if isinstance(train_dataset, PlannedBatches) else data_collator,
            callbacks=callbacks,
        )
        self.held_out_collator = data_collator
        # The loss below is a sum over the whole batch's count, so the Trainer must count and must not divide again.
        self.model_accepts_loss_kwargs = True
        self.projector_learning_rate = projector_learning_rate
        self.weight_schedules = {
            "kv": kv_weight_schedule or (lambda share_done: 1.0),
            "logit": logit_weight_schedule or (lambda share_done: 1.0),
        }
        self.gradient_shares = dict(gradient_shares or {})
        # Before the schedule; those of gradient_shares change as training goes on.
        self.part_weights = {"kv": model.kv_weight, "logit": model.logit_weight}
        self.measure_shares_every = measure_shares_every
        # A teacher that runs as its texts are read would run in a thread, which capture cannot be watched from.
        self._read_ahead = None if train_dataset.runs_teachers else ReadAheadCallback()
        if self._read_ahead is not None:
            self.add_callback(self._read_ahead)
        self._num_kv_tokens: dict[str, Tensor] = {}
        self._num_logit_targets: dict[str, Tensor] = {}
        self._num_taught_tokens: Tensor | None = None
        self._part_sums: dict[str, Tensor] = {}
        self._summed_steps = 0
        self._shares: dict[str, float] = {}
        self._shares_measured_at = -1

    @property
    def distillation(self) -> DistillationModel:
        """The model without what the Trainer or Accelerate wrapped around it."""
        return self.accelerator.unwrap_model(self.model)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        """The Trainer's own, but the order of a plan as it stands."""
        if isinstance(self.train_dataset, PlannedBatches):
            return SequentialSampler(self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or what ``args.optim`` names) with the student and what ties it to its teachers in groups apart."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decayed = set(self.get_decay_parameter_names(self.model))
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((".student." not in f".{name}", name in decayed), []).append(parameter)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.projector_learning_rate if of_projector else self.args.learning_rate,
                        "weight_decay": self.args.weight_decay if has_decay else 0.0,
                    }
                    for (of_projector, has_decay), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The micro-batches of one step, read while the step before ran where no teacher has to run for it.

        Counts their aligned tokens over all processes beside the labelled ones.
        """
        batches = epoch_iterator if self._read_ahead is None else self._read_ahead.batches(epoch_iterator, num_batches)
        heard = (self._without_repeated(batch, number) for number, batch in enumerate(batches))
        samples, num_items = super().get_batch_samples(heard, num_batches, device)
        self._summed_steps += 1
        self._add_parts(_count_tokens(samples, device))
        self._num_kv_tokens, self._num_taught_tokens = {}, None
        names = list(self.distillation.layer_maps) if samples else []
        if names:
            # With two teachers one may be missing for some samples, so each has its own count.
            masks = [torch.stack([batch["teacher_kv"][name].mask for name in names]) for batch in samples]
            counts = [[mask[index].sum() for index in range(len(names))] + [mask.any(0).sum()] for mask in masks]
            total = torch.tensor(counts, device=device).sum(0)
            *own, self._num_taught_tokens = self.accelerator.reduce(total, reduction="sum")
            self._num_kv_tokens = dict(zip(names, own, strict=True))
        self._num_logit_targets = {}
        for name in samples[0].get("teacher_logits", {}) if samples else ():
            count = sum(int(batch["teacher_logits"][name]["mask"].sum()) for batch in samples)
            self._num_logit_targets[name] = self.accelerator.reduce(torch.tensor(count, device=device), reduction="sum")
        return samples, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy plus the weighted KV and logit losses, each over the whole batch's own count of tokens."""
        self._set_weights()
        outputs = model(
            **inputs,
            num_items_in_batch=num_items_in_batch,
            num_kv_tokens=self._num_kv_tokens,
            num_logit_targets=self._num_logit_targets,
            num_taught_tokens=self._num_taught_tokens,
        )
        self._measure_shares(outputs)
        if self.gradient_shares:
            outputs = {**outputs, "loss": self.distillation.weighted(outputs)}
        self._add_parts(outputs)
        # Data parallelism averages gradients over processes, while the counts above are sums over them.
        loss = outputs["loss"] * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: DistillationDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out quality (see :func:`kvgraft.evaluate.quality.held_out_quality`)."""
        dataset = eval_dataset or self.eval_dataset
        # Every process reads the whole set: it is small, and sums then need no gathering.
        batches = Batches(dataset, self.held_out_collator, self.args.eval_batch_size, self.args.device)
        quality = held_out_quality(self.distillation, batches, dataset.predicted_bytes)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in quality.metrics().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each loss part's mean since the last log, and its share of the gradient, to a training log."""
        if "loss" in logs and self._summed_steps > 0:
            for name, total in self._part_sums.items():
                logs[name] = float(self.accelerator.reduce(total, reduction="sum")) / self._summed_steps
            logs.update(self._shares)
            self._part_sums, self._shares, self._summed_steps = {}, {}, 0
        if isinstance(self.train_dataset, PlannedBatches):
            # To the Trainer a plan is one epoch, however often it reads the texts.
            batches_per_step = len(self.train_dataset) // self.args.max_steps
            self.state.epoch = self.train_dataset.epochs(self.state.global_step * batches_per_step)
        super().log(logs, start_time)

    def _without_repeated(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """``batch``, this step's micro-batch ``number``, with no loss on texts that the epoch has had already.

        Accelerate repeats its first ones at its end, so that every process gets as many batches.
        """
        args, num_texts = self.args, len(self.train_dataset)
        if args.world_size == 1 or isinstance(self.train_dataset, PlannedBatches):
            return batch
        pieces = args.gradient_accumulation_steps * args.world_size
        step = self.state.global_step % math.ceil(num_texts / (pieces * args.train_batch_size))
        piece = step * pieces + number * args.world_size + args.process_index
        repeated = slice(max(0, num_texts - piece * args.train_batch_size), None)
        batch["labels"][repeated] = IGNORED
        for kv in batch.get("teacher_kv", {}).values():
            kv.mask[repeated] = False
        for target in batch.get("teacher_logits", {}).values():
            target["mask"][repeated] = False
        return batch

    def _add_parts(self, outputs: dict[str, Tensor]) -> None:
        for name, value in outputs.items():
            if name != "loss":
                self._part_sums[name] = self._part_sums.get(name, 0.0) + value.detach()

    def _measure_shares(self, outputs: dict[str, Tensor]) -> None:
        step = self.state.global_step
        due = self.measure_shares_every and step % self.measure_shares_every == 0 and step != self._shares_measured_at
        parts = {part: outputs[f"{part}_loss"] for part in ("ce", "kv", "logit") if f"{part}_loss" in outputs}
        if not due or len(parts) < 2 or self.is_fsdp_enabled:
            return
        self._shares_measured_at = step
        parameters = [parameter for parameter in self.distillation.student.parameters() if parameter.requires_grad]
        norms = {part: _gradient_norm(loss, parameters) for part, loss in parts.items()}
        if self.gradient_shares:
            measured = self.accelerator.reduce(torch.tensor(list(norms.values()), device=self.args.device), "mean")
            norms = dict(zip(norms, measured.tolist(), strict=True))
            self.part_weights |= weights_for_shares(norms, self.part_weights, self.gradient_shares)
            self._set_weights()
        weights = {"ce": 1.0, "kv": self.distillation.kv_weight, "logit": self.distillation.logit_weight}
        weighted = {part: weights[part] * norm for part, norm in norms.items()}
        total = sum(weighted.values()) or 1.0
        self._shares = {f"gradient_share/{part}": norm / total for part, norm in weighted.items()}
        if self.gradient_shares:
            self._shares |= {f"weight/{part}": self.part_weights[part] for part in self.gradient_shares}

    def _set_weights(self) -> None:
        share_done = self.state.global_step / max(self.state.max_steps, 1)
        model = self.distillation
        model.kv_weight, model.logit_weight = (
            self.part_weights[part] * self.weight_schedules[part](share_done) for part in ("kv", "logit")
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The student in the Hugging Face layout, the projector in a folder beside its files."""
        # Newer Trainers call this in every process, and those of one folder would take each other's files away.
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model = self.distillation
        save_student(model.student, folder, _strip_prefix(state_dict, "student."))
        if model.projector is not None:
            model.projector.save_pretrained(
                folder / PROJECTOR_FOLDER, state_dict=_strip_prefix(state_dict, "projector.")
            )
        if model.fusion is not None and model.fusion.state_dict():
            (folder / PROJECTOR_FOLDER).mkdir(parents=True, exist_ok=True)
            save_file(model.fusion.state_dict(), folder / PROJECTOR_FOLDER / TEACHER_WEIGHTS_FILE)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.gradient_shares:
            # Measured and not only set, so that a resumed run has to be told.
            (folder / LOSS_WEIGHTS_FILE).write_text(json.dumps(self.part_weights) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        target = self.distillation
        load_weights(target.student, folder)
        if target.projector is not None:
            saved = KVDimensionProjector.from_pretrained(folder / PROJECTOR_FOLDER)
            target.projector.load_state_dict(saved.state_dict())
        if target.fusion is not None and target.fusion.state_dict():
            target.fusion.load_state_dict(load_file(folder / PROJECTOR_FOLDER / TEACHER_WEIGHTS_FILE))
        if self.gradient_shares:
            self.part_weights = json.loads((folder / LOSS_WEIGHTS_FILE).read_text(encoding="utf-8"))


def weights_for_shares(
    norms: Mapping[str, float], weights: Mapping[str, float], shares: Mapping[str, float]
) -> dict[str, float]:
    """Weight of each part in ``shares`` with which its gradient has that share of the summed norms.

    Args:
        norms: gradient norm of each part without its weight; ``ce`` among them, whose weight is 1.
        weights: weights of the other parts, which stay where ``shares`` does not name them.
        shares: parts to be weighted; their sum is below 1. A part without gradient keeps its weight.
    """
    fixed = sum((1.0 if part == "ce" else weights[part]) * norm for part, norm in norms.items() if part not in shares)
    whole = fixed / (1 - sum(share for part, share in shares.items() if norms.get(part)))
    return {part: share * whole / norms[part] for part, share in shares.items() if norms.get(part)}


def _the_only_one(samples: list[dict[str, Any]]) -> dict[str, Any]:
    (sample,) = samples
    return sample


def _count_tokens(batches: list[dict[str, Any]], device: torch.device) -> dict[str, Tensor]:
    """Tokens of texts in ``batches``, and tokens that the student runs over for them."""
    real = sum((batch["attention_mask"].sum() for batch in batches), torch.zeros((), device=device))
    processed = sum(batch.get("packed_positions", batch["input_ids"]).numel() for batch in batches)
    return {"real_tokens": real, "processed_tokens": torch.tensor(float(processed), device=device)}


def _gradient_norm(loss: Tensor, parameters: list[nn.Parameter]) -> float:
    if not loss.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    # None at all where low-rank adapters sit behind the compared layers: the loss then moves the projector alone.
    norms = [gradient.norm() for gradient in gradients if gradient is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def _strip_prefix(state_dict: dict[str, Tensor] | None, prefix: str) -> dict[str, Tensor] | None:
    if state_dict is None:
        return None
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
