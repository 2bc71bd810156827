"""How soon does the first token come, from a stored cache of a teacher against reading the text?

    kvgraft graft recipes/graft.yaml --output runs/graft
    python benchmarks/graft_first_token.py runs/graft

Text of growing length from the run's own recipe. From the store: read the teacher's KV, align it, project it, rotate
it, fill the student's cache, and decode one token; projector and store are open already.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from kvgraft.data.datasets import Example
from kvgraft.data.spans import EncodedText, encode_with_spans
from kvgraft.graft.sources import graft_stored
from kvgraft.identify import identify
from kvgraft.models.loading import load_model, load_tokenizer
from kvgraft.prepare import load_examples_of
from kvgraft.prepare_kv import store_kv
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import load_recipe
from kvgraft.store.reader import KVStore


def main(
    run: Annotated[Path, typer.Argument(help="A folder that `kvgraft graft` or `kvgraft fit` wrote.")],
    projector: Annotated[str, typer.Option(help="Which of its projectors.")] = "projector",
    lengths: Annotated[str, typer.Option(help="Student tokens.")] = "256,512,1024,2048",
    repeats: Annotated[int, typer.Option(help="Timings of each; the median counts.")] = 3,
) -> None:
    """Print the table in Markdown."""
    recipe = load_recipe(run / "recipe.yaml")
    name = str(recipe.student.model)
    student, tokenizer = load_model(name).eval(), load_tokenizer(name)
    teacher = identify(recipe.teachers[0])
    adapters = KVDimensionProjector.from_pretrained(run / projector).eval()
    examples, _ = load_examples_of(recipe, tokenizer)
    whole = " ".join(example.text for example in examples)
    question = tokenizer(" What", add_special_tokens=False, return_tensors="pt")["input_ids"]
    typer.echo(f"{adapters.count_parameters():,} parameters; {torch.get_num_threads()} threads\n")
    typer.echo("| tokens | from the store | student reads | ratio | teacher reads | ratio | bytes read a token |")
    typer.echo("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for length in map(int, lengths.split(",")):
        text = tokenizer.decode(tokenizer(whole[: 12 * length])["input_ids"][:length])
        with tempfile.TemporaryDirectory() as folder:
            settings = recipe.store.model_copy(update={"path": Path(folder)})
            layers = tuple(range(teacher.geometry.num_layers))
            store, _ = store_kv(teacher, [Example(text)], layers, 4 * length, settings)
            encoded = encode_with_spans(tokenizer, text)
            of_teacher = torch.tensor([encode_with_spans(teacher.tokenizer, text).input_ids])
            from_store = partial(
                _go_on_from_store, student, adapters, store, encoded, recipe.teachers[0].name, question
            )
            read = torch.cat([torch.tensor([encoded.input_ids]), question], 1)
            ours, own, teachers = _medians(
                [
                    from_store,
                    partial(student, read, logits_to_keep=1),
                    partial(teacher.load(), of_teacher, logits_to_keep=1),
                ],
                repeats,
            )
        typer.echo(
            f"| {read.shape[1] - 1:,} | {ours:.3f} s | {own:.3f} s | {ours / own:.2f} | {teachers:.3f} s | "
            f"{ours / teachers:.2f} | {store.bytes_per_token:,.0f} |"
        )


def _go_on_from_store(
    student: PreTrainedModel,
    adapters: KVDimensionProjector,
    store: KVStore,
    text: EncodedText,
    teacher: str,
    question: Tensor,
) -> None:
    cache = graft_stored(student, adapters, store, [text], teacher=teacher)
    student(**cache.forward_inputs(question))


@torch.no_grad()
def _medians(ways: list[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of each way, taken in turns so that a busy moment hits all."""
    found: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for times, way in zip(found, ways, strict=True):
            started = time.perf_counter()
            way()
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in found]


if __name__ == "__main__":
    typer.run(main)
