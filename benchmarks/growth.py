"""How does cost grow with the size of the work? Time and memory of the KV loss and bytes of the store.

    python benchmarks/growth.py --plot docs/growth.png

From one middle size, tokens, layers, the teacher's kv_dim and the number of teachers grow, one at a time. The KV loss
is `fused_kv_loss` of each teacher, forward and backward, with one adapter a layer. A store is written by its own
writer.

- slope: of the straight line through the logarithms; 1 is growth in proportion, 2 quadratic, 0 none.
- constant: where the straight line through time or memory itself would be at size 0, as a share of the middle size.

Time is processor time of one thread, the least of several repeats. Memory is everything that a step holds at its peak
(KV of both sides, adapters, gradients, working space): the peak of the resident set of a forked process over what it
was before. Needs Linux.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import torch
import typer
from fused_loss import HEAD_DIM, TEXTS, Sizes, Step, in_own_process, processor_seconds
from matplotlib.figure import Figure

from kvgraft.data.spans import sample_key
from kvgraft.kv import KV
from kvgraft.memory import peak_memory
from kvgraft.store.format import StoreIdentity
from kvgraft.store.writer import KVStoreWriter

TOKENS_OF_TEXT = 256
MEASURES = {"seconds": "s", "memory": "MB", "store": "MB"}
TITLES = {"seconds": "time of a step", "memory": "memory of a step", "store": "store"}


@dataclass(frozen=True)
class Work:
    """One size of everything; ``sizes`` are those of each teacher."""

    sizes: Sizes
    teachers: int = 1


MIDDLE = Work(Sizes(layers=4, tokens=1024, student_width=192, teacher_width=256, ratio=2.0, dropout=0.0))
AXES: dict[str, list[tuple[int, Work]]] = {
    "tokens": [
        (tokens, replace(MIDDLE, sizes=replace(MIDDLE.sizes, tokens=tokens)))
        for tokens in (512, 1024, 2048, 4096, 8192)
    ],
    "teacher layers": [
        (layers, replace(MIDDLE, sizes=replace(MIDDLE.sizes, layers=layers))) for layers in (2, 4, 8, 16, 32)
    ],
    "kv_dim": [
        (width, replace(MIDDLE, sizes=replace(MIDDLE.sizes, teacher_width=width)))
        for width in (256, 512, 1024, 2048, 4096)
    ],
    "teachers": [(teachers, replace(MIDDLE, teachers=teachers)) for teachers in (1, 2, 4, 8)],
}


class TeachersStep:
    """A step with several teachers of one size, one after the other, as training takes them."""

    def __init__(self, work: Work) -> None:
        self.steps = [Step(work.sizes, with_plain=False) for _ in range(work.teachers)]

    def run(self) -> None:
        """Losses and gradients."""
        for step in self.steps:
            step.clear()
        torch.stack([step.fused() for step in self.steps]).sum().backward()


def least_seconds(work: Work, repeats: int) -> float:
    """Seconds of a step."""
    step = TeachersStep(work)
    step.run()
    return min(processor_seconds(step.run) for _ in range(repeats))


def held_bytes(work: Work) -> int:
    """Peak of everything that a step holds; in a process of its own."""
    # What the libraries take once is not the step's.
    TeachersStep(Work(replace(work.sizes, layers=1, tokens=TEXTS))).run()
    # What the allocator keeps of it would be taken again without showing.
    ctypes.CDLL(None).malloc_trim(0)
    before = psutil.Process().memory_info().rss
    TeachersStep(work).run()
    return peak_memory().host_bytes - before


def teacher_text(sizes: Sizes) -> KV:
    """A teacher's KV of one text, random."""
    shape = (1, sizes.layers, sizes.teacher_width // HEAD_DIM, TOKENS_OF_TEXT, HEAD_DIM)
    positions, mask = torch.arange(TOKENS_OF_TEXT)[None], torch.ones(1, TOKENS_OF_TEXT, dtype=torch.bool)
    return KV(torch.randn(shape), torch.randn(shape), positions, mask, tuple(range(sizes.layers)))


def write_store(folder: Path, kv: KV, texts: int) -> list[str]:
    """A store in float16 of one text again and again; its keys."""
    heads = kv.geometry.num_kv_heads
    identity = StoreIdentity("model", "tokenizer", "text", kv.layers, heads, HEAD_DIM, "float16", TOKENS_OF_TEXT)
    spans = np.zeros((TOKENS_OF_TEXT, 2), dtype=np.int32)
    keys = [sample_key(str(text)) for text in range(texts)]
    with KVStoreWriter(folder, identity, 64_000_000) as writer:
        for key in keys:
            writer.add(key, kv, spans, 0, TOKENS_OF_TEXT)
        writer.finish()
    return keys


def store_bytes(work: Work) -> int:
    """Bytes of all files of the teachers' stores over the step's tokens."""
    with tempfile.TemporaryDirectory() as folder:
        for teacher in range(work.teachers):
            write_store(Path(folder) / str(teacher), teacher_text(work.sizes), work.sizes.tokens // TOKENS_OF_TEXT)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def measure(repeats: int = 3) -> dict[str, object]:
    """By axis the sizes and what each took, and ``table``."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[float]]] = {}
    for axis, points in AXES.items():
        found[axis] = {
            "size": [size for size, _ in points],
            "seconds": [in_own_process(least_seconds, work, repeats) for _, work in points],
            "memory": [in_own_process(held_bytes, work) / 1e6 for _, work in points],
            # Not here: what this process once held, its children would take again without it showing.
            "store": [in_own_process(store_bytes, work) / 1e6 for _, work in points],
        }
    return {"growth": found, "table": "\n".join([*_point_rows(found), "", *_slope_rows(found)])}


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent of the power law that fits best."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def constant_share(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """What of the middle size's cost does not grow, by the straight line whose relative errors are least."""
    each, constant = np.polyfit(sizes, costs, 1, w=1 / np.array(costs))
    middle = sizes[len(sizes) // 2]
    return float(constant / (each * middle + constant))


def _point_rows(found: dict[str, dict[str, list[float]]]) -> list[str]:
    lines = ["| what grows | to | seconds | memory, MB | store, MB |", "| --- | ---: | ---: | ---: | ---: |"]
    for axis, measured in found.items():
        for size, *costs in zip(measured["size"], *(measured[name] for name in MEASURES), strict=True):
            lines.append(f"| {axis} | {size:,} | {costs[0]:.3f} | {costs[1]:,.0f} | {costs[2]:,.2f} |")
    return lines


def _slope_rows(found: dict[str, dict[str, list[float]]]) -> list[str]:
    lines = [
        "| what grows | time: slope, constant | memory: slope, constant | store: slope, constant |",
        "| --- | ---: | ---: | ---: |",
    ]
    for axis, measured in found.items():
        cells = [
            f"{slope(measured['size'], measured[name]):.2f}, {constant_share(measured['size'], measured[name]):.0%}"
            for name in MEASURES
        ]
        lines.append(f"| {axis} | {' | '.join(cells)} |")
    return lines


def save_plot(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """One log-log panel for each measure, a line for each axis over its smallest size; dotted is proportion."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for panel, (name, unit) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for axis, measured in found.items():
            sizes = np.array(measured["size"]) / measured["size"][0]
            panel.loglog(sizes, measured[name], marker="o", markersize=3, label=axis)
            panel.loglog(sizes, measured[name][0] * sizes, color="grey", linestyle=":", linewidth=0.8)
        panel.set_title(f"{TITLES[name]}, {unit}", fontsize=9)
        panel.set_xlabel("times the smallest size", fontsize=8)
        panel.tick_params(which="both", labelsize=7)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main(
    plot: Annotated[Path | None, typer.Option(help="Also save the plot as this PNG.")] = None,
    repeats: Annotated[int, typer.Option(help="Repeats of which the fastest counts.")] = 3,
) -> None:
    """Print the tables in Markdown."""
    measured = measure(repeats)
    typer.echo(measured["table"])
    if plot is not None:
        save_plot(measured["growth"], plot)  # type: ignore[arg-type]


if __name__ == "__main__":
    typer.run(main)
