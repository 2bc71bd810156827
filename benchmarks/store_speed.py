"""How fast is a store written and read, over plain writes and numpy memmap slices of the same bytes?

    python benchmarks/store_speed.py

Random numbers in the shape of SmolLM2-135M's KV (30 layers, 3 heads of 64), float16 on disk, float32 in memory, texts
in random order. The cold reads are after the kernel was asked to forget the files.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from interleaved import interleaved_medians

from kvgraft.data.spans import sample_key
from kvgraft.kv import KV
from kvgraft.store.format import StoreIdentity
from kvgraft.store.reader import KVStore
from kvgraft.store.writer import KVStoreWriter

LAYERS, HEADS, HEAD_DIM, TOKENS = 30, 3, 64, 200
DTYPES = ("float16", "int8", "float8", "int4")


def main(
    texts: Annotated[int, typer.Option(help="Texts of 200 tokens.")] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="Where to write; default the system's temporary folder.")] = None,
) -> None:
    """Print the ratios in Markdown."""
    typer.echo(measure(texts, repeats, folder)["table"])


def measure(texts: int = 32, repeats: int = 5, folder: Path | None = None) -> dict[str, object]:
    """Seconds and rates over the plain way, and ``table``."""
    keys = [sample_key(str(index)) for index in range(texts)]
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(texts, 2, LAYERS, HEADS, TOKENS, HEAD_DIM, generator=generator)
    with tempfile.TemporaryDirectory(dir=folder) as root:
        writing = _measure_writing(Path(root), keys, numbers, repeats)
        reading = _measure_reading(Path(root), keys, numbers, repeats)
    megabytes = numbers.numel() * 2 / 1e6
    rows = [(f"write {dtype}", writing["plain"] / writing[dtype]) for dtype in DTYPES]
    for state, found in reading.items():
        rows += [(f"read {dtype}, {state}", found["memmap"] / found[dtype]) for dtype in DTYPES]
        rows.append((f"read float16, {state}, over bare slices", found["memmap, no conversion"] / found["float16"]))
        rows.append((f"a quarter of the layers, {state}, over all", found["float16"] / found["quarter"]))
    lines = [
        f"{megabytes:.0f} MB in float16; plain write {megabytes / writing['plain']:.0f} MB/s, memmap warm "
        f"{megabytes / reading['warm']['memmap']:.0f} MB/s; median of {repeats} interleaved rounds\n",
        "| what | rate over the plain way |\n| --- | ---: |",
        *(f"| {name} | {ratio:.2f} |" for name, ratio in rows),
    ]
    return {"seconds": {"write": writing, **reading}, **dict(rows), "table": "\n".join(lines)}


def _measure_writing(root: Path, keys: list[str], numbers: torch.Tensor, repeats: int) -> dict[str, float]:
    # As the store lays it out, so that the plain way has nothing to do but to write.
    halves = numbers.permute(0, 4, 2, 1, 3, 5).flatten(-2).half().contiguous().numpy()

    def plain() -> None:
        with open(root / "plain.bin", "wb") as file:
            file.write(halves.data)
            file.flush()
            os.fsync(file.fileno())

    def store(dtype: str) -> Callable[[], None]:
        return lambda: _write_store(root / dtype, dtype, keys, numbers)

    return interleaved_medians({"plain": plain, **{dtype: store(dtype) for dtype in DTYPES}}, repeats)


def _write_store(folder: Path, dtype: str, keys: list[str], numbers: torch.Tensor) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    identity = StoreIdentity("model", "tokenizer", "text", tuple(range(LAYERS)), HEADS, HEAD_DIM, dtype, TOKENS)
    positions, mask = torch.arange(TOKENS)[None], torch.ones(1, TOKENS, dtype=torch.bool)
    spans = np.zeros((TOKENS, 2), dtype=np.int32)
    with KVStoreWriter(folder, identity, 64_000_000) as writer:
        for key, (one_keys, one_values) in zip(keys, numbers, strict=True):
            kv = KV(one_keys[None], one_values[None], positions, mask, identity.layers)
            writer.add(key, kv, spans, 0, TOKENS)
        writer.finish()


def _measure_reading(root: Path, keys: list[str], numbers: torch.Tensor, repeats: int) -> dict[str, dict[str, float]]:
    order = list(range(len(keys)))
    random.Random(0).shuffle(order)
    shape = (len(keys) * TOKENS, LAYERS, 2, HEADS * HEAD_DIM)

    def memmap(convert: bool) -> None:
        mapped = np.memmap(root / "plain.bin", np.float16, "r", shape=shape)
        for index in order:
            rows = mapped[index * TOKENS : (index + 1) * TOKENS]
            rows.astype(np.float32) if convert else np.array(rows)

    def store(dtype: str, layers: list[int] | None = None) -> Callable[[], None]:
        def read() -> None:
            opened = KVStore.open(root / dtype, verify=False)
            for index in order:
                opened.read(keys[index], layers)

        return read

    def forget() -> None:
        for path in root.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

    ways: dict[str, Callable[[], None]] = {
        "memmap": lambda: memmap(True),
        "memmap, no conversion": lambda: memmap(False),
        **{dtype: store(dtype) for dtype in DTYPES},
        "quarter": store("float16", list(range(0, LAYERS, 4))),
    }
    return {
        "warm": interleaved_medians(ways, repeats),
        "cold": interleaved_medians(ways, repeats, before_each=forget),
    }


if __name__ == "__main__":
    typer.run(main)
