"""The student and its projector as one module: a forward pass that gives every part of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgraft.distill.fused import can_fuse, fused_kv_loss
from kvgraft.distill.logit_part import LogitPart
from kvgraft.distill.logit_sources import LogitTargets
from kvgraft.distill.losses import KVScale, kv_regression_loss
from kvgraft.distill.objectives import OBJECTIVES, Comparison
from kvgraft.kv import KV
from kvgraft.models.capture import record_kv
from kvgraft.models.head import record_hidden
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import KVLossRecipe


class DistillationModel(nn.Module):
    """A student, and the adapters that tie its KV to its teachers'.

    One module, so that data-parallel wrappers see every parameter that the loss reaches.

    Args:
        student: a causal language model of transformers.
        projector: adapters for every teacher, or None for cross-entropy alone.
        layer_maps: for each teacher, the pairs of (student layer, teacher layer) that are compared.
        scales: for each teacher, centre and spread of the target.
        loss: the recipe's ``kv_loss`` section.
        teacher_weights: relative weight of each teacher.
        logits: the logit part of the loss; None for none.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        projector: KVDimensionProjector | None = None,
        *,
        layer_maps: Mapping[str, list[tuple[int, int]]] | None = None,
        scales: Mapping[str, KVScale] | None = None,
        loss: KVLossRecipe | None = None,
        teacher_weights: Mapping[str, float] | None = None,
        logits: LogitPart | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.projector = projector
        self.layer_maps = dict(layer_maps or {})
        self.scales = dict(scales or {})
        self.loss = loss or KVLossRecipe()
        names = [*self.layer_maps, *(logits.teachers if logits is not None else ())]
        self.teacher_weights = dict(teacher_weights or dict.fromkeys(names, 1.0))
        self.logits = logits
        self.kv_weight = self.loss.weight if projector is not None else 0.0
        self.logit_weight = logits.loss.weight if logits is not None else 0.0

    @property
    def student_layers(self) -> list[int]:
        """Student layers whose KV is compared with some teacher's."""
        return sorted({student for pairs in self.layer_maps.values() for student, _ in pairs})

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute the student's activations in backward; called by the Trainer."""
        self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        teacher_kv: Mapping[str, KV] | None = None,
        teacher_logits: Mapping[str, LogitTargets] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_kv_tokens: Mapping[str, Tensor | int] | None = None,
        num_logit_targets: Mapping[str, Tensor | int] | None = None,
    ) -> dict[str, Tensor]:
        """Loss and its parts for ``input_ids [batch, tokens]``.

        Args:
            labels: ``[batch, tokens]``, -100 where no loss is taken.
            teacher_kv: for each teacher, its KV aligned to the student's tokens and layers; its mask says which count.
            teacher_logits: for each teacher, what it says about the next tokens; see :mod:`~.logit_sources`.
            num_items_in_batch: labelled tokens in the whole batch; default those of this call.
            num_kv_tokens: for each teacher, aligned tokens in the whole batch; default those of this call.
            num_logit_targets: for each teacher, compared predictions in the whole batch; default those of this call.

        Returns:
            ``loss``, ``ce_loss``, and with teachers ``kv_loss`` and ``logit_loss`` and each teacher's
            ``kv_loss/<teacher>`` and ``logit_loss/<teacher>`` (unweighted).
        """
        if not self.layer_maps and self.logits is None:
            ce_loss = self._cross_entropy(input_ids, attention_mask, labels, num_items_in_batch)
            return {"loss": ce_loss, "ce_loss": ce_loss}
        with record_hidden(self.student) as hidden:
            ce_loss, student_kv = self.student_pass(input_ids, attention_mask, labels, num_items_in_batch)
        outputs = {"ce_loss": ce_loss}
        if self.layer_maps:
            kv_parts = self._kv_losses(student_kv, teacher_kv or {}, num_kv_tokens or {})
            outputs |= self._over_teachers("kv_loss", kv_parts, ce_loss)
        if self.logits is not None:
            logit_parts = self.logits.losses(
                self.student, hidden.states, input_ids, teacher_logits or {}, num_logit_targets or {}
            )
            outputs |= self._over_teachers("logit_loss", logit_parts, ce_loss)
        return {"loss": self.weighted(outputs), **outputs}

    def weighted(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The whole loss, from its parts and the present weights."""
        loss = parts["ce_loss"]
        for name, weight in (("kv_loss", self.kv_weight), ("logit_loss", self.logit_weight)):
            if name in parts:
                loss = loss + weight * parts[name]
        return loss

    def _over_teachers(self, name: str, parts: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """The mean of ``parts`` over teachers by their weights, and each teacher's own."""
        weight_sum = sum(self.teacher_weights.values())
        mean = sum(
            (self.teacher_weights[teacher] / weight_sum * part for teacher, part in parts.items()), like.new_zeros(())
        )
        return {name: mean, **{f"{name}/{teacher}": part for teacher, part in parts.items()}}

    def student_pass(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> tuple[Tensor, KV]:
        """Cross-entropy and the student's KV of the compared layers (all of them where no teacher is compared)."""
        with record_kv(self.student, layers=self.student_layers or None) as recorder:
            ce_loss = self._cross_entropy(input_ids, attention_mask, labels, num_items_in_batch)
        return ce_loss, recorder.kv(attention_mask)

    def comparison_loss(
        self, comparison: Comparison, teacher: str, mask: Tensor, num_tokens: Tensor | int | None = None
    ) -> Tensor:
        """The recipe's KV loss of one comparison, over the true tokens of ``mask``."""
        return kv_regression_loss(
            comparison.predicted,
            comparison.target,
            mask,
            scale=self.scales.get(teacher),
            form=self.loss.form,
            keys_weight=self.loss.keys_weight,
            values_weight=self.loss.values_weight,
            layer_weights=self.loss.layer_weights,
            num_tokens=num_tokens,
        )

    def compared(self, student_kv: KV, teacher: str) -> KV:
        """The layers of ``student_kv`` that ``teacher`` answers for, in the order of its layer map."""
        return student_kv.select_layers([student for student, _ in self.layer_maps[teacher]])

    def _cross_entropy(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, num_items: Tensor | int | None
    ) -> Tensor:
        # The batch may be all ignored labels; dividing by at least one keeps its loss at zero instead of NaN.
        count = (labels[:, 1:] != -100).sum() if num_items is None else torch.as_tensor(num_items)
        output = self.student(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            num_items_in_batch=count.clamp_min(1).to(input_ids.device),
            use_cache=False,
        )
        return output.loss

    def _kv_losses(
        self, student_kv: KV, teacher_kv: Mapping[str, KV], num_kv_tokens: Mapping[str, Tensor | int]
    ) -> dict[str, Tensor]:
        assert self.projector is not None
        losses = {}
        for name, target in teacher_kv.items():
            scale, num_tokens = self.scales.get(name), num_kv_tokens.get(name)
            if scale is not None and can_fuse(self.projector, name):
                losses[name] = self._fused_loss(student_kv, target, name, scale, num_tokens)
            else:
                losses[name] = self.plain_kv_loss(student_kv, target, name, num_tokens)
        return losses

    def plain_kv_loss(self, student_kv: KV, target: KV, teacher: str, num_tokens: Tensor | int | None = None) -> Tensor:
        """The KV loss of one teacher with all aligned KV held: for what :func:`can_fuse` refuses, and to check it."""
        assert self.projector is not None
        compare = OBJECTIVES[self.loss.objective]
        comparisons = compare(self.projector, teacher, self.compared(student_kv, teacher), target)
        parts = [self.comparison_loss(comparison, teacher, target.mask, num_tokens) for comparison in comparisons]
        return torch.stack(parts).sum()

    def _fused_loss(
        self, student_kv: KV, target: KV, teacher: str, scale: KVScale, num_tokens: Tensor | int | None
    ) -> Tensor:
        assert self.projector is not None
        return fused_kv_loss(
            self.projector,
            teacher,
            student_kv,
            target,
            objective=self.loss.objective,
            student_layers=[student for student, _ in self.layer_maps[teacher]],
            scale=scale,
            form=self.loss.form,
            keys_weight=self.loss.keys_weight,
            values_weight=self.loss.values_weight,
            layer_weights=self.loss.layer_weights,
            num_tokens=num_tokens,
        )
