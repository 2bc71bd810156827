"""Capture, caching, projection with KV loss, and moving KV, on one card: seconds, and shares of what the card can do.

    python benchmarks/accelerator.py

What the card can do is measured in the same run: the rate of a large matrix product, a copy on the card, and a copy of
pinned memory to it. The teacher has the shape of a known model and random weights, so that nothing is fetched. Times
are medians of interleaved rounds; the card has finished before a clock is read. `--device cpu --small` tries it out
where there is no card.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from capture_speed import unrotated_cache
from fused_loss import COMPILED, Sizes, Step
from interleaved import interleaved_medians
from store_speed import measure_caching
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvgraft.models.capture import capture
from kvgraft.models.decoder import decoder_of
from kvgraft.models.geometry import kv_geometry
from kvgraft.models.known import KnownModel, known_models

ROUNDS = 5
CACHED_DTYPES = ("float16", "int8", "float8", "compact")


@dataclass(frozen=True)
class Work:
    """How much is measured.

    Attributes:
        model: whose shape the teacher has.
        batch, tokens: of a pass of the teacher.
        loss: sizes of projection and KV loss.
        product: rows of the square matrices that tell the rate.
        copied: bytes of the copies.
    """

    model: KnownModel
    batch: int
    tokens: int
    loss: Sizes
    product: int
    copied: int


@dataclass(frozen=True)
class Limits:
    """What the card does a second: operations in bfloat16 and in float32 as set, and bytes."""

    bfloat16: float
    float32: float
    copy: float
    to_card: float


def main(
    device: Annotated[str, typer.Option(help="The card.")] = "cuda",
    small: Annotated[bool, typer.Option("--small", help="A few layers and tokens, to try it out.")] = False,
    model: Annotated[str, typer.Option(help="A model of src/kvgraft/models/known.")] = "Qwen2-1.5B",
    output: Annotated[Path | None, typer.Option(help="The figures as JSON, with the card's name.")] = None,
) -> None:
    """Print the tables in Markdown."""
    chosen, known = torch.device(device), known_models()
    if model not in known:
        raise typer.BadParameter(f"no model {model!r}; there are {', '.join(known)}", param_hint="--model")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no card; --device cpu --small tries this out", param_hint="--device")
    work = Work(known[model], 8, 1024, Sizes(28, 16_384, 256, 1024, 2.0, 0.1), 8192, 1 << 30)
    if small:
        shape = known[model].model_copy(update={"num_hidden_layers": 2, "vocab_size": 1000})
        work = Work(shape, 2, 64, Sizes(2, 256, 64, 128, 2.0, 0.1), 256, 1 << 20)
    limits = measure_limits(chosen, work)
    teacher = random_model(work.model, chosen)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else platform.processor() or "processor"
    figures: dict[str, Any] = {
        "card": name,
        "limits": vars(limits),
        "capture": measure_capture(teacher, work, limits),
        "caching": {dtype: caching_over_capture(teacher, work, dtype) for dtype in CACHED_DTYPES},
        "projection and KV loss": measure_loss(chosen, work, limits),
    }
    typer.echo(
        f"{name}: {limits.bfloat16 / 1e12:,.1f} TFLOP/s in bfloat16, {limits.float32 / 1e12:,.1f} in float32, "
        f"{limits.copy / 1e9:,.0f} GB/s copied, {limits.to_card / 1e9:,.1f} GB/s from pinned memory"
    )
    for part in ("capture", "projection and KV loss"):
        typer.echo(f"\n| {part} | ms | share of the matrix rate | peak MB |\n| --- | ---: | ---: | ---: |")
        for way, (seconds, share, peak) in figures[part].items():
            typer.echo(f"| {way} | {seconds * 1e3:,.1f} | {share:.0%} | {peak / 1e6:,.0f} |")
    typer.echo("\n| caching | time over capture alone |\n| --- | ---: |")
    for dtype, ratio in figures["caching"].items():
        typer.echo(f"| {dtype} | {ratio:.3f} |")
    if output is not None:
        output.write_text(json.dumps(figures, indent=2))


def measure_limits(device: torch.device, work: Work) -> Limits:
    """Matrix products and copies alone."""
    rates = []
    for dtype in (torch.bfloat16, torch.float32):
        left, right = (torch.randn(work.product, work.product, device=device, dtype=dtype) for _ in range(2))
        rates.append(2 * work.product**3 / _seconds(device, {"": lambda a=left, b=right: a @ b})[""])
    there = torch.empty(work.copied, dtype=torch.uint8, device=device)
    here = torch.empty(work.copied, dtype=torch.uint8, pin_memory=device.type == "cuda")
    seconds = _seconds(device, {"copy": lambda: there.clone(), "to card": lambda: there.copy_(here, non_blocking=True)})
    return Limits(rates[0], rates[1], 2 * work.copied / seconds["copy"], work.copied / seconds["to card"])


def measure_capture(model: PreTrainedModel, work: Work, limits: Limits) -> dict[str, tuple[float, float, float]]:
    """Seconds, share of the matrix rate and peak bytes of the trunk alone, of capture, and of a cache un-rotated."""
    device = model.device
    input_ids = torch.randint(work.model.vocab_size, (work.batch, work.tokens), device=device)
    positions = torch.arange(work.tokens, device=device).expand(work.batch, -1)
    ways: dict[str, Callable[[], object]] = {
        "trunk": lambda: decoder_of(model)(input_ids=input_ids, position_ids=positions, use_cache=False),
        "capture, all layers": lambda: capture(model, input_ids),
        "capture, lower half": lambda: capture(
            model, input_ids, layers=range(kv_geometry(model.config).num_layers // 2)
        ),
        "cache of the whole model, un-rotated": lambda: unrotated_cache(model, input_ids, positions),
    }
    weights = sum(parameter.numel() for parameter in decoder_of(model).layers.parameters())
    operations = 2 * weights * work.batch * work.tokens
    with torch.no_grad():
        found = _seconds(device, ways)
        peaks = {name: _peak(device, way) for name, way in ways.items()}
    # The lower half does half of it, and the head is left out of the last.
    shares = {name: operations / seconds / limits.bfloat16 for name, seconds in found.items()}
    shares["capture, lower half"] /= 2
    return {name: (found[name], shares[name], peaks[name]) for name in ways}


def caching_over_capture(model: PreTrainedModel, work: Work, dtype: str) -> float:
    """Time of filling a store of ``dtype`` by two passes over that of the passes alone."""
    measured = measure_caching(ROUNDS, texts=2 * work.batch, tokens=work.tokens, dtype=dtype, model=model)
    return float(measured["ratio"])


def measure_loss(device: torch.device, work: Work, limits: Limits) -> dict[str, tuple[float, float, float]]:
    """The same of projection and KV loss, forward and backward."""
    with device:
        step = Step(work.loss)
    compiled = torch.compile(step.stacked)

    def way(loss: Callable[[], Tensor], bfloat16: bool) -> Callable[[], None]:
        def run() -> None:
            step.clear()
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                value = loss()
            value.backward()

        return run

    losses = {
        "all layers held": step.stacked,
        "all layers held, compiled": compiled,
        "fused": step.fused,
        COMPILED: step.ways[COMPILED],
    }
    found: dict[str, tuple[float, float, float]] = {}
    for bfloat16, rate in ((False, limits.float32), (True, limits.bfloat16)):
        dtype = "bfloat16" if bfloat16 else "float32"
        ways = {f"{name}, {dtype}": way(loss, bfloat16) for name, loss in losses.items()}
        for name, seconds in _seconds(device, ways).items():
            found[name] = (seconds, work.loss.product_operations / seconds / rate, _peak(device, ways[name]))
    return found


def random_model(known: KnownModel, device: torch.device) -> PreTrainedModel:
    """A model of a known shape in bfloat16, with random weights."""
    fields = known.model_dump(exclude={"name", "hub_name", "model_type", "parameters"}, exclude_none=True)
    config = AutoConfig.for_model(known.model_type, **fields)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def _seconds(device: torch.device, ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    def finished(way: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run

    return interleaved_medians({name: finished(way) for name, way in ways.items()}, ROUNDS)


def _peak(device: torch.device, way: Callable[[], object]) -> float:
    """Bytes that ``way`` holds at most beyond what is there before; 0 where nothing counts them."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    way()
    torch.cuda.synchronize(device)
    return float(torch.cuda.max_memory_allocated(device) - before)


if __name__ == "__main__":
    typer.run(main)
