"""The best linear map between two models' KV, from one pass over the pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvgraft.errors import ProjectorError
from kvgraft.fit.data import KVRows, PairDataset, join_rows
from kvgraft.progress import Advance, progress_bar
from kvgraft.projector.closed_form import LeastSquares, choose_ridge
from kvgraft.projector.projector import KVDimensionProjector

# One text in so many chooses the ridge strength; afterwards it is fitted on like the others.
_HELD_OUT_EVERY = 10
# Tokens that are taken in at once: enough for matrix products to pay.
_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class ClosedForm:
    """What the pass found: the ridge strength of each set of weights, keys first ``[2, sets]``, and the tokens."""

    ridges: Tensor
    tokens: int


@torch.no_grad()
def fit_closed_form(
    projector: KVDimensionProjector,
    teacher: str,
    pairs: PairDataset,
    *,
    ridge: float | None = None,
    fewer: Sequence[KVDimensionProjector] = (),
) -> ClosedForm:
    """Put the least-squares map into the linear part of ``teacher``'s adapters.

    Memory does not grow with the number of tokens: normal equations are summed in float64 as texts stream by.

    Args:
        projector: with a linear part (``init_method="least_squares"``, ``skip=True`` or ``mlp_ratio="linear"``). What
            it is standardised by has to be set before.
        teacher: its name.
        pairs: texts that both models have read; their ``token_weights`` count.
        ridge: strength of the penalty; default: for each set of weights the best of a few on held-out texts.
        fewer: like ``projector``, but each output layer reads only the first few of its source layers; fitted too, from
            the same pass.

    Raises:
        ProjectorError: no linear part, no token, or numbers that are not finite.
    """
    adapters = projector.adapters(teacher)
    if any(adapter.skip is None for adapter in adapters):
        raise ProjectorError(
            f"the adapters of teacher {teacher!r} have no linear part to fit; build the projector with "
            'init_method="least_squares", skip=True or mlp_ratio="linear"'
        )
    sums = _Sums(projector, teacher)
    with progress_bar(f"least squares for {teacher}", len(pairs), "texts") as advance:
        for rows, held_out in _chunks(pairs, advance):
            sums.add(rows, held_out)
    for smaller in fewer:
        sums.solve_for(smaller, ridge)
    return ClosedForm(sums.solve_for(projector, ridge), sums.tokens)


class _Sums:
    """Normal equations of fitted and of held-out texts; keys and values share them where they read the same."""

    def __init__(self, projector: KVDimensionProjector, teacher: str) -> None:
        self.projector, self.teacher = projector, teacher
        self.adapters = projector.adapters(teacher)
        key_adapter, _ = self.adapters
        self.joint = projector.source_kinds == "both"
        out_dim = key_adapter.out_dim * (2 if self.joint else 1)
        self.fitted, self.held_out = (
            [LeastSquares(key_adapter.num_layers, key_adapter.in_dim, out_dim) for _ in range(1 if self.joint else 2)]
            for _ in range(2)
        )
        self.tokens = 0

    def add(self, rows: KVRows, held_out: bool) -> None:
        self.tokens += len(rows)
        found = self.held_out if held_out else self.fitted
        targets = self.projector.targets_of(self.teacher, *rows.target[:, None])
        wanted = [torch.cat(targets, -1)] if self.joint else list(targets)
        if rows.weights is None and found[0].num_layers == rows.target.shape[1]:
            parts, joined = self._parts(rows)
            for equations, part, target in zip(found, parts, wanted, strict=True):
                equations.add_joined(part, joined, target[0])
            return
        sources = self.projector.sources_of_rows(self.teacher, *rows.source[:, None])
        mask = torch.ones(1, len(rows), dtype=torch.bool)
        weights = None if rows.weights is None else rows.weights[None]
        # Where keys and values are made from the same, one source serves both.
        for equations, source, target in zip(found, sources, wanted, strict=False):
            equations.add(source, target, mask, weights)

    def _parts(self, rows: KVRows) -> tuple[list[Tensor], list[list[int]]]:
        """Layers of the source ``[layers, tokens, width]``, keys and values one behind the other where both are read,
        and which of them each map reads."""
        inputs = self.projector.adapter_inputs(self.teacher, *rows.source[:, None])
        keys, values = inputs.keys[0], inputs.values[0]
        if not self.joint:
            return [keys, values], inputs.read
        return [torch.cat([keys, values])], [[*read, *(layer + len(keys) for layer in read)] for read in inputs.read]

    def solve_for(self, projector: KVDimensionProjector, ridge: float | None) -> Tensor:
        """Put the maps into ``projector``, which reads all source layers or the first of them; its ridges.

        The whole is solved last: it takes the held-out texts in.
        """
        ridges, maps = [], []
        columns = self._columns(projector)
        for fitted, held_out in zip(self.fitted, self.held_out, strict=True):
            own, kept_out = fitted, held_out
            if len(columns) < fitted.in_dim:
                own, kept_out = fitted.of_inputs(columns), held_out.of_inputs(columns)
            if ridge is None:
                chosen = choose_ridge(own, kept_out)
            else:
                chosen = torch.full((own.num_layers,), ridge, dtype=torch.float64)
            own.merge(kept_out)
            ridges.append(chosen)
            maps.append(own.solve(chosen))
        if self.joint:
            weight, bias = maps[0]
            maps = list(zip(weight.chunk(2, 1), bias.chunk(2, 1), strict=True))
            ridges = ridges * 2
        for adapter, (weight, bias) in zip(projector.adapters(self.teacher), maps, strict=True):
            adapter.load_linear(weight.float(), bias.float())
        return torch.stack(ridges)

    def _columns(self, projector: KVDimensionProjector) -> Tensor:
        """Which columns of the whole input are those of ``projector``'s source layers."""
        width, read = self.adapters[0].in_dim, projector.adapters(self.teacher)[0].in_dim
        blocks = (2 if self.joint else 1) * (1 + projector.context_tokens)
        return torch.arange(width).view(blocks, -1)[:, : read // blocks].flatten()


def _chunks(pairs: PairDataset, advance: Advance) -> Iterator[tuple[KVRows, bool]]:
    """Tokens of all texts, some texts at once; those that choose the ridge, if there are enough, apart and last."""
    kept_out = range(_HELD_OUT_EVERY - 1, len(pairs), _HELD_OUT_EVERY)
    for held_out, indices in ((False, [i for i in range(len(pairs)) if i not in kept_out]), (True, kept_out)):
        rows: list[KVRows] = []
        for index in indices:
            rows.append(pairs.rows_of(index))
            advance(1)
            if sum(len(part) for part in rows) >= _CHUNK_TOKENS or index == indices[-1]:
                yield join_rows(rows), held_out
                rows = []
