"""The student and its projector as one module: a forward pass that gives every part of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgraft.data.batching import IGNORED
from kvgraft.distill.fused import can_fuse, fused_kv_loss
from kvgraft.distill.fusion import TeacherFusion, count_answered
from kvgraft.distill.logit_part import LogitPart
from kvgraft.distill.logit_sources import LogitTargets
from kvgraft.distill.losses import KVScale, kv_token_errors, mean_error
from kvgraft.distill.objectives import OBJECTIVES, Comparison
from kvgraft.distill.relations import relation_errors
from kvgraft.kv import KV
from kvgraft.models.capture import record_kv
from kvgraft.models.head import record_hidden
from kvgraft.models.packing import Packing
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import KVLossRecipe


class DistillationModel(nn.Module):
    """A student, and the adapters that tie its KV to its teachers'.

    One module, so that data-parallel wrappers see every parameter that the loss reaches.

    Args:
        student: a causal language model of transformers.
        projector: adapters for every teacher; None for cross-entropy alone and for the relational objective.
        layer_maps: for each teacher, the pairs of (student layer, teacher layer) that are compared.
        scales: for each teacher, centre and spread of the target.
        student_scales: for each teacher, centre and spread of the compared student layers; the relational objective's.
        loss: the recipe's ``kv_loss`` section.
        teacher_weights: weight of each teacher, for the logit loss and for ``loss.combine: weights``; default 1.
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
        student_scales: Mapping[str, KVScale] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.projector = projector
        self.layer_maps = dict(layer_maps or {})
        self.scales = dict(scales or {})
        self.student_scales = dict(student_scales or {})
        self.loss = loss or KVLossRecipe()
        names = [*self.layer_maps, *(logits.teachers if logits is not None else ())]
        self.teacher_weights = dict(teacher_weights or dict.fromkeys(names, 1.0))
        self.logits = logits
        self.fusion = (
            TeacherFusion(list(self.layer_maps), self.loss.combine, self.teacher_weights) if self.layer_maps else None
        )
        self.kv_weight = self.loss.weight if self.layer_maps else 0.0
        self.logit_weight = logits.loss.weight if logits is not None else 0.0

    @property
    def student_layers(self) -> list[int]:
        """Student layers whose KV is compared with some teacher's."""
        return sorted({student for pairs in self.layer_maps.values() for student, _ in pairs})

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute the student's activations in backward; called by the Trainer, by newer ones with more options."""
        self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **options)

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
        teacher_log_likelihood: Mapping[str, Tensor] | None = None,
        num_taught_tokens: Tensor | int | None = None,
        packed_positions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss and its parts for ``input_ids [batch, tokens]``.

        Args:
            labels: ``[batch, tokens]``, -100 where no loss is taken.
            teacher_kv: for each teacher, its KV aligned to the student's tokens and layers; its mask says which count.
            teacher_logits: for each teacher, what it says about the next tokens; see :mod:`~.logit_sources`.
            num_items_in_batch: labelled tokens in the whole batch; default those of this call.
            num_kv_tokens: for each teacher, aligned tokens in the whole batch; default those of this call.
            num_logit_targets: for each teacher, compared predictions in the whole batch; default those of this call.
            teacher_log_likelihood: for each teacher ``[batch, tokens]``, for ``loss.combine: confidence``.
            num_taught_tokens: tokens in the whole batch that any teacher answers for; default those of this call.
            packed_positions: ``[rows, row tokens]``, where the student reads several texts in a row; see
                :mod:`kvgraft.models.packing`. Everything else stays one row for each text.

        Returns:
            ``loss``, ``ce_loss``, and with teachers ``kv_loss`` and ``logit_loss`` (of all together), each teacher's
            ``kv_loss/<teacher>`` and ``logit_loss/<teacher>`` (its own, unweighted), where several teach
            ``teacher_share/<teacher>``, and ``kv_penalty`` where ``loss.combine`` is ``learned``.
        """
        packing = None if packed_positions is None else Packing(packed_positions, attention_mask.bool())
        if self.fusion is None and self.logits is None:
            ce_loss = self._cross_entropy(input_ids, attention_mask, labels, num_items_in_batch, packing)
            return {"loss": ce_loss, "ce_loss": ce_loss}
        with record_hidden(self.student) as hidden:
            ce_loss, student_kv = self.student_pass(input_ids, attention_mask, labels, num_items_in_batch, packing)
        outputs = {"ce_loss": ce_loss}
        if self.fusion is not None:
            outputs |= self._kv_losses(
                self.fusion,
                student_kv,
                teacher_kv or {},
                num_kv_tokens or {},
                teacher_log_likelihood,
                num_taught_tokens,
            )
        if self.logits is not None:
            states = hidden.states if packing is None else packing.unpack(hidden.states)
            logit_parts = self.logits.losses(
                self.student, states, input_ids, teacher_logits or {}, num_logit_targets or {}
            )
            outputs |= self._over_teachers("logit_loss", logit_parts, ce_loss)
        return {"loss": self.weighted(outputs), **outputs}

    def weighted(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The whole loss, from its parts and the present weights."""
        loss = parts["ce_loss"]
        weights = {"kv_loss": self.kv_weight, "kv_penalty": self.kv_weight, "logit_loss": self.logit_weight}
        for name, weight in weights.items():
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
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, KV]:
        """Cross-entropy and the student's KV of the compared layers (all of them where no teacher is compared)."""
        with record_kv(self.student, layers=self.student_layers or None) as recorder:
            ce_loss = self._cross_entropy(input_ids, attention_mask, labels, num_items_in_batch, packing)
        if packing is None:
            return ce_loss, recorder.kv(attention_mask)
        return ce_loss, packing.unpack_kv(recorder.kv(packing.real, packing.position_ids))

    def token_errors(self, student_kv: KV, teacher: str, target: KV) -> Tensor:
        """Error of each token that ``target`` answers for, as the recipe's KV loss measures it: ``[real tokens]``."""
        if self.loss.objective == "relational":
            return relation_errors(
                self.compared(student_kv, teacher),
                target,
                self.student_scales[teacher],
                self.scales[teacher],
                relation_heads=self.loss.relation_heads,
                keys_weight=self.loss.keys_weight,
                values_weight=self.loss.values_weight,
                layer_weights=self.loss.layer_weights,
            )
        return torch.stack(
            [
                self.comparison_errors(comparison, teacher, target.mask)
                for comparison in self.compare(student_kv, teacher, target)
            ]
        ).sum(0)

    def compare(self, student_kv: KV, teacher: str, target: KV) -> list[Comparison]:
        """What the objective holds against what."""
        assert self.projector is not None
        return OBJECTIVES[self.loss.objective](self.projector, teacher, self.compared(student_kv, teacher), target)

    def comparison_errors(self, comparison: Comparison, teacher: str, mask: Tensor) -> Tensor:
        """Errors of one comparison over the true tokens of ``mask``: ``[real tokens]``."""
        return kv_token_errors(
            comparison.predicted,
            comparison.target,
            mask,
            scale=self.scales.get(teacher),
            form=self.loss.form,
            keys_weight=self.loss.keys_weight,
            values_weight=self.loss.values_weight,
            layer_weights=self.loss.layer_weights,
        )

    def compared(self, student_kv: KV, teacher: str) -> KV:
        """The layers of ``student_kv`` that ``teacher`` answers for, in the order of its layer map."""
        return student_kv.select_layers([student for student, _ in self.layer_maps[teacher]])

    def _cross_entropy(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_items: Tensor | int | None,
        packing: Packing | None,
    ) -> Tensor:
        # The batch may be all ignored labels; dividing by at least one keeps its loss at zero instead of NaN.
        count = (labels[:, 1:] != IGNORED).sum() if num_items is None else torch.as_tensor(num_items)
        read = (
            {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            if packing is None
            else packing.inputs(input_ids, labels)
        )
        # With that setting a mixture of experts adds the balance of its experts to its loss: part of training, but not
        # of what a held-out token costs.
        balances = getattr(self.student.config.get_text_config(), "output_router_logits", False)
        options = {"output_router_logits": False} if balances and not self.student.training else {}
        output = self.student(
            **read,
            **options,
            num_items_in_batch=count.clamp_min(1).to(input_ids.device),
            use_cache=False,
        )
        return output.loss

    def _kv_losses(
        self,
        fusion: TeacherFusion,
        student_kv: KV,
        teacher_kv: Mapping[str, KV],
        num_kv_tokens: Mapping[str, Tensor | int],
        log_likelihoods: Mapping[str, Tensor] | None,
        num_taught_tokens: Tensor | int | None,
    ) -> dict[str, Tensor]:
        masks = {name: target.mask for name, target in teacher_kv.items()}
        num_taught = count_answered(masks) if num_taught_tokens is None else num_taught_tokens
        weights = fusion.token_weights(masks, log_likelihoods)
        losses, outputs = {}, {}
        for name, target in teacher_kv.items():
            losses[name], own = self._teacher_loss(student_kv, target, name, weights[name], num_taught)
            count = num_kv_tokens.get(name, target.mask.sum())
            # Both were divided by the tokens that any teacher answers for.
            outputs[f"kv_loss/{name}"] = own * (_at_least_one(num_taught, own) / _at_least_one(count, own))
        fused = fusion.combined(losses, weights, num_taught)
        if len(losses) > 1:
            outputs |= {f"teacher_share/{name}": share for name, share in fused.shares.items()}
        if fusion.log_errors is not None:
            outputs["kv_penalty"] = fused.penalty
        return {"kv_loss": fused.loss, **outputs}

    def _teacher_loss(
        self, student_kv: KV, target: KV, teacher: str, token_weights: Tensor, num_tokens: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """Loss of one teacher by ``token_weights``, and without them and without gradient, both over ``num_tokens``."""
        if self.projector is None or teacher not in self.scales or not can_fuse(self.projector, teacher):
            errors = self.token_errors(student_kv, teacher, target)
            weighted = mean_error(token_weights[target.mask] * errors, num_tokens)
            return weighted, mean_error(errors.detach(), num_tokens)
        return fused_kv_loss(
            self.projector,
            teacher,
            student_kv,
            target,
            objective=self.loss.objective,
            student_layers=[student for student, _ in self.layer_maps[teacher]],
            scale=self.scales[teacher],
            form=self.loss.form,
            keys_weight=self.loss.keys_weight,
            values_weight=self.loss.values_weight,
            layer_weights=self.loss.layer_weights,
            num_tokens=num_tokens,
            token_weights=token_weights,
            compiled=self.loss.compile,
        )


def _at_least_one(count: Tensor | int, like: Tensor) -> Tensor:
    return torch.as_tensor(count, device=like.device).clamp_min(1)
