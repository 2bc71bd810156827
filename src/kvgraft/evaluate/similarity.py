"""How alike a student's KV and a teacher's are, layer by layer, on held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kvgraft.distill.model import DistillationModel
from kvgraft.distill.objectives import OBJECTIVES
from kvgraft.errors import DataError
from kvgraft.evaluate.cka import LinearCKA
from kvgraft.kv import KV, real_tokens
from kvgraft.models.capture import capture
from kvgraft.models.evaluation_mode import evaluation_mode
from kvgraft.projector.closed_form import LeastSquares, solve_with_chosen_ridge
from kvgraft.report.results import Record

Kind = Literal["keys", "values"]
KINDS: tuple[Kind, ...] = ("keys", "values")
Batches = Iterable[dict[str, Any]]
# Every fifth text of the training text stays out of the fit and chooses its ridge.
_KEPT_OUT_EVERY = 5


class LayerSimilarity(Record):
    """Keys or values of one student layer beside those of the teacher layer that answers for it.

    R2 is 1 where the target is met and 0 at its mean. A cosine is the mean over tokens of that between prediction and
    target, both less the target's mean on training text: with it, all keys of a layer point much the same way.

    Attributes:
        projector_r2, projector_cosine: of the run's own comparison, through the saved projector; None where the arm
            trained none.
        least_squares_r2, least_squares_cosine: of the teacher's from the student's, by the best linear map, fitted on
            training text.
        cka: linear CKA, in [0, 1].
        student_effective_rank, teacher_effective_rank: exponential of the entropy of each side's spectrum.
    """

    kind: Kind
    student_layer: int
    teacher_layer: int
    projector_r2: float | None = None
    projector_cosine: float | None = None
    least_squares_r2: float
    least_squares_cosine: float
    cka: float
    student_effective_rank: float
    teacher_effective_rank: float


@torch.no_grad()
def layer_similarity(
    model: DistillationModel, teacher: str, layer_map: list[tuple[int, int]], train: Batches, held_out: Batches
) -> list[LayerSimilarity]:
    """Keys, then values, of every pair in ``layer_map``.

    Args:
        model: a trained student, with its projector or without one.
        teacher: a name in the batches' ``teacher_kv``.
        layer_map: pairs of (student layer, teacher layer).
        train: batches to fit least squares on.
        held_out: batches to measure on.

    Raises:
        DataError: the teacher answers for no token of one of the texts.
    """
    with evaluation_mode(model):
        kinds = [_KindSimilarity(kind) for kind in KINDS]
        layers = [student for student, _ in layer_map]
        texts = 0
        for student, target in _pairs(model, teacher, layers, train):
            number = texts + target.mask.any(1).cumsum(0)
            texts = int(number[-1])
            kept_out = (number % _KEPT_OUT_EVERY == 0)[:, None].expand_as(target.mask)[target.mask].cpu()
            for kind, sides in enumerate(_sides(model, teacher, student, target)):
                for chooses_ridge, tokens in ((False, ~kept_out), (True, kept_out)):
                    if bool(tokens.any()):
                        kinds[kind].fit(sides.select(tokens), chooses_ridge)
        if not kinds[0].fitted_tokens:
            raise DataError(
                f"teacher {teacher} answers for no token of the training text, so there is nothing to fit on"
            )
        for similarity in kinds:
            similarity.solve()
        for student, target in _pairs(model, teacher, layers, held_out):
            for kind, sides in enumerate(_sides(model, teacher, student, target)):
                kinds[kind].add(sides)
        if not kinds[0].cka.tokens:
            raise DataError(
                f"teacher {teacher} answers for no token of the held-out text, so there is nothing to compare: lower "
                "its alignment.skip_first_tokens or hold out longer texts"
            )
    return [layer for similarity in kinds for layer in similarity.result(layer_map)]


@dataclass(frozen=True)
class _Sides:
    """Keys or values of the tokens that count: ``[layers, tokens, width]`` float64 on the processor.

    ``predicted`` and ``aim`` are the run's own comparison through its projector, None where there is none.
    """

    student: Tensor
    teacher: Tensor
    predicted: Tensor | None
    aim: Tensor | None

    def select(self, tokens: Tensor) -> _Sides:
        """Those of ``tokens``, bool."""
        parts = (self.student, self.teacher, self.predicted, self.aim)
        return _Sides(*(None if part is None else part[:, tokens] for part in parts))  # type: ignore[arg-type]


def _pairs(
    model: DistillationModel, teacher: str, student_layers: list[int], batches: Batches
) -> Iterator[tuple[KV, KV]]:
    """KV of the student and of the teacher for every batch that has tokens of both."""
    for batch in batches:
        target: KV = batch["teacher_kv"][teacher]
        if bool(target.mask.any()):
            kv = capture(model.student, batch["input_ids"], batch["attention_mask"])
            yield kv.select_layers(student_layers), target


def _sides(model: DistillationModel, teacher: str, student_kv: KV, teacher_kv: KV) -> list[_Sides]:
    """Keys, then values, of one batch."""
    mask = teacher_kv.mask
    own, wanted = (_rows(kv.flatten(), mask) for kv in (student_kv, teacher_kv))
    if model.projector is None:
        return [_Sides(student, target, None, None) for student, target in zip(own, wanted, strict=True)]
    comparison = OBJECTIVES[model.loss.objective](model.projector, teacher, student_kv, teacher_kv)[0]
    predicted, aim = _rows(comparison.predicted, mask), _rows(comparison.target, mask)
    trained = (model.loss.keys_weight > 0, model.loss.values_weight > 0)
    return [
        _Sides(own[kind], wanted[kind], *((predicted[kind], aim[kind]) if trained[kind] else (None, None)))
        for kind in range(len(KINDS))
    ]


def _rows(pair: tuple[Tensor, Tensor], mask: Tensor) -> list[Tensor]:
    """``[batch, layers, tokens, width]`` as ``[layers, tokens that count, width]``, keys and values."""
    # On the processor: some accelerators lack float64.
    return [real_tokens(part, mask).cpu().double() for part in pair]


class _KindSimilarity:
    """Running sums behind :class:`LayerSimilarity`, of keys or of values."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.fitted_tokens = 0
        self._fits: tuple[LeastSquares, LeastSquares]
        self._map: tuple[Tensor, Tensor]
        self._teacher_sum: Tensor | float = 0.0
        self._aim_sum: Tensor | float = 0.0
        self.cka: LinearCKA
        self._least_squares: _Prediction
        self._projector: _Prediction | None = None

    def fit(self, sides: _Sides, chooses_ridge: bool) -> None:
        """Take in training text."""
        layers, tokens, width = sides.student.shape
        if not self.fitted_tokens:
            sizes = (layers, width, sides.teacher.shape[-1])
            self._fits = (LeastSquares(*sizes), LeastSquares(*sizes))
        everyone = torch.ones(1, tokens, dtype=torch.bool)
        self._fits[chooses_ridge].add(sides.student[None], sides.teacher[None], everyone)
        self.fitted_tokens += tokens
        self._teacher_sum = self._teacher_sum + sides.teacher.sum(1, keepdim=True)
        if sides.aim is not None:
            self._aim_sum = self._aim_sum + sides.aim.sum(1, keepdim=True)

    def solve(self) -> None:
        """Find the linear map; what comes next is held-out text."""
        fitting, choosing = self._fits
        self._map = solve_with_chosen_ridge(fitting, choosing)
        layers = fitting.num_layers
        same_layers = [(layer, layer) for layer in range(layers)]
        self.cka = LinearCKA(same_layers, layers, layers, fitting.in_dim, fitting.out_dim)
        self._least_squares = _Prediction(torch.as_tensor(self._teacher_sum) / self.fitted_tokens)
        if isinstance(self._aim_sum, Tensor):
            self._projector = _Prediction(self._aim_sum / self.fitted_tokens)

    def add(self, sides: _Sides) -> None:
        """Take in held-out text."""
        self.cka.add(sides.student, sides.teacher)
        weight, bias = self._map
        self._least_squares.add(sides.student @ weight.mT + bias[:, None], sides.teacher)
        if self._projector is not None and sides.predicted is not None and sides.aim is not None:
            self._projector.add(sides.predicted, sides.aim)

    def result(self, layer_map: list[tuple[int, int]]) -> list[LayerSimilarity]:
        """One entry for each pair of ``layer_map``."""
        columns = {"least_squares_r2": self._least_squares.r2(), "least_squares_cosine": self._least_squares.cosine()}
        if self._projector is not None:
            columns |= {"projector_r2": self._projector.r2(), "projector_cosine": self._projector.cosine()}
        columns["cka"] = self.cka.similarity()
        columns["student_effective_rank"], columns["teacher_effective_rank"] = self.cka.effective_ranks()
        return [
            LayerSimilarity(
                kind=self.kind,
                student_layer=student,
                teacher_layer=teacher,
                **{name: float(column[layer]) for name, column in columns.items()},
            )
            for layer, (student, teacher) in enumerate(layer_map)
        ]


class _Prediction:
    """Running sums of a prediction and its aim; ``centre [layers, 1, width]`` is taken off both for the cosine."""

    def __init__(self, centre: Tensor) -> None:
        self._centre = centre
        self._tokens = 0
        self._residual: Tensor | float = 0.0
        self._first: Tensor | float = 0.0
        self._second: Tensor | float = 0.0
        self._cosine: Tensor | float = 0.0

    def add(self, predicted: Tensor, aim: Tensor) -> None:
        """Both ``[layers, tokens, width]``."""
        predicted, aim = predicted - self._centre, aim - self._centre
        self._tokens += aim.shape[1]
        self._residual = self._residual + (predicted - aim).square().sum((1, 2))
        self._first = self._first + aim.sum(1)
        self._second = self._second + aim.square().sum((1, 2))
        self._cosine = self._cosine + torch.cosine_similarity(predicted, aim, dim=-1).sum(1)

    def r2(self) -> Tensor:
        """``[layers]``."""
        about_mean = torch.as_tensor(self._second) - torch.as_tensor(self._first).square().sum(-1) / self._tokens
        return 1 - torch.as_tensor(self._residual) / about_mean.clamp_min(torch.finfo(torch.float64).tiny)

    def cosine(self) -> Tensor:
        """``[layers]``."""
        return torch.as_tensor(self._cosine) / self._tokens
