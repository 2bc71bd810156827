"""What does KV distillation add to a training step? Ratios over cross-entropy alone, measured in one run.

    python benchmarks/training_step.py recipes/quickstart.yaml --set data.train_samples=64

The arms `baseline` and `kv` of the recipe, and `kv` with all projected KV held (plain) and compiled, take turns on the
same batches: forward, backward, clipping, AdamW. Reading is what the data loader takes for a batch with the teachers'
KV. Time is processor time of one thread, so that other processes weigh little, or with more threads time
passed; the median of all steps after the first is given. Waiting is time passed until a batch is there that a thread
reads during the step before, as in `kvgraft train`, over the time passed with a step of arm `kv`. The adapters' matrix
products are measured by themselves: no way to project can be faster. So are all that a step with KV has, the student's
among them. The teachers' KV is cached first if the store lacks it.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from fused_loss import Sizes, product_seconds
from products import MatrixProducts
from torch import Tensor
from torch.utils.data import DataLoader

from kvgraft.data.read_ahead import read_ahead
from kvgraft.distill.arms import ArmData, build_arm
from kvgraft.distill.model import DistillationModel
from kvgraft.prepare import prepare
from kvgraft.recipe import Recipe, load_recipe
from kvgraft.run import arm_data

Clock = Callable[[], float]
PLAIN, COMPILED = "kv, all projected KV held", "kv, compiled"


class Arm:
    """A model in training, and what each of its steps took."""

    def __init__(self, recipe: Recipe, data: ArmData, name: str, clock: Clock = time.thread_time) -> None:
        self.name, self.clip, self.clock = name, recipe.training.max_grad_norm, clock
        built = "kv" if name in (PLAIN, COMPILED) else name
        self.model: DistillationModel = build_arm(recipe, built, data).train()
        if name == COMPILED:
            self.model.loss = self.model.loss.model_copy(update={"compile": True})
        moved = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(moved, lr=recipe.training.learning_rate, fused=True)
        self.seconds: list[float] = []

    def step(self, batch: dict[str, Any]) -> None:
        """One step on ``batch``."""
        started = self.clock()
        self.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(self.clock() - started)

    def product_seconds(self, batch: dict[str, Any]) -> float:
        """Of the matrix products of a step on ``batch`` alone."""
        products = MatrixProducts(lambda: self.loss(batch).backward())
        self.optimizer.zero_grad()
        started = self.clock()
        products()
        return self.clock() - started

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """What the step goes down."""
        plain = mock.patch("kvgraft.distill.model.can_fuse", return_value=False)
        with plain if self.name == PLAIN else contextlib.nullcontext():
            loss: Tensor = self.model(**batch)["loss"]
        return loss


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe for `kvgraft train`.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change one field: a.b=value.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each arm.")] = 12,
    threads: Annotated[int, typer.Option(help="Threads that share an operation.")] = 1,
) -> None:
    """Print the table in Markdown."""
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    loaded = load_recipe(recipe, overrides or [])
    data = arm_data(prepare(loaded))
    arms = [Arm(loaded, data, name, clock) for name in ("baseline", "kv", PLAIN, COMPILED)]
    reading: list[float] = []
    products: list[float] = []
    all_products: list[float] = []
    batches = batches_of(loaded, data, "kv")
    for _ in range(steps):
        started = clock()
        batch = next(batches)
        reading.append(clock() - started)
        products.append(_product_seconds(arms[1].model, batch))
        all_products.append(arms[1].product_seconds(batch))
        for arm in arms:
            arm.step(batch)
    first = statistics.median(arms[0].seconds[1:])
    typer.echo("| what | milliseconds | over cross-entropy alone |\n| --- | ---: | ---: |")
    for arm in arms:
        seconds = statistics.median(arm.seconds[1:])
        typer.echo(f"| step, {arm.name} | {seconds * 1e3:.0f} | {seconds / first:.2f} |")
    bound = statistics.median(products[1:])
    typer.echo(
        f"| the adapters' matrix products alone, beside that step | {bound * 1e3:.0f} | {1 + bound / first:.2f} |"
    )
    read, step = statistics.median(reading[1:]), statistics.median(arms[1].seconds[1:])
    whole = statistics.median(all_products[1:])
    typer.echo(f"| all matrix products of step, kv | {whole * 1e3:.0f} | {whole / step:.0%} of a step with KV |")
    typer.echo(f"| reading a batch | {read * 1e3:.1f} | {read / (read + step):.1%} of a step with KV |")
    _, alone = _waiting(arms[0], batches_of(loaded, data, "baseline"), steps)
    waited, passed = _waiting(arms[1], batches, steps)
    typer.echo(f"| waiting for a batch read ahead | {waited * 1e3:.1f} | {waited / passed:.1%} of a step with KV |")
    typer.echo(f"| time passed with step and waiting, baseline | {alone * 1e3:.0f} | 1.00 |")
    typer.echo(f"| time passed with step and waiting, kv | {passed * 1e3:.0f} | {passed / alone:.2f} |")


def _product_seconds(model: DistillationModel, batch: dict[str, Any]) -> float:
    """Of projecting the tokens of ``batch`` that count, forward and backward, for all teachers."""
    assert model.projector is not None
    seconds = 0.0
    for teacher, kv in batch["teacher_kv"].items():
        adapter = model.projector.adapters(teacher)[0]
        assert adapter.up is not None
        ratio = adapter.up.weight.shape[1] / adapter.in_dim
        tokens, layers = int(kv.mask.sum()), len(model.layer_maps[teacher])
        sizes = Sizes(layers, tokens, adapter.in_dim, adapter.out_dim, ratio, 0.0)
        seconds += product_seconds(sizes, skip=adapter.skip is not None)
    return seconds


def _waiting(arm: Arm, batches: Iterator[dict[str, Any]], steps: int) -> tuple[float, float]:
    """Median seconds that passed waiting for a batch that was read ahead, and with waiting and step together."""
    waited, passed = [], []
    ahead = read_ahead(batches)
    for _ in range(steps):
        started = time.perf_counter()
        batch = next(ahead)
        waited.append(time.perf_counter() - started)
        arm.step(batch)
        passed.append(time.perf_counter() - started)
    return statistics.median(waited[1:]), statistics.median(passed[1:])


def batches_of(recipe: Recipe, data: ArmData, arm: str) -> Iterator[dict[str, Any]]:
    """Endless batches of what ``arm`` reads."""
    loader = DataLoader(
        data.train_set(arm, recipe.seed),
        batch_size=recipe.training.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=data.collator,
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


if __name__ == "__main__":
    typer.run(main)
