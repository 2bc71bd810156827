"""What each layer of one model predicts of each layer of another, and which layers together predict most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvgraft.fit.data import KVRows, PairDataset
from kvgraft.progress import progress_bar
from kvgraft.projector.settings import Direction

# Principal components kept of each source layer's keys and values: what is left out hardly predicts anything, and the
# products between all layers stay small.
_COMPONENTS = 96
_RIDGE = 1e-2
_KEPT_OUT_EVERY = 5


@dataclass(frozen=True)
class Scan:
    """Least squares on a subsample, R2 on texts kept out of it.

    Attributes:
        keys_r2: ``[target layers, source layers]``, each target layer's keys from one source layer's keys and values.
        values_r2: the same of the target's values.
        chosen: for each target layer the source layers that predict most together, best first; a layer is added for
            what it adds to those before it.
    """

    keys_r2: Tensor
    values_r2: Tensor
    chosen: list[list[int]]

    @property
    def best(self) -> list[int]:
        """For each target layer, the source layer that predicts it best."""
        return [layers[0] for layers in self.chosen]

    def suggested_layers(self, layer_map: Sequence[tuple[int, int]], direction: Direction) -> list[tuple[int, int]]:
        """Pairs (student layer, teacher layer), one for each student layer of ``layer_map``, as a recipe takes them.

        Args:
            layer_map: the map that was scanned: its student layers, or its teacher layers, are the targets.
            direction: ``teacher_to_student``: the teacher layer that predicts each student layer best;
                ``student_to_teacher``: the teacher layer, among those of the map, that each predicts best.
        """
        students, teachers = zip(*layer_map, strict=True)
        if direction == "teacher_to_student":
            return list(zip(students, self.best, strict=True))
        r2 = self.keys_r2 + self.values_r2
        return [(student, teachers[int(r2[:, student].argmax())]) for student in students]


@torch.no_grad()
def scan_layers(pairs: PairDataset, sources: int = 1, tokens: int = 4096, seed: int = 0) -> Scan:
    """Scan all layers that ``pairs`` reads.

    Args:
        pairs: texts that both models have read.
        sources: source layers to choose for each target layer, at most those there are.
        tokens: to fit on; a quarter as many, of other texts, to measure on.
        seed: draws them.
    """
    kept_out = list(range(0, len(pairs), _KEPT_OUT_EVERY)) if len(pairs) > 1 else [0]
    others = [index for index in range(len(pairs)) if index not in kept_out] or [0]
    fitting = pairs.subset(others).rows(tokens, seed)
    measuring = pairs.subset(kept_out).rows(max(tokens // 4, 1), seed)
    return scan_rows(fitting, measuring, sources)


@torch.no_grad()
def scan_rows(fitting: KVRows, measuring: KVRows, sources: int = 1) -> Scan:
    """:func:`scan_layers` for tokens at hand: least squares on ``fitting``, R2 on ``measuring``."""
    features = _Features(fitting)
    fitted, measured = (_Products(features(rows), _targets(rows, fitting)) for rows in (fitting, measuring))
    num_targets, num_sources = fitting.target.shape[1], fitting.source.shape[1]
    r2 = torch.zeros(2, num_targets, num_sources)
    chosen: list[list[int]] = []
    with progress_bar("which layers predict which", num_targets, "layers") as advance:
        for target in range(num_targets):
            taken: list[int] = []
            for _ in range(min(sources, num_sources)):
                left = [layer for layer in range(num_sources) if layer not in taken]
                found = torch.stack([_r2(fitted, measured, [*taken, layer], target) for layer in left])
                if not taken:
                    r2[:, target] = found.T
                taken.append(left[int(found.mean(1).argmax())])
            chosen.append(taken)
            advance(1)
    return Scan(r2[0], r2[1], chosen)


class _Features:
    """Leading principal components of each source layer's standardised keys and values: ``[layers, tokens, kept]``."""

    def __init__(self, rows: KVRows) -> None:
        joined = _joined(rows.source)
        self.mean = joined.mean(1, keepdim=True)
        self.deviation = joined.std(1, keepdim=True).clamp_min(torch.finfo(joined.dtype).eps)
        standard = (joined - self.mean) / self.deviation
        _, vectors = torch.linalg.eigh(standard.transpose(1, 2) @ standard)
        kept = min(_COMPONENTS, vectors.shape[-1])
        basis = vectors[..., -kept:]
        scale = (standard @ basis).std(1, keepdim=True).clamp_min(torch.finfo(joined.dtype).eps)
        self.basis = basis / scale

    def __call__(self, rows: KVRows) -> Tensor:
        return (_joined(rows.source) - self.mean) / self.deviation @ self.basis


class _Products:
    """Products of features with each other and with the targets, and the targets' squares."""

    def __init__(self, features: Tensor, targets: Tensor) -> None:
        layers, tokens, kept = features.shape
        flat = features.transpose(0, 1).reshape(tokens, layers * kept)
        self.kept, self.tokens = kept, tokens
        self.features = (flat.T @ flat / tokens).double()
        self.targets = torch.stack([flat.T @ target for target in targets]) / tokens
        self.squares = targets.square().sum(1) / tokens

    def of(self, layers: list[int], target: int) -> tuple[Tensor, Tensor]:
        """Products of the features of ``layers``, and theirs with target layer ``target``."""
        index = torch.cat([torch.arange(layer * self.kept, (layer + 1) * self.kept) for layer in layers])
        return self.features[index][:, index], self.targets[target][index].double()


def _r2(fitted: _Products, measured: _Products, layers: list[int], target: int) -> Tensor:
    """R2 of the target layer's keys and of its values ``[2]`` from ``layers``."""
    products, cross = fitted.of(layers, target)
    weight = torch.linalg.solve(products + _RIDGE * torch.eye(len(products), dtype=products.dtype), cross)
    others, other_cross = measured.of(layers, target)
    residual = measured.squares[target] + ((others @ weight) * weight).sum(0) - 2 * (other_cross * weight).sum(0)
    keys_and_values = torch.stack([residual, measured.squares[target].double()]).reshape(2, 2, -1).sum(-1)
    return (1 - keys_and_values[0] / keys_and_values[1]).float()


def _joined(side: Tensor) -> Tensor:
    """``[2, layers, tokens, width]`` to ``[layers, tokens, 2 x width]``."""
    return torch.cat([side[0], side[1]], -1)


def _targets(rows: KVRows, reference: KVRows) -> Tensor:
    """Targets ``[layers, tokens, 2 x width]`` about the mean of ``reference``."""
    return _joined(rows.target) - _joined(reference.target).mean(1, keepdim=True)
