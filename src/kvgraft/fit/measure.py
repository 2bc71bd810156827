"""What a fitted projector is worth on held-out text: how well it predicts KV, and what attention makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvgraft.fit.data import KVPair, PairDataset
from kvgraft.kv import KV
from kvgraft.models.attention import attention_output_cosine
from kvgraft.progress import progress_bar
from kvgraft.projector.projector import KVDimensionProjector


@dataclass(frozen=True)
class Fit:
    """One projector on held-out text. Lists run over the target layers.

    Attributes:
        keys_r2, values_r2: one minus the squared error over the squares about the mean.
        attention_cosine: between the attention output with the projected KV and with the model's own, mean over tokens;
            empty where it was not measured.
    """

    keys_r2: list[float]
    values_r2: list[float]
    attention_cosine: list[float]


@torch.no_grad()
def measure_fits(
    projectors: Mapping[str, KVDimensionProjector],
    teacher: str,
    pairs: PairDataset,
    student: PreTrainedModel | None = None,
    attention_texts: int = 0,
) -> dict[str, Fit]:
    """Every projector over all texts of ``pairs``; all see the same tokens.

    Args:
        projectors: by the name of each.
        teacher: its name in the projectors.
        pairs: held-out texts.
        student: measures attention, where the student's KV is the target.
        attention_texts: how many of the texts attention is measured on.
    """
    sums = {name: _Sums() for name in projectors}
    for projector in projectors.values():
        projector.eval()
    with progress_bar("measuring on held-out text", len(pairs), "texts") as advance:
        for index in range(len(pairs)):
            pair = pairs[index]
            if bool(pair.mask.any()):
                projected = {name: project_pair(projector, teacher, pair) for name, projector in projectors.items()}
                for name, kv in projected.items():
                    sums[name].add(kv, pair)
                if student is not None and index < attention_texts:
                    cosines = attention_output_cosine(student, pair.input_ids, projected)
                    for name, cosine in cosines.items():
                        sums[name].add_cosine(cosine[:, pair.mask[0].to(cosine.device)])
            advance(1)
    return {name: found.result() for name, found in sums.items()}


def project_pair(projector: KVDimensionProjector, teacher: str, pair: KVPair) -> KV:
    """The projected source of ``pair`` in the shape of its target."""
    pair = pair.to(next(projector.parameters()).device)
    forwards = projector.direction == "teacher_to_student"
    project = projector.project_teacher_kv if forwards else projector.project_student_kv
    keys, values = project(teacher, pair.source)
    kv = pair.target.unflatten(keys, values, pair.target.geometry)
    return KV(kv.keys, kv.values, kv.positions, pair.mask, kv.layers)


class _Sums:
    """Running sums ``[2, layers]`` and ``[2, layers, width]``, keys first."""

    def __init__(self) -> None:
        self.tokens = 0
        self.errors: Tensor | float = 0.0
        self.sums: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0
        self.cosines: Tensor | float = 0.0
        self.cosine_tokens = 0

    def add(self, projected: KV, pair: KVPair) -> None:
        chosen = pair.mask[0]
        given, wanted = (
            torch.stack([part[0][:, chosen] for part in kv.flatten()]).cpu().double() for kv in (projected, pair.target)
        )
        self.tokens += wanted.shape[2]
        self.errors = self.errors + (given - wanted).square().sum((2, 3))
        self.sums = self.sums + wanted.sum(2)
        self.squares = self.squares + wanted.square().sum(2)

    def add_cosine(self, cosine: Tensor) -> None:
        self.cosines = self.cosines + cosine.cpu().double().sum(1)
        self.cosine_tokens += cosine.shape[1]

    def result(self) -> Fit:
        spread = torch.as_tensor(self.squares) - torch.as_tensor(self.sums).square() / max(self.tokens, 1)
        r2 = 1 - torch.as_tensor(self.errors) / spread.sum(-1).clamp_min(torch.finfo(torch.float64).tiny)
        cosines = (torch.as_tensor(self.cosines) / self.cosine_tokens).tolist() if self.cosine_tokens else []
        return Fit(r2[0].tolist(), r2[1].tolist(), cosines)
