"""What would a large teacher take? Bytes, hours and bounds by arithmetic, from counts, rates and what is assumed.

    OMP_NUM_THREADS=1 python benchmarks/at_scale.py

Each row of the first table is an input and says where it comes from: counted (from the models' published
configurations), measured (on this machine, in this run), published (what the makers of a card or a drive print) or
assumed. Nothing of the second table was run: it is arithmetic on the first, and each row shows its formula.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from fused_loss import Sizes, processor_seconds
from growth import TOKENS_OF_TEXT, teacher_text, write_store

from kvgraft.align.layers import map_layers
from kvgraft.kv import KVGeometry
from kvgraft.models.known import KnownModel, known_models
from kvgraft.projector.sizing import FLOAT32_BYTES, TRAINING_COPIES, adapter_parameters
from kvgraft.store.format import stored_bytes_per_token
from kvgraft.store.reader import KVStore

HALF_BYTES = 2
MEASURED_DTYPE = "float16"  # as growth.py writes it
TERA, GIGA, MEGA = 1e12, 1e9, 1e6


@dataclass(frozen=True)
class Job:
    """What is asked, in tokens of the teacher; the student is taken to have as many."""

    teacher: KnownModel
    student: KnownModel
    tokens: int
    epochs: int
    context: int
    mlp_ratio: float
    dtype: str


@dataclass(frozen=True)
class Rates:
    """How fast things go: operations a second of one card, and bytes a second."""

    cards: int
    card_operations: float
    utilisation: float
    write: float
    read: float
    drive: float

    @property
    def operations(self) -> float:
        """Of all cards, as far as they are put to use."""
        return self.cards * self.card_operations * self.utilisation


@dataclass(frozen=True)
class Answer:
    """A row of the second table."""

    what: str
    formula: str
    value: str


def trunk_parameters(model: KnownModel) -> int:
    """Weights of a model without its embeddings and its head."""
    tables = 1 if model.tie_word_embeddings else 2
    return model.parameters - tables * model.vocab_size * model.hidden_size


def attention_operations(model: KnownModel, context: int) -> float:
    """Of a token's scores and their sums, forward: it sees half the context on average."""
    layers = model.geometry.num_layers
    return 4 * layers * model.num_attention_heads * model.geometry.head_dim * context / 2


def answers(job: Job, rates: Rates) -> list[Answer]:
    """Everything that follows."""
    teacher, student = job.teacher, job.student
    pairs = map_layers("ratio", student.geometry.num_layers, teacher.geometry.num_layers)
    layers = len({layer for _, layer in pairs})
    kept = KVGeometry(layers, teacher.geometry.num_kv_heads, teacher.geometry.head_dim)
    bytes_per_token = stored_bytes_per_token(kept, job.dtype)
    all_layers = stored_bytes_per_token(teacher.geometry, job.dtype)
    store = job.tokens * bytes_per_token
    capture = 2 * trunk_parameters(teacher) + attention_operations(teacher, job.context)
    capture_seconds = job.tokens * capture / rates.operations
    write_seconds = store / min(rates.cards * rates.write, rates.drive)
    adapters = 2 * adapter_parameters(
        student.geometry.kv_dim, teacher.geometry.kv_dim, job.mlp_ratio, skip=True, num_layers=len(pairs)
    )
    step = 6 * (student.parameters + adapters) + 3 * attention_operations(student, job.context)
    step_seconds = job.epochs * job.tokens * step / rates.operations
    read_seconds = job.epochs * store / min(rates.cards * rates.read, rates.drive)
    whole = max(capture_seconds, write_seconds) + max(step_seconds, read_seconds)
    online = job.epochs * capture_seconds + step_seconds
    state = (student.parameters + adapters) * FLOAT32_BYTES * TRAINING_COPIES
    return [
        Answer("KV a token, all layers", "2 x layers x kv_dim x bytes", f"{all_layers:,} bytes"),
        Answer(f"KV a token, the {layers} mapped layers", "the same", f"{bytes_per_token:,} bytes"),
        Answer("store", "tokens x bytes a token", f"{store / TERA:.2f} TB"),
        Answer("teacher's weights, each card", "2 bytes x weights / cards", _gigabytes(teacher, rates)),
        Answer("capture, operations a token", "2 x weights of the layers + attention", f"{capture / GIGA:.0f} G"),
        Answer("capture, the cards' part", "tokens x operations / rate of all cards", _hours(capture_seconds)),
        Answer("capture, writing's part", "store / min(cards x write, drive)", _hours(write_seconds)),
        Answer("adapters", "2 x layers x (width x hidden + ...)", f"{adapters / MEGA:.1f}M parameters"),
        Answer("training, operations a token", "6 x (student + adapters) + attention", f"{step / GIGA:.1f} G"),
        Answer("training, the cards' part", "epochs x tokens x operations / rate", _hours(step_seconds)),
        Answer("training, reading's part", "epochs x store / min(cards x read, drive)", _hours(read_seconds)),
        Answer("training state, each card", "16 bytes x (student + adapters)", f"{state / GIGA:.1f} GB"),
        Answer("in all, each half at its bound", "max of capture + max of training", _hours(whole)),
        Answer("teacher in every step instead", "epochs x capture + training", _hours(online)),
    ]


def _gigabytes(teacher: KnownModel, rates: Rates) -> str:
    return f"{teacher.parameters * HALF_BYTES / rates.cards / GIGA:.1f} GB"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h"


def measured_rates(repeats: int = 3) -> tuple[float, float]:
    """Bytes a second of one process that writes and that reads a store in float16 here, on the processor's clock."""
    sizes = Sizes(layers=28, tokens=512, student_width=256, teacher_width=1024, ratio=2.0, dropout=0.0)
    kv, texts = teacher_text(sizes), sizes.tokens // TOKENS_OF_TEXT
    writing, reading = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            keys = write_store(Path(folder), kv, texts)
            writing.append(time.process_time() - started)
            store = KVStore.open(Path(folder), verify=False)
            reading.append(processor_seconds(lambda store=store, keys=keys: [store.read(key) for key in keys]))
            size = store.total_bytes
    return size / min(writing), size / min(reading)


def main(
    teacher: Annotated[str, typer.Option(help="A model of src/kvgraft/models/known.")] = "Llama-3-70B",
    student: Annotated[str, typer.Option(help="Likewise.")] = "Qwen2-1.5B",
    tokens: Annotated[int, typer.Option(help="Tokens of text.")] = 10_000_000,
    epochs: Annotated[int, typer.Option(help="Epochs of training.")] = 3,
    context: Annotated[int, typer.Option(help="Tokens of a text.")] = 1024,
    mlp_ratio: Annotated[float, typer.Option(help="Of the adapters.")] = 2.0,
    dtype: Annotated[str, typer.Option(help="Of the store.")] = "float16",
    cards: Annotated[int, typer.Option(help="Accelerators, with a process each.")] = 8,
    card_teraflops: Annotated[
        float, typer.Option(help="Published rate of one, dense bf16; default an H100 SXM's.")
    ] = 989,
    utilisation: Annotated[float, typer.Option(help="Assumed share of that rate.")] = 0.4,
    drive_gigabytes: Annotated[float, typer.Option(help="Published GB/s of the drive; default a PCIe 4 NVMe's.")] = 7,
    write_megabytes: Annotated[float | None, typer.Option(help="MB/s of one process; default measured here.")] = None,
    read_megabytes: Annotated[float | None, typer.Option(help="Likewise.")] = None,
) -> None:
    """Print both tables in Markdown."""
    models = known_models()
    for name, option in ((teacher, "--teacher"), (student, "--student")):
        if name not in models:
            raise typer.BadParameter(f"no model {name!r}; there are {', '.join(models)}", param_hint=option)
    job = Job(models[teacher], models[student], tokens, epochs, context, mlp_ratio, dtype)
    write, read = (write_megabytes or 0) * MEGA, (read_megabytes or 0) * MEGA
    given = {"write": write_megabytes is not None, "read": read_megabytes is not None}
    if not all(given.values()):
        # Other numbers take longer to code than float16 and are fewer bytes.
        if dtype != MEASURED_DTYPE:
            raise typer.BadParameter(
                f"rates are measured in {MEASURED_DTYPE}; give --write-megabytes and --read-megabytes of {dtype}",
                param_hint="--dtype",
            )
        measured = measured_rates()
        write, read = write or measured[0], read or measured[1]
    rates = Rates(cards, card_teraflops * TERA, utilisation, write, read, drive_gigabytes * GIGA)
    inputs = [
        ("teacher", f"{teacher}, {job.teacher.parameters / GIGA:.1f}B parameters", "counted"),
        ("student", f"{student}, {job.student.parameters / GIGA:.2f}B parameters", "counted"),
        ("work", f"{tokens:,} tokens in texts of {context:,}, {epochs} epochs, store in {dtype}", "asked"),
        ("a card", f"{card_teraflops:g} TFLOP/s dense bf16, {cards} of them", "published"),
        ("put to use of that", f"{utilisation:.0%}", "assumed"),
        ("a process writes", f"{write / MEGA:,.0f} MB/s", "given" if given["write"] else "measured, one CPU core"),
        ("a process reads", f"{read / MEGA:,.0f} MB/s", "given" if given["read"] else "measured, one CPU core"),
        ("the drive", f"{drive_gigabytes:g} GB/s", "published"),
    ]
    typer.echo("| input | value | from |\n| --- | --- | --- |")
    for row in inputs:
        typer.echo(f"| {' | '.join(row)} |")
    typer.echo("\n| what | formula | result |\n| --- | --- | ---: |")
    for answer in answers(job, rates):
        typer.echo(f"| {answer.what} | {answer.formula} | {answer.value} |")


if __name__ == "__main__":
    typer.run(main)
