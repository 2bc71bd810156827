"""How much faster does a student answer problems in batches than one at a time, and are the answers the same?

    python benchmarks/generation.py runs/quickstart --arm kv

Prints tokens per second of plain `generate` on one prompt after another, of `generate_greedy` on batches, their ratio,
and how many answers are the same. The two take turns, so that a busy machine weighs on both; the ratio is the median
over rounds.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgraft.data.datasets import load_examples
from kvgraft.evaluate.generation import generate_greedy
from kvgraft.evaluate.gsm8k import problems_of
from kvgraft.models.loading import load_model, load_tokenizer
from kvgraft.recipe import load_recipe


def main(
    run: Annotated[Path, typer.Argument(help="A finished run.")],
    arm: Annotated[str, typer.Option(help="Whose student.")] = "kv",
    problems: Annotated[int, typer.Option(help="Held-out problems to answer.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Problems answered together.")] = 32,
    rounds: Annotated[int, typer.Option(help="Measurements of each.")] = 3,
) -> None:
    """Measure, and print one line for each round."""
    student = str(run / arm / "student")
    model, tokenizer = load_model(student), load_tokenizer(student)
    data = load_recipe(run / "recipe.yaml").data
    examples = load_examples(data.held_out or data.train, "held_out", problems, data.seed)
    prompts = [problem.question for problem in problems_of(examples, data.train)]
    generate_greedy(model, tokenizer, prompts[:2], max_new_tokens=8)
    ratios = []
    for number in range(1, rounds + 1):
        started = time.perf_counter()
        alone = [_answer(model, tokenizer, prompt, max_new_tokens) for prompt in prompts]
        between = time.perf_counter()
        together = generate_greedy(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
        ended = time.perf_counter()
        speeds = (
            sum(len(ids) for ids in alone) / (between - started),
            sum(generation.tokens for generation in together) / (ended - between),
        )
        ratios.append(speeds[1] / speeds[0])
        same = sum(
            tokenizer.decode(ids, skip_special_tokens=True) == generation.text
            for ids, generation in zip(alone, together, strict=True)
        )
        typer.echo(
            f"round {number}: one by one {speeds[0]:,.0f} tokens per second, batches of {batch_size} {speeds[1]:,.0f}, "
            f"{ratios[-1]:.2f} times; {same} of {len(prompts)} answers the same"
        )
    typer.echo(f"ratio, median of {rounds} rounds: {median(ratios):.2f}")


@torch.no_grad()
def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> list[int]:
    """Ids of the answer that plain `generate` gives."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    output = model.generate(
        ids, max_new_tokens=tokens, do_sample=False, num_beams=1, pad_token_id=tokenizer.pad_token_id
    )
    return output[0, ids.shape[1] :].tolist()


if __name__ == "__main__":
    typer.run(main)
