"""Memory and time of chunked logit distillation over the plain way: full logits of both models, then ``kl_div``.

    python benchmarks/logit_distillation.py
    python benchmarks/logit_distillation.py --tokens 16384 --vocabulary 8192  # at 49,152 the plain way takes 16 GB

Both start from the last hidden states and heads of student and teacher, and end with the gradient of the student's.
Sizes are SmolLM2-135M's (hidden size 576, vocabulary 49,152). Peak memory is what the allocator held beyond the inputs,
from PyTorch's own profiler on a CPU and its counters on a GPU. Runs alternate, and the fastest of each counts. The
share of the product rate is what our matrix products take alone, over what our way takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from products import MatrixProducts
from torch import Tensor

from kvgraft.distill.logits import FullTarget, divergence_loss
from kvgraft.models.head import Head

Loss = Callable[[Tensor, Head, FullTarget], Tensor]


def main(
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of a batch; may be given several times.")] = None,
    vocabulary: Annotated[int, typer.Option(help="Tokens of the shared vocabulary.")] = 49_152,
    width: Annotated[int, typer.Option(help="Hidden size of both models.")] = 576,
    beta: Annotated[list[float] | None, typer.Option(help="Of the divergence; 0 is the forward KL.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each way.")] = 3,
) -> None:
    """Print the ratios in Markdown."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    typer.echo(f"vocabulary {vocabulary:,}, hidden size {width}, {device}, {torch.get_num_threads()} threads\n")
    typer.echo("| loss | tokens | plain: MB | ours: MB | memory | plain: s | ours: s | time | share of product rate |")
    typer.echo("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for count in tokens or [1024]:
        for share in beta or [0.0, 0.5]:
            name = f"JSD, beta {share}" if share else "forward KL"
            inputs = _inputs(count, vocabulary, width, device)
            ways: tuple[Loss, Loss] = (_plain(share), _ours(share))
            peaks = [_peak_bytes(way, inputs) for way in ways]
            runs = [partial(_run, way, inputs) for way in ways]
            runs.append(MatrixProducts(runs[1]))
            seconds = [float("inf")] * len(runs)
            for _ in range(repeats):
                for index, run in enumerate(runs):
                    seconds[index] = min(seconds[index], _seconds(run))
            memory, time_ratio, of_rate = peaks[1] / peaks[0], seconds[1] / seconds[0], seconds[2] / seconds[1]
            typer.echo(
                f"| {name} | {count:,} | {peaks[0] / 1e6:,.0f} | {peaks[1] / 1e6:,.0f} | {memory:.2f} | "
                f"{seconds[0]:.2f} | {seconds[1]:.2f} | {time_ratio:.2f} | {of_rate:.0%} |"
            )


def _inputs(tokens: int, vocabulary: int, width: int, device: str) -> tuple[Tensor, Head, FullTarget]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).requires_grad_()
    teacher = Head(2 * torch.randn(vocabulary, width, device=device) / width**0.5)
    return hidden, Head(weight), FullTarget(torch.randn(tokens, width, device=device), teacher)


def _plain(beta: float) -> Loss:
    def loss(hidden: Tensor, head: Head, target: FullTarget) -> Tensor:
        student = F.log_softmax(hidden @ head.weight.T, -1)
        teacher = F.log_softmax(target.hidden @ target.head.weight.T, -1)
        if beta == 0:
            return F.kl_div(student, teacher, log_target=True, reduction="sum") / hidden.shape[0]
        shares = torch.tensor([1 - beta, beta], device=hidden.device).log()
        mixture = torch.logsumexp(torch.stack([student + shares[0], teacher + shares[1]]), 0)
        of_teacher = F.kl_div(mixture, teacher, log_target=True, reduction="sum")
        of_student = F.kl_div(mixture, student, log_target=True, reduction="sum")
        return (beta * of_teacher + (1 - beta) * of_student) / hidden.shape[0]

    return loss


def _ours(beta: float) -> Loss:
    return lambda hidden, head, target: divergence_loss(hidden, head, target, beta=beta)


def _run(way: Loss, inputs: tuple[Tensor, Head, FullTarget]) -> None:
    hidden, head, target = inputs
    hidden.grad = head.weight.grad = None
    way(hidden, head, target).backward()
    if hidden.is_cuda:
        torch.cuda.synchronize()


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _peak_bytes(way: Loss, inputs: tuple[Tensor, Head, FullTarget]) -> int:
    hidden = inputs[0]
    hidden.grad = inputs[1].weight.grad = None
    if hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _run(way, inputs)
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        _run(way, inputs)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


if __name__ == "__main__":
    typer.run(main)
