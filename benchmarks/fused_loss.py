"""What does the fused projection and KV loss cost? Ratios over the plain way, measured in one run.

    python benchmarks/fused_loss.py

Forward and backward of the keys' and values' adapters and their loss, student to teacher, one adapter a layer.

- plain: per-layer modules of torch called in a loop, autograd, all projected KV held, then the same loss.
- stacked: `KVDimensionProjector` and `kv_regression_loss`, which hold all projected KV too.
- fused: `fused_kv_loss`; compiled: the same by `torch.compile`. Its memory is not measured: making it takes more.

Time is processor time of one thread, the least of several interleaved repeats, so that other processes weigh little.
The matrix-product rate is that of the two maps' six products (forward, both gradients), all tokens of a layer at once.
Memory is the peak of the resident set in a forked process of its own, over what it was just before the step, less one
copy of the gradients, which every way leaves behind. Needs Linux.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from profiled import profile_table
from torch import Tensor, nn

from kvgraft.distill.fused import fused_kv_loss
from kvgraft.distill.losses import KVScale, kv_regression_loss
from kvgraft.kv import KV
from kvgraft.projector.projector import KVDimensionProjector

TEXTS = 8
HEAD_DIM = 64
TEACHER = "teacher"
COMPILED = "fused, compiled"


@dataclass(frozen=True)
class Sizes:
    """What is projected: ``tokens`` in :data:`TEXTS` texts, without padding."""

    layers: int
    tokens: int
    student_width: int
    teacher_width: int
    ratio: float
    dropout: float

    @property
    def hidden(self) -> int:
        """Hidden units of an adapter."""
        return int(self.student_width * self.ratio)

    @property
    def product_operations(self) -> float:
        """Multiplications and additions of all matrix products, forward and backward, keys and values."""
        return 2 * 3 * 2 * self.layers * self.tokens * self.hidden * (self.student_width + self.teacher_width)


class Step:
    """Inputs and adapters of one size, and each way to make a loss and its gradients from them.

    The modules that the plain way alone has are as large as the projector; ``with_plain=False`` leaves them out.
    """

    def __init__(self, sizes: Sizes, with_plain: bool = True) -> None:
        torch.manual_seed(0)
        self.sizes = sizes
        self.student, self.teacher = (self._kv(width) for width in (sizes.student_width, sizes.teacher_width))
        shape = (2, sizes.layers, sizes.teacher_width)
        self.scale = KVScale(torch.zeros(shape), torch.ones(shape[:2]))
        self.projector = KVDimensionProjector(
            {TEACHER: {"d_model": sizes.teacher_width, "num_layers": sizes.layers}},
            sizes.student_width,
            sizes.ratio,
            sizes.dropout,
            per_layer=True,
            direction="student_to_teacher",
        )
        self.projector.standardise_outputs(TEACHER, self.scale.mean, self.scale.deviation)
        self.modules = nn.ModuleList(self._adapter() for _ in range(2 * sizes.layers if with_plain else 0))
        self.ways: dict[str, Callable[[], Tensor]] = {
            "plain": self.plain,
            "stacked": self.stacked,
            "fused": self.fused,
            COMPILED: lambda: self.fused(compiled=True),
        }

    def run(self, way: str) -> None:
        """Loss and gradients; a weight on the loss, as training has."""
        (10 * self.ways[way]()).backward()

    def clear(self) -> None:
        """Drop all gradients."""
        self.student.keys.grad = self.student.values.grad = None
        for module in (self.projector, self.modules):
            module.zero_grad()

    def plain(self) -> Tensor:
        """Per-layer modules in a loop."""
        layers = self.sizes.layers
        keys, values = (
            torch.stack([adapter(x) for adapter, x in zip(adapters, side.unbind(1), strict=True)], 1)
            for adapters, side in zip(
                (self.modules[:layers], self.modules[layers:]), self.student.flatten(), strict=True
            )
        )
        return kv_regression_loss((keys, values), self.teacher, self.teacher.mask, scale=self.scale)

    def stacked(self) -> Tensor:
        """The projector, then the loss."""
        projected = self.projector.project_student_kv(TEACHER, self.student)
        return kv_regression_loss(projected, self.teacher, self.teacher.mask, scale=self.scale)

    def fused(self, compiled: bool = False) -> Tensor:
        """Piece by piece."""
        return fused_kv_loss(
            self.projector,
            TEACHER,
            self.student,
            self.teacher,
            objective="student_to_teacher",
            student_layers=self.student.layers,
            scale=self.scale,
            compiled=compiled,
        )[0]

    def gradient_bytes(self) -> int:
        """Bytes of one copy of all gradients."""
        parameters = sum(parameter.numel() for parameter in self.projector.parameters())
        return 4 * (2 * self.student.keys.numel() + parameters)

    def _kv(self, width: int) -> KV:
        tokens = self.sizes.tokens // TEXTS
        shape = (TEXTS, self.sizes.layers, width // HEAD_DIM, tokens, HEAD_DIM)
        needs_gradient = width == self.sizes.student_width
        keys, values = (torch.randn(shape).requires_grad_(needs_gradient) for _ in range(2))
        mask = torch.ones(TEXTS, tokens, dtype=torch.bool)
        return KV(keys, values, torch.arange(tokens).expand(TEXTS, -1), mask, tuple(range(self.sizes.layers)))

    def _adapter(self) -> nn.Sequential:
        sizes = self.sizes
        return nn.Sequential(
            nn.LayerNorm(sizes.student_width),
            nn.Linear(sizes.student_width, sizes.hidden),
            nn.SiLU(),
            nn.Dropout(sizes.dropout),
            nn.Linear(sizes.hidden, sizes.teacher_width),
        )


def product_seconds(sizes: Sizes, skip: bool = False) -> float:
    """Seconds of all matrix products alone, from those of one layer; ``skip``: with a linear map beside the two."""
    rows, hidden = sizes.tokens, sizes.hidden
    x, y = torch.randn(rows, sizes.student_width), torch.randn(rows, sizes.teacher_width)
    up, down, z = torch.randn(hidden, x.shape[1]), torch.randn(y.shape[1], hidden), torch.randn(rows, hidden)

    products = [(x, up.T), (z, down.T), (y, down), (y.T, z), (z, up), (z.T, x)]
    if skip:
        beside = torch.randn(y.shape[1], x.shape[1])
        products += [(x, beside.T), (y, beside), (y.T, x)]

    def layer() -> None:
        for left, right in products:
            left @ right

    return 2 * sizes.layers * min(processor_seconds(layer) for _ in range(5))


def least_seconds(sizes: Sizes, ways: list[str], repeats: int) -> dict[str, float]:
    """Seconds of each way and of the matrix products alone, interleaved."""
    step = Step(sizes)
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        found.setdefault("products", []).append(product_seconds(sizes))
        for way in ways:
            step.clear()
            found.setdefault(way, []).append(processor_seconds(lambda way=way: step.run(way)))
    return {way: min(seconds) for way, seconds in found.items()}


def extra_bytes(sizes: Sizes, way: str) -> int:
    """Peak memory of one step beyond what was there before and the gradients; in a process of its own."""
    step = Step(sizes)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step.run(way)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident - step.gradient_bytes()


def main(
    layers: Annotated[int, typer.Option(help="Layers.")] = 28,
    tokens: Annotated[int, typer.Option(help="Tokens of the batch.")] = 2048,
    student_width: Annotated[int, typer.Option(help="kv_dim of the student.")] = 192,
    teacher_width: Annotated[int, typer.Option(help="kv_dim of the teacher.")] = 256,
    ratio: Annotated[float, typer.Option(help="mlp_ratio.")] = 2.0,
    dropout: Annotated[list[float] | None, typer.Option(help="Dropout; default 0.1 and 0.")] = None,
    repeats: Annotated[int, typer.Option(help="Repeats of which the fastest counts.")] = 3,
    growth: Annotated[bool, typer.Option(help="Also the table over tokens and layers.")] = True,
    profile: Annotated[bool, typer.Option("--profile", help="What the fused way computes, instead.")] = False,
) -> None:
    """Print the tables in Markdown."""
    torch.set_num_threads(1)
    if profile:
        for share in dropout or [0.1, 0.0]:
            step = Step(Sizes(layers, tokens, student_width, teacher_width, ratio, share))
            typer.echo(profile_table(partial(step.run, "fused"), f"the fused way, dropout {share:g}"))
        return
    typer.echo(f"{layers} layers x {tokens:,} tokens, kv_dim {student_width} to {teacher_width}, ratio {ratio:g}\n")
    typer.echo("| dropout | way | seconds | time over plain | share of product rate | extra MB | memory over plain |")
    typer.echo("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for share in dropout or [0.1, 0.0]:
        sizes = Sizes(layers, tokens, student_width, teacher_width, ratio, share)
        ways = ["plain", "stacked", "fused"]
        memory = {way: in_own_process(extra_bytes, sizes, way) for way in ways}
        seconds = in_own_process(least_seconds, sizes, [*ways, COMPILED], repeats)
        for way in [*ways, COMPILED]:
            held = f"{memory[way] / 1e6:,.0f} | {memory[way] / memory['plain']:.3f}" if way in memory else "- | -"
            typer.echo(
                f"| {share:g} | {way} | {seconds[way]:.2f} | {seconds[way] / seconds['plain']:.2f} | "
                f"{seconds['products'] / seconds[way]:.0%} | {held} |"
            )
        rate = sizes.product_operations / seconds["products"] / 1e9
        typer.echo(f"| {share:g} | products alone, {rate:.0f} GFLOP/s | {seconds['products']:.2f} | | 100% | | |")
    if growth:
        _print_growth(student_width, teacher_width, ratio)


def _print_growth(student_width: int, teacher_width: int, ratio: float) -> None:
    typer.echo("\n| layers | tokens | microseconds a token and layer | gradients MB | extra MB |")
    typer.echo("| ---: | ---: | ---: | ---: | ---: |")
    for layers, tokens in ((7, 512), (7, 1024), (7, 2048), (7, 4096), (14, 1024), (28, 1024)):
        sizes = Sizes(layers, tokens, student_width, teacher_width, ratio, 0.1)
        seconds = in_own_process(least_seconds, sizes, ["fused"], 1)["fused"] / layers / tokens
        extra, gradients = in_own_process(extra_bytes, sizes, "fused"), in_own_process(_gradient_bytes, sizes)
        typer.echo(f"| {layers} | {tokens:,} | {seconds * 1e6:.1f} | {gradients / 1e6:,.0f} | {extra / 1e6:,.0f} |")


def _gradient_bytes(sizes: Sizes) -> int:
    return Step(sizes).gradient_bytes()


def processor_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


if __name__ == "__main__":
    typer.run(main)
