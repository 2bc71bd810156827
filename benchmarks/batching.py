"""How much of what a student runs over is text, and how fast does it read, by ``training.batching``?

    python benchmarks/batching.py recipes/gsm8k.yaml --set data.train=GSM8K

The recipe's student takes training steps (cross-entropy: forward, backward, AdamW) on batches of each way in turn,
drawn from one epoch's plan. The share of real tokens is that of the whole epoch. Time is processor time of one thread,
so that other processes weigh little; tokens per second counts real tokens over all steps but the first.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kvgraft.data.batch_plan import Batch, plan_epoch, real_token_share
from kvgraft.distill.arms import tokens_per_batch
from kvgraft.distill.dataset import DistillationCollator, DistillationDataset, PlannedBatches
from kvgraft.distill.model import DistillationModel
from kvgraft.prepare import make_student, read_texts
from kvgraft.recipe import Recipe, load_recipe

WAYS = ("shuffled", "buckets", "packed")


class Way:
    """A student that is trained on one kind of batches, and what its steps took."""

    def __init__(self, model: DistillationModel, rate: float, batches: PlannedBatches) -> None:
        self.model, self.batches = model.train(), batches
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        self.tokens: list[int] = []
        self.seconds: list[float] = []

    def step(self, batch: dict[str, Any]) -> None:
        """One step on ``batch``."""
        started = time.process_time()
        self.model(**batch)["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.process_time() - started)
        self.tokens.append(int(batch["attention_mask"].sum()))

    @property
    def tokens_per_second(self) -> float:
        """Real tokens over the time of all steps but the first."""
        return sum(self.tokens[1:]) / sum(self.seconds[1:])


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe for `kvgraft train`.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change one field: a.b=value.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each way.")] = 12,
) -> None:
    """Print the table in Markdown."""
    torch.set_num_threads(1)
    loaded = load_recipe(recipe, overrides or [])
    texts = read_texts(loaded)
    data, collator = DistillationDataset(texts.train), DistillationCollator(texts.tokenizer.pad_token_id)
    lengths = [len(example.input_ids) for example in texts.train]
    ways = {
        name: Way(
            DistillationModel(make_student(loaded, texts.tokenizer)),
            loaded.training.learning_rate,
            PlannedBatches(data, collator, _epoch(loaded, lengths, name), packed=name == "packed"),
        )
        for name in WAYS
    }
    draw = random.Random(0)
    for _ in range(steps):
        for way in ways.values():
            way.step(way.batches[draw.randrange(len(way.batches))])
    typer.echo(f"{len(lengths)} texts of {sum(lengths) / len(lengths):.0f} tokens on average, {max(lengths)} at most\n")
    typer.echo("| batching | real tokens | over shuffled | real tokens per second | over shuffled |")
    typer.echo("| --- | ---: | ---: | ---: | ---: |")
    first = ways["shuffled"]
    whole = real_token_share(lengths, first.batches.plan)
    for name, way in ways.items():
        share, speed = real_token_share(lengths, way.batches.plan), way.tokens_per_second
        typer.echo(
            f"| {name} | {share:.1%} | {share / whole:.2f} | {speed:,.0f} | {speed / first.tokens_per_second:.2f} |"
        )


def _epoch(recipe: Recipe, lengths: list[int], batching: str) -> list[Batch]:
    """Batches of one epoch; where texts come as they are, ``training.batch_size`` of them, and else as many tokens."""
    size = recipe.training.batch_size
    if batching == "shuffled":
        order = list(range(len(lengths)))
        random.Random(recipe.seed).shuffle(order)
        return [[[text] for text in order[start : start + size]] for start in range(0, len(order), size)]
    return plan_epoch(lengths, tokens_per_batch(recipe, lengths), recipe.seed, packed=batching == "packed")


if __name__ == "__main__":
    typer.run(main)
