"""Whose KV should the first tokens of a grafted cache be? What each choice is worth, on the same questions.

    kvgraft graft recipes/graft.yaml --output runs/graft
    python benchmarks/graft_beginnings.py runs/graft

First tokens act as attention sinks, and projectors are not fitted on them (`alignment.skip_first_tokens`). They may be
projected all the same, be the student's own, which it then has to read, or be a stored constant: the student's own KV
of how another text begins, or the mean of the first training texts.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from kvgraft.fit.data import KVPair, prepare_fit, require_all_layers
from kvgraft.fit.measure import project_pair
from kvgraft.graft.grafter import Grafter
from kvgraft.graft.pieces import first_tokens, in_order, with_own_tokens
from kvgraft.graft.questions import Questions
from kvgraft.graft.worth import Measured, cache_worth
from kvgraft.kv import KV, stack_kv
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import load_recipe

_MEAN_TEXTS = 32


class OtherBeginning(Grafter):
    """A projected cache whose first ``own_first_tokens`` are the student's own, or those of ``constant``."""

    constant: KV | None = None

    def forward(self, text: KVPair, read: KVPair | None = None) -> KV:
        """As :meth:`Grafter.forward`; first tokens are projected too where nothing stands in for them."""
        read = text if read is None else read
        # Only the fit leaves first tokens out; the teacher has them.
        mask = torch.where(read.mask.cumsum(1) == 0, read.source.mask, read.mask)
        projected = project_pair(self.projector, self.teacher, replace(read, mask=mask))
        tokens = self.own_first_tokens
        if tokens == 0:
            return in_order(projected)
        beginning = first_tokens(read.target if self.constant is None else self.constant, tokens)
        return in_order(with_own_tokens(projected, beginning, tokens))


def main(
    run: Annotated[Path, typer.Argument(help="A folder that `kvgraft graft` wrote.")],
    projector: Annotated[str, typer.Option(help="Which of its projectors.")] = "projector",
    tokens: Annotated[int, typer.Option(help="First tokens that something stands in for.")] = 4,
) -> None:
    """Print the table in Markdown."""
    logging.basicConfig(level=logging.WARNING)
    recipe = load_recipe(run / "recipe.yaml")
    data = prepare_fit(recipe)
    require_all_layers(data)
    name, heads = data.teacher.recipe.name, data.student.geometry.num_kv_heads
    adapters = KVDimensionProjector.from_pretrained(run / projector)
    questions = Questions(data.held_out, data.held_out_examples, recipe.graft.texts)
    beginnings = [first_tokens(data.train[index].target, tokens) for index in range(min(_MEAN_TEXTS, len(data.train)))]

    def grafter(first: int, constant: KV | None = None) -> Grafter:
        made = OtherBeginning(adapters, name, heads, first)
        made.constant = constant
        return made

    ways = {
        "projected like all others": grafter(0),
        "the first one the student's own": grafter(1),
        f"the first {tokens} the student's own": grafter(tokens),
        f"the first {tokens} of another text's beginning": grafter(tokens, beginnings[0]),
        f"the first {tokens} the mean of {len(beginnings)} beginnings": grafter(tokens, _mean(beginnings)),
    }
    statistics = data.train.student_store.statistics()
    found = cache_worth(
        data.student.load(),
        questions,
        [Measured(label, way, questions) for label, way in ways.items()],
        (statistics.mean[:, 0], statistics.mean[:, 1]),
    )
    none, own = found["none"].mean, found["own"].mean
    typer.echo("| first tokens | nats | retention |\n| --- | ---: | ---: |")
    for label in ways:
        nats = found[label].mean
        typer.echo(f"| {label} | {nats:.3f} | {(none - nats) / (none - own):.3f} |")


def _mean(beginnings: list[KV]) -> KV:
    stacked = stack_kv(beginnings)
    return replace(beginnings[0], keys=stacked.keys.mean(0, True), values=stacked.values.mean(0, True))


if __name__ == "__main__":
    typer.run(main)
