"""What a step costs with us and with what people would pick instead, on the same models and texts.

    python benchmarks/peers.py recipes/cut_student.yaml --set data.train_samples=64 --set training.batch_size=4

Steps: the arms of the recipe beside the step of TRL's GKD trainer (`pip install -e '.[benchmarks]'`), which runs the
teacher over each batch and holds the logits of both models; students start alike and read the same batches. Processor
time of one thread, median of all steps after the first. What our arms read from the store was captured once before.

Projectors: one teacher layer of Gemma-3-270M's shape for each layer of SmolLM2-135M's, 1,024 tokens, forward and
backward, beside the fuser of Cache-to-Cache (arXiv 2510.03215), built from its paper's description: for each layer keys
and values of both models, heads joined, go through three linear maps 1,024 wide and, by a weight for every head and
token and a gate for the layer, are added to the student's own. The least of three rounds, taken in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from training_step import Arm, batches_of

from kvgraft.distill.arms import ArmData
from kvgraft.identify import identify
from kvgraft.prepare import prepare
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import Recipe, load_recipe
from kvgraft.run import arm_data

LAYERS, TOKENS, TEACHER_WIDTH, HEADS, HEAD_DIM = 30, 1024, 256, 3, 64
STUDENT_WIDTH = HEADS * HEAD_DIM
FUSER_WIDTH, ROUNDS = 1024, 3


class GKDArm(Arm):
    """The student of the baseline, trained by TRL's loss with the teacher in every step."""

    def __init__(self, recipe: Recipe, data: ArmData) -> None:
        from trl.experimental.gkd import GKDTrainer

        super().__init__(recipe, data, "baseline")
        self.name = "TRL's GKD: teacher in the step, whole logits"
        # All that the trainer's loss asks of its trainer.
        trainer = SimpleNamespace(
            teacher_model=identify(recipe.teachers[0]).load(),
            beta=0.0,
            generalized_jsd_loss=GKDTrainer.generalized_jsd_loss,
        )
        self._loss: Callable[[nn.Module, dict[str, Any]], Tensor] = lambda model, inputs: GKDTrainer.compute_loss(
            trainer, model, inputs
        )

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Forward KL over the tokens that carry a label."""
        return self._loss(self.model.student, batch)


class CacheToCacheFuser(nn.Module):
    """Keys or values of one layer, fused."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Linear(STUDENT_WIDTH + TEACHER_WIDTH, FUSER_WIDTH),
            nn.GELU(),
            nn.Linear(FUSER_WIDTH, FUSER_WIDTH),
            nn.GELU(),
        )
        self.project = nn.Linear(FUSER_WIDTH, STUDENT_WIDTH)
        self.weigh_heads = nn.Linear(FUSER_WIDTH, HEADS)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, own: Tensor, teacher: Tensor) -> Tensor:
        """``own [tokens, width]`` with what ``teacher [tokens, width]`` adds."""
        hidden = self.hidden(torch.cat([own, teacher], -1))
        weights = self.weigh_heads(hidden).sigmoid().repeat_interleave(HEAD_DIM, -1)
        return own + self.gate.sigmoid() * weights * self.project(hidden)


class GatedProjector(nn.Module):
    """Our projector and a gate for each layer and head, as in ``graft.trained: [gated]``."""

    def __init__(self, mlp_ratio: float) -> None:
        super().__init__()
        config = {"d_model": 640, "num_layers": LAYERS, "kv_dim": TEACHER_WIDTH}
        self.projector = KVDimensionProjector(
            {"teacher": config}, STUDENT_WIDTH, mlp_ratio, 0.1, "least_squares", per_layer=True
        )
        self.gates = nn.Parameter(torch.zeros(2, LAYERS, HEADS))

    def forward(self, own: Tensor, teacher: Tensor) -> Tensor:
        """``own [2, layers, tokens, width]`` with what ``teacher [2, layers, tokens, width]`` adds."""
        projected = [
            adapter(part[None])[0] for adapter, part in zip(self.projector.adapters("teacher"), teacher, strict=True)
        ]
        gates = self.gates.sigmoid().repeat_interleave(HEAD_DIM, -1)[:, :, None]
        return own + gates * (torch.stack(projected) - own)


class CacheToCache(nn.Module):
    """A fuser for keys and one for values of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fusers = nn.ModuleList(CacheToCacheFuser() for _ in range(2 * LAYERS))

    def forward(self, own: Tensor, teacher: Tensor) -> Tensor:
        """As :meth:`GatedProjector.forward`."""
        pairs = zip(self.fusers, own.flatten(0, 1), teacher.flatten(0, 1), strict=True)
        return torch.stack([fuser(one, other) for fuser, one, other in pairs]).view_as(own)


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe with one teacher and one vocabulary.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change one field: a.b=value.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each way.")] = 6,
) -> None:
    """Print the tables in Markdown."""
    torch.set_num_threads(1)
    typer.echo("\n".join([*step_rows(load_recipe(recipe, overrides or []), steps), "", *projector_rows()]))


def step_rows(recipe: Recipe, steps: int) -> list[str]:
    """Steps of the recipe's arms and of TRL's trainer."""
    data = arm_data(prepare(recipe))
    arms = [Arm(recipe, data, name) for name in ("baseline", "logits", "kv", "kv_logits")] + [GKDArm(recipe, data)]
    batches = batches_of(recipe, data, "kv_logits")
    for _ in range(steps):
        batch = next(batches)
        for arm in arms:
            arm.step(batch)
    median = {arm.name: statistics.median(arm.seconds[1:]) for arm in arms}
    rows = ["| step | seconds | over cross-entropy | over TRL's |", "| --- | ---: | ---: | ---: |"]
    theirs = median[arms[-1].name]
    return rows + [
        f"| {name} | {seconds:.2f} | {seconds / median['baseline']:.2f} | {seconds / theirs:.2f} |"
        for name, seconds in median.items()
    ]


def projector_rows() -> list[str]:
    """Our projector and Cache-to-Cache's, forward and backward."""
    torch.manual_seed(0)
    own, target = torch.randn(2, 2, LAYERS, TOKENS, STUDENT_WIDTH)
    teacher = torch.randn(2, LAYERS, TOKENS, TEACHER_WIDTH)
    ways = {
        "Cache-to-Cache's fuser": CacheToCache(),
        "Elastic Bottleneck 2.0 with gates": GatedProjector(2.0),
        "Elastic Bottleneck 0.5 with gates": GatedProjector(0.5),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, module in ways.items():
            started = time.thread_time()
            (module(own, teacher) - target).square().mean().backward()
            seconds[name].append(time.thread_time() - started)
            module.zero_grad()
    first = min(seconds["Cache-to-Cache's fuser"])
    rows = ["| projector | parameters | microseconds a token | over Cache-to-Cache's |", "| --- | ---: | ---: | ---: |"]
    for name, module in ways.items():
        parameters, least = sum(parameter.numel() for parameter in module.parameters()), min(seconds[name])
        rows.append(f"| {name} | {parameters:,} | {least / TOKENS * 1e6:,.0f} | {least / first:.2f} |")
    return rows


if __name__ == "__main__":
    typer.run(main)
