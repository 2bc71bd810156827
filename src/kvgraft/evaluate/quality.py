"""What a student is worth on held-out text: its loss, and how its KV stands to its teachers'."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvgraft.data.batching import IGNORED
from kvgraft.evaluate.cka import effective_rank
from kvgraft.kv import KV, real_tokens
from kvgraft.models.evaluation_mode import evaluation_mode
from kvgraft.models.head import record_hidden
from kvgraft.projector.projector import KVDimensionProjector

if TYPE_CHECKING:
    from kvgraft.distill.model import DistillationModel


@dataclass(frozen=True)
class KVSimilarity:
    """How well one teacher's held-out KV is met. Lists run over the compared layers.

    R2 is 1 where the target is met and 0 at its mean. ``variance_ratio`` is the predicted variance over the target's:
    it falls to 0 when a side shrinks away. ``dead_units`` is the share of the adapters' hidden units that give zero on
    every token; None where the activation is not ReLU, which alone leaves such. Where relations are compared nothing is
    predicted, and there is only a loss.
    """

    loss: float
    keys_r2: list[float] | None = None
    values_r2: list[float] | None = None
    variance_ratio: float | None = None
    dead_units: float | None = None


@dataclass(frozen=True)
class Quality:
    """Held-out quality of one student.

    ``kv_deviation`` is the standard deviation of the student's own keys and values and ``kv_effective_rank`` the
    exponential of their spectrum's entropy, both means over layers: they tell shrinking and collapse.
    ``text_bytes`` are the bytes that the ``tokens`` stand for.
    """

    loss: float
    tokens: int
    text_bytes: int
    kv_deviation: float
    kv_effective_rank: float
    teachers: dict[str, KVSimilarity] = field(default_factory=dict)
    logit_losses: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Exponential of the loss per token."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits for each byte of the text: unlike loss and perplexity it can be compared between tokenizers.

        The loss of the end-of-text, which stands for no byte, counts. None where no byte was predicted.
        """
        return self.loss * self.tokens / (math.log(2) * self.text_bytes) if self.text_bytes else None

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a log."""
        flat = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "student_kv_deviation": self.kv_deviation,
            "student_kv_effective_rank": self.kv_effective_rank,
        }
        if self.bits_per_byte is not None:
            flat["bits_per_byte"] = self.bits_per_byte
        for name, similarity in self.teachers.items():
            flat[f"kv_loss/{name}"] = similarity.loss
            if similarity.keys_r2 and similarity.values_r2 and similarity.variance_ratio is not None:
                flat[f"keys_r2/{name}"] = _mean(similarity.keys_r2)
                flat[f"values_r2/{name}"] = _mean(similarity.values_r2)
                flat[f"kv_variance_ratio/{name}"] = similarity.variance_ratio
            if similarity.dead_units is not None:
                flat[f"dead_units/{name}"] = similarity.dead_units
        if self.teachers:
            flat["kv_loss"] = _mean([similarity.loss for similarity in self.teachers.values()])
        flat |= {f"logit_loss/{name}": loss for name, loss in self.logit_losses.items()}
        if self.logit_losses:
            flat["logit_loss"] = _mean(list(self.logit_losses.values()))
        return flat


@torch.no_grad()
def held_out_quality(model: DistillationModel, batches: Iterable[dict[str, Any]], text_bytes: int) -> Quality:
    """Measure ``model`` over ``batches`` in evaluation mode; its training mode is put back afterwards.

    ``text_bytes`` are those that the labels of all batches stand for, as ``DistillationDataset.predicted_bytes`` says.
    """
    with evaluation_mode(model):
        loss_sum, tokens = 0.0, 0
        own = _Moments(_products)
        similarity: dict[str, _SimilaritySums] = {}
        logit_sums: dict[str, tuple[float, int]] = {}
        for batch in batches:
            labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
            with record_hidden(model.student) as hidden:
                ce_loss, student_kv = model.student_pass(batch["input_ids"], batch["attention_mask"], batch["labels"])
            loss_sum, tokens = loss_sum + float(ce_loss) * labelled, tokens + labelled
            own.add(_rows(student_kv.flatten(), student_kv.mask))
            for name, target in batch.get("teacher_kv", {}).items():
                if target.mask.any():
                    similarity.setdefault(name, _SimilaritySums()).add(model, name, student_kv, target)
            targets = batch.get("teacher_logits", {})
            if model.logits is not None:
                found = model.logits.losses(model.student, hidden.states, batch["input_ids"], targets, {})
                for name, loss in found.items():
                    count = int(targets[name]["mask"].sum())
                    total, counted = logit_sums.get(name, (0.0, 0))
                    logit_sums[name] = (total + float(loss) * count, counted + count)
    covariance = own.variance()
    return Quality(
        loss=loss_sum / max(tokens, 1),
        tokens=tokens,
        text_bytes=text_bytes,
        kv_deviation=float(covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(0).sqrt().mean()),
        kv_effective_rank=float(effective_rank(covariance).mean()),
        teachers={name: sums.result() for name, sums in similarity.items()},
        logit_losses={name: total / max(counted, 1) for name, (total, counted) in logit_sums.items()},
    )


def _rows(pair: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """``[2, layers, tokens that count, width]`` of keys and values ``[batch, layers, tokens, width]``."""
    return torch.stack([real_tokens(part, mask).float() for part in pair])


def _products(rows: Tensor) -> Tensor:
    return rows.mT @ rows


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum((-2, -1))


class _Moments:
    """Running mean ``[..., width]`` and summed ``second`` moment about it of tokens ``[..., tokens, width]``.

    A batch is summed where it lies and in float32, about its own mean; batches are put together in float64 on the
    processor, since some accelerators lack it (Chan, Golub and LeVeque 1983).
    """

    def __init__(self, second: Callable[[Tensor], Tensor]) -> None:
        self.count = 0
        self._second = second
        self._mean: Tensor | float = 0.0
        self._sum: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """Take in ``rows [..., tokens, width]``, at least one token."""
        added = rows.shape[-2]
        mean = rows.mean(-2, keepdim=True)
        second = _exact(self._second(rows - mean))
        shift = _exact(mean) - self._mean
        self._sum = self._sum + second + self._second(shift) * (self.count * added / (self.count + added))
        self.count += added
        self._mean = self._mean + shift * (added / self.count)

    def variance(self) -> Tensor:
        """The mean second moment about the mean."""
        return torch.as_tensor(self._sum) / self.count


def _exact(sums: Tensor) -> Tensor:
    return sums.cpu().double()


class _SimilaritySums:
    """Running sums behind :class:`KVSimilarity`, ``[2, layers]``."""

    def __init__(self) -> None:
        self.count = 0
        self.loss_sum = 0.0
        self.residual: Tensor | float = 0.0
        self.alive: dict[int, Tensor] = {}
        self.predicted, self.target = _Moments(_squares), _Moments(_squares)

    def add(self, model: DistillationModel, name: str, student_kv: KV, target: KV) -> None:
        self.count += int(target.mask.sum())
        if model.loss.objective == "relational":
            self.loss_sum += float(model.token_errors(student_kv, name, target).sum())
            return
        assert model.projector is not None
        comparison = model.compare(student_kv, name, target)[0]
        self.loss_sum += float(model.comparison_errors(comparison, name, target.mask).sum())
        predicted, wanted = _rows(comparison.predicted, target.mask), _rows(comparison.target, target.mask)
        self.residual = self.residual + _exact(_squares(predicted - wanted))
        self.predicted.add(predicted)
        self.target.add(wanted)
        forwards = model.projector.direction == "teacher_to_student"
        self._note_alive_units(
            model.projector, name, target if forwards else model.compared(student_kv, name), target.mask
        )

    def _note_alive_units(self, projector: KVDimensionProjector, name: str, source: KV, mask: Tensor) -> None:
        inputs = projector.sources_of(name, source)
        for kind, (adapter, rows) in enumerate(zip(projector.adapters(name), inputs, strict=True)):
            if adapter.activation == "relu" and adapter.up is not None:
                real = real_tokens(rows, mask)[None]
                alive = (adapter.hidden_units(real) != 0).any(1)
                self.alive[kind] = alive | self.alive.get(kind, torch.zeros_like(alive))

    def result(self) -> KVSimilarity:
        if not isinstance(self.residual, Tensor):
            return KVSimilarity(self.loss_sum / self.count)
        predicted, target = self.predicted.variance(), self.target.variance().clamp_min(torch.finfo(torch.float64).tiny)
        r2 = 1 - self.residual / self.count / target
        return KVSimilarity(
            loss=self.loss_sum / self.count,
            keys_r2=r2[0].tolist(),
            values_r2=r2[1].tolist(),
            variance_ratio=float((predicted / target).mean()),
            dead_units=1 - _mean([float(alive.float().mean()) for alive in self.alive.values()])
            if self.alive
            else None,
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
