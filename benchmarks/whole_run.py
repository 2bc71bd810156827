"""Does a store of KV pay? Three epochs from it, caching included, against the teacher in every step.

    python benchmarks/whole_run.py recipes/quickstart.yaml

Both ways train the arm `kv` of the recipe from the same weights on the same batches and take turns, step by step. The
plain way runs the teacher over each batch as it comes, padded, up to the last layer that is needed and without logits,
and keeps nothing. Loading the teacher is left out of both. Time is processor time of one thread, so that other
processes weigh little.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kvgraft.distill.arms import build_arm
from kvgraft.distill.dataset import DistillationDataset
from kvgraft.distill.model import DistillationModel
from kvgraft.identify import identify
from kvgraft.prepare import PreparedTeacher, prepare, read_texts
from kvgraft.recipe import Recipe, load_recipe
from kvgraft.run import arm_data
from kvgraft.store.fill import encode_for_teacher
from kvgraft.store.online import OnlineKV


class Way:
    """A model in training, where its batches come from, and what its steps took."""

    def __init__(self, model: DistillationModel, recipe: Recipe, read: Callable[[Sequence[int]], Any]) -> None:
        self.model, self.read, self.clip = copy.deepcopy(model).train(), read, recipe.training.max_grad_norm
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.training.learning_rate)
        self.seconds: list[float] = []
        self.loss = float("nan")

    def step(self, indices: Sequence[int]) -> None:
        """One step on the texts of ``indices``."""
        started = time.process_time()
        loss = self.model(**self.read(indices))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.process_time() - started)
        self.loss = loss.item()


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe for `kvgraft train` with one teacher.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Change one field: a.b=value.")] = None,
    texts: Annotated[int, typer.Option(help="Training texts.")] = 32,
    epochs: Annotated[int, typer.Option(help="Epochs.")] = 3,
) -> None:
    """Print the table in Markdown."""
    typer.echo(measure(recipe, overrides or [], texts, epochs)["table"])


def measure(recipe: Path, overrides: Sequence[str] = (), texts: int = 32, epochs: int = 3) -> dict[str, object]:
    """Seconds of both ways, their ratio, and ``table``."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_recipe(recipe, [*overrides, f"data.train_samples={texts}", f"store.path={folder}"])
        few = read_texts(loaded)
        few = replace(few, held_out=few.held_out[:1], held_out_examples=few.held_out_examples[:1])
        # The pass alone, on the processor's clock: the report's seconds are of the wall's.
        clock, time.perf_counter = time.perf_counter, time.process_time
        try:
            prepared = prepare(loaded, few)
        finally:
            time.perf_counter = clock
        caching = prepared.teachers[0].report.seconds
        data = arm_data(prepared)
        model = build_arm(loaded, "kv", data)
        stored = data.train_set("kv", loaded.seed)
        live = _live(prepared.teachers[0], prepared.texts.train_examples)
        source = replace(stored.sources[0], store=live, _alignments={})
        online = DistillationDataset(stored.examples, [source])

        def read_stored(indices: Sequence[int]) -> Any:
            return data.collator([stored[index] for index in indices])

        def read_online(indices: Sequence[int]) -> Any:
            # Nothing is kept from batch to batch.
            live.hold([])
            live.hold(stored.examples[index].sample_key for index in indices)
            return data.collator([online[index] for index in indices])

        ways = {"store": Way(model, loaded, read_stored), "online": Way(model, loaded, read_online)}
        for turn, indices in enumerate(_batches(len(stored), loaded.training.batch_size, epochs, loaded.seed)):
            for way in ways.values():
                # Dropout draws the same numbers both ways.
                torch.manual_seed(turn)
                way.step(indices)
    seconds = {name: sum(way.seconds) for name, way in ways.items()}
    rows = {
        "teacher in every step": (0.0, seconds["online"], ways["online"].loss),
        "from the store": (caching, seconds["store"], ways["store"].loss),
    }
    whole = {name: before + steps for name, (before, steps, _) in rows.items()}
    in_store = whole["from the store"]
    lines = [
        f"{texts} texts, {epochs} epochs, {len(ways['store'].seconds)} steps\n",
        "| way | caching, s | steps, s | in all, s | over the store's | loss of the last step |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {name} | {before:.1f} | {steps:.1f} | {whole[name]:.1f} | {whole[name] / in_store:.2f} | {loss:.3f} |"
            for name, (before, steps, loss) in rows.items()
        ),
    ]
    return {"seconds": whole, "online over store": whole["teacher in every step"] / in_store, "table": "\n".join(lines)}


def _live(teacher: PreparedTeacher, examples: Sequence[Any]) -> OnlineKV:
    """The teacher in the place of its store; all texts of a batch in one pass."""
    identified, identity = identify(teacher.recipe), teacher.store.identity
    texts = {text.sample_key: text for text in encode_for_teacher(examples, identified.tokenizer, identity.max_length)}
    model = identified.load()
    return OnlineKV(teacher.recipe.name, identity, lambda: model, texts, 1, token_budget=1 << 30)


def _batches(texts: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(texts, generator=generator).tolist()
        for first in range(0, texts - batch_size + 1, batch_size):
            yield order[first : first + batch_size]


if __name__ == "__main__":
    typer.run(main)
