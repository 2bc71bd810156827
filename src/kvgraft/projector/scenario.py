"""What an ablation trains on: the guide's synthetic scenario, or real KV that someone else supplies."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvgraft.errors import ProjectorError
from kvgraft.kv import all_finite

# The guide's Qwen-14B to Qwen-1.5B, with the mean and deviation that it prints for Qwen-14B's KV.
TEACHER_WIDTH, STUDENT_WIDTH = 5120, 1536
TOKENS, STEPS = 256, 40
DEFAULT_WIDTH_DIVISOR = 8
INPUT_MEAN, INPUT_STD = 0.15, 1.2
SYNTHETIC_WARNING = (
    "These losses come from random targets for a few hundred tokens: they show how fast an adapter memorises noise, "
    "and are not evidence about real models. Least squares, without training, is the baseline to beat there."
)


# Compared by identity: the seeds of a run share one data set where it does not depend on the seed.
@dataclass(frozen=True, eq=False)
class AblationData:
    """Tokens to fit and tokens held out, one map per layer.

    Attributes:
        x: input ``[1, layers, tokens, in_dim]``.
        y: target ``[1, layers, tokens, out_dim]``.
        held_out_x, held_out_y: the same of other tokens.
        source: where it came from, for the reader of the report.
        synthetic: random numbers, which say nothing about real models (SPEC R4).

    Raises:
        ProjectorError: shapes that do not fit, no token, or a number that is not finite.
    """

    x: Tensor
    y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor
    source: str
    synthetic: bool = False

    def __post_init__(self) -> None:
        for name, x, y in (("x and y", self.x, self.y), ("held-out x and y", self.held_out_x, self.held_out_y)):
            if x.dim() != 4 or y.dim() != 4 or x.shape[:3] != y.shape[:3] or x.shape[0] != 1:
                raise ProjectorError(
                    f"ablation data from {self.source}: {name} must be [1, layers, tokens, width] with the same layers "
                    f"and tokens; got {list(x.shape)} and {list(y.shape)}"
                )
            if x.shape[2] < 2:
                raise ProjectorError(
                    f"ablation data from {self.source}: {name} hold {x.shape[2]} tokens; at least 2 are needed to tell "
                    "a target's spread"
                )
            if not (all_finite(x) and all_finite(y)):
                raise ProjectorError(f"ablation data from {self.source}: {name} hold NaN or Inf")
        layers_and_widths = [(x.shape[1], x.shape[3], y.shape[3]) for x, y in self._halves()]
        if layers_and_widths[0] != layers_and_widths[1]:
            raise ProjectorError(
                f"ablation data from {self.source}: fitting and held-out tokens differ in (layers, in_dim, out_dim): "
                f"{layers_and_widths[0]} and {layers_and_widths[1]}"
            )

    @property
    def num_layers(self) -> int:
        """Layers, each with an adapter of its own."""
        return self.x.shape[1]

    def standardised(self) -> AblationData:
        """With targets in their own units: fitting tokens of mean 0 per channel and variance 1 per layer.

        Keys have channels whose mean dwarfs their spread, and layers of very different spread; without this the first
        steps of every trained arm go to the mean, and one layer weighs more than the others.
        """
        mean = self.y.mean(2, keepdim=True)
        deviation = (self.y - mean).square().mean((2, 3), keepdim=True).sqrt()
        deviation = deviation.where(deviation > 0, 1.0)
        return replace(self, y=(self.y - mean) / deviation, held_out_y=(self.held_out_y - mean) / deviation)

    def _halves(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (self.x, self.y), (self.held_out_x, self.held_out_y)


def synthetic(seed: int = 0, width_divisor: int = DEFAULT_WIDTH_DIVISOR) -> AblationData:
    """The guide's scenario: input of its statistics, random targets of mean 0 and variance 1, one layer (SPEC R4).

    As many tokens as are fitted are held out, and cannot be predicted.

    Args:
        seed: draws input and target.
        width_divisor: 5120 and 1536 are divided by this; 1 is the guide's own size.
    """
    if not 1 <= width_divisor <= STUDENT_WIDTH:
        raise ProjectorError(f"width_divisor must be a whole number from 1 to {STUDENT_WIDTH}; got {width_divisor!r}")
    in_dim, out_dim = TEACHER_WIDTH // width_divisor, STUDENT_WIDTH // width_divisor
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(1, 1, TOKENS, in_dim, generator=generator) * INPUT_STD + INPUT_MEAN
        return x, torch.randn(1, 1, TOKENS, out_dim, generator=generator)

    (x, y), (held_out_x, held_out_y) = draw(), draw()
    source = f"the guide's synthetic scenario: random targets, {in_dim} to {out_dim}, {TOKENS} tokens"
    return AblationData(x, y, held_out_x, held_out_y, source, synthetic=True)
