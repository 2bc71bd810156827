"""Projection and KV loss in one, piece by piece: memory grows neither with layers nor with tokens.

Loss and gradients of a few layers and tokens at a time are computed in the forward pass, and only the gradients are
kept; backward multiplies them by what arrives (the pattern of Liger-Kernel's chunked losses). Padding is left out
before it costs arithmetic. The plain way, which this equals, is to project all and to call
:func:`kvgraft.distill.losses.kv_regression_loss`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvgraft.distill.fused_pieces import Piece, compiled_errors_and_gradients
from kvgraft.distill.losses import KVScale, LossForm, normalised_layer_weights
from kvgraft.errors import KVGraftError, ProjectorError
from kvgraft.gradients import times_arriving
from kvgraft.kv import KV
from kvgraft.projector.adapters import ElasticBottleneck, layer_runs, sets_of_layers
from kvgraft.projector.dropout import TILE_TOKENS, draw_dropout, draw_seed, num_tiles
from kvgraft.projector.layerwise import is_bare
from kvgraft.projector.projector import KVDimensionProjector

# Rows (a token in a layer) of one piece: few enough for the caches of a CPU's core, enough to keep another device busy.
_CORE_ROWS, _DEVICE_ROWS = 4 * TILE_TOKENS, 128 * TILE_TOKENS


def can_fuse(projector: KVDimensionProjector, teacher: str) -> bool:
    """Whether :func:`fused_kv_loss` covers ``teacher``'s adapters; otherwise project and compare the plain way.

    Not covered: adapters that read more than their own layer and kind (``source_layers``, ``source_kinds="both"``,
    ``context_tokens``), standardised inputs, and adapters that something has wrapped or hooked, as sharded training
    does: their weights are whole inside their own forward pass only. Nor is a loss without a fixed scale, which is
    measured on the projected batch.
    """
    return (
        teacher not in projector.source_layers
        and projector.source_kinds == "same"
        and projector.context_tokens == 0
        and projector.standard("input", teacher) is None
        and all(is_bare(adapter) for adapter in projector.adapters(teacher))
    )


def fused_kv_loss(
    projector: KVDimensionProjector,
    teacher: str,
    student_kv: KV,
    teacher_kv: KV,
    *,
    objective: str,
    student_layers: Sequence[int],
    scale: KVScale,
    form: LossForm = "mse",
    keys_weight: float = 1.0,
    values_weight: float = 1.0,
    layer_weights: Sequence[float] | None = None,
    num_tokens: Tensor | int | None = None,
    piece_rows: int | None = None,
    token_weights: Tensor | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """The KV loss of ``objective`` over the true tokens of ``teacher_kv.mask``: a scalar, and it without weights.

    The second is what the loss would be if every token weighed 1, without gradient.

    Dropout comes from a seed for the keys and one for the values, which ``torch.manual_seed`` settles, and from the
    place of a token (:mod:`kvgraft.projector.dropout`): it does not depend on how the work is cut. Layers that have no
    weights in common drop the same units.

    Args:
        projector: one for which :func:`can_fuse` holds.
        teacher: its name.
        student_kv, teacher_kv: of the same texts and tokens; the teacher's has one layer for each compared pair.
        objective: as in :data:`kvgraft.distill.objectives.OBJECTIVES`.
        student_layers: the student layer (its index in the model) for each layer of ``teacher_kv``.
        piece_rows: tokens times layers that are worked on at once, default by the device; rounded to whole tiles of
            dropout.
        token_weights: ``[batch, tokens]``, what each token's error is multiplied by; default 1.
        compiled: let ``torch.compile`` make one piece's adapter and errors, forward and backward; default false.

    The other arguments are those of :func:`kvgraft.distill.losses.kv_regression_loss`.
    """
    mask = teacher_kv.mask
    # Once for both: a card has to be waited for.
    mask_on_processor = mask.cpu()
    count = mask.sum() if num_tokens is None else torch.as_tensor(num_tokens, device=mask.device)
    shares = normalised_layer_weights(layer_weights, len(student_layers), mask.device)
    student = [student_kv.layers.index(layer) for layer in student_layers]
    own_layers = list(range(len(student_layers)))
    standard = projector.standard("output", teacher)
    scale = scale.to(mask.device)
    losses, unweighted = [], []
    for kind, weight in enumerate((keys_weight, values_weight)):
        if weight == 0:
            continue
        sides = (
            _Side((student_kv.keys, student_kv.values)[kind], student),
            _Side((teacher_kv.keys, teacher_kv.values)[kind], own_layers),
        )
        source, target = sides if objective == "student_to_teacher" else sides[::-1]
        adapter = projector.adapters(teacher)[kind]
        _require_shapes(teacher, adapter, source, target, mask)
        work = _Work(
            adapter=adapter,
            source=source,
            target=target,
            mask=mask_on_processor,
            centre=scale.mean[kind],
            deviation=scale.deviation[kind],
            output_units=_output_units(scale, standard, kind),
            form=form,
            weights=shares * weight / ((keys_weight + values_weight) * count.clamp_min(1)),
            token_weights=token_weights,
            seed=draw_seed(),
            piece_rows=piece_rows or _piece_rows(mask.device),
            compiled=compiled,
        )
        moved = [source.tensor, *adapter.parameters()]
        if objective == "teacher_to_student":
            moved = [tensor.detach() for tensor in moved]
        weighted, plain = _FusedLoss.apply(  # type: ignore[no-untyped-call]
            work, torch.is_grad_enabled(), target.tensor, *moved
        )
        losses.append(weighted)
        unweighted.append(plain)
    loss, own = torch.stack(losses).sum(), torch.stack(unweighted).sum()
    # Alternating counts one distance twice, each time with the other side held still: its gradient is that of once.
    return (loss + loss.detach(), 2 * own) if objective == "alternating" else (loss, own)


def _piece_rows(device: torch.device) -> int:
    return min(_CORE_ROWS * torch.get_num_threads(), _DEVICE_ROWS) if device.type == "cpu" else _DEVICE_ROWS


@dataclass(frozen=True)
class _Block:
    """Tokens of some texts: all of each, or a run of one text's; ``real`` are the rows among them that count."""

    texts: slice
    tokens: slice
    real: Tensor
    shape: tuple[int, int]

    @property
    def is_full(self) -> bool:
        return len(self.real) == self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class _Side:
    """Keys or values ``tensor [batch, layers, heads, tokens, head_dim]`` of one model, and which layers of it count."""

    tensor: Tensor
    layers: list[int]

    @property
    def width(self) -> int:
        """Numbers of a token in a layer: its heads joined."""
        return self.tensor.shape[2] * self.tensor.shape[4]

    def rows(self, layers: range, block: _Block, dtype: torch.dtype, centre: Tensor | None = None) -> Tensor:
        """``[layers, real rows, kv_dim]`` of one piece, a copy; less ``centre [layers, kv_dim]``."""
        heads, width = self.tensor.shape[2], self.tensor.shape[4]
        rows = self.tensor.new_empty(len(layers), *block.shape, heads, width, dtype=dtype)
        for index, layer in enumerate(layers):
            view = self._view(self.tensor, layer, block)
            if centre is None:
                rows[index].copy_(view)
            else:
                torch.sub(view, centre[index].view(heads, width), out=rows[index])
        rows = rows.flatten(1, 2).flatten(2)
        return rows if block.is_full else rows.index_select(1, block.real)

    def add_gradient(self, total: Tensor, rows: Tensor, layers: range, block: _Block) -> None:
        """Put the gradient of :meth:`rows` where they came from; a layer may stand for several."""
        if not block.is_full:
            whole = rows.new_zeros(len(layers), block.shape[0] * block.shape[1], rows.shape[2])
            rows = whole.index_copy_(1, block.real, rows)
        heads = rows.view(len(layers), *block.shape, self.tensor.shape[2], self.tensor.shape[4])
        for index, layer in enumerate(layers):
            self._view(total, layer, block).add_(heads[index])

    def _view(self, tensor: Tensor, layer: int, block: _Block) -> Tensor:
        return tensor[block.texts, self.layers[layer], :, block.tokens].transpose(1, 2)


@dataclass(frozen=True)
class _Work:
    """One kind's loss: ``source`` through ``adapter`` against ``target``.

    Both are compared less ``centre [layers, width]`` and over ``deviation [layers]``. ``output_units`` are shift and
    factor that bring the adapter's output there. ``weights [layers]`` is what a token's error in a layer counts, and
    ``token_weights [batch, tokens]`` what it is multiplied by.
    """

    adapter: ElasticBottleneck
    source: _Side
    target: _Side
    mask: Tensor
    centre: Tensor
    deviation: Tensor
    output_units: tuple[Tensor, Tensor] | None
    form: LossForm
    weights: Tensor
    token_weights: Tensor | None
    seed: int
    piece_rows: int
    compiled: bool

    def loss_and_gradients(self, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """The loss, it without token weights, and its gradients where ``wanted``.

        ``wanted`` and the gradients go by target, source and the adapter's parameters.
        """
        parameters = dict(self.adapter.named_parameters())
        inputs = [self.target.tensor, self.source.tensor, *parameters.values()]
        gradients = [torch.zeros_like(tensor) if want else None for tensor, want in zip(inputs, wanted, strict=True)]
        totals = dict(zip(parameters, gradients[2:], strict=True))
        loss, unweighted = self.weights.new_zeros(()), self.weights.new_zeros(())
        num_layers = len(self.target.layers)
        # Several layers make a piece only where the texts are few.
        runs = layer_runs(self.adapter, num_layers, max(1, self.piece_rows // max(self.mask.numel(), 1)))
        cuts = []
        for layers in runs:
            parts = {name: sets_of_layers(parameter, layers, num_layers) for name, parameter in parameters.items()}
            own = {name: parameter.detach()[parts[name]] for name, parameter in parameters.items()}
            found = {name: None if total is None else total[parts[name]] for name, total in totals.items()}
            cuts.append((layers, own, found))
        for block in self._blocks():
            drawn = self._dropout(range(1), block) if self._drops_alike else None
            for layers, own, found in cuts:
                dropout = self._dropout(layers, block) if drawn is None else drawn.expand(len(layers), -1, -1)
                piece = self._piece(own, layers, block, dropout)
                work_on = compiled_errors_and_gradients if self.compiled else Piece.errors_and_gradients
                errors, sides = work_on(piece, found, wanted[0], wanted[1])
                loss += (errors * piece.weights).sum()
                unweighted += (errors * self.weights[layers.start : layers.stop, None]).sum()
                for side, total, rows in zip((self.target, self.source), gradients, sides, strict=False):
                    if total is not None and rows is not None:
                        side.add_gradient(total, rows, layers, block)
        return loss, unweighted, gradients

    def _piece(self, parameters: Mapping[str, Tensor], layers: range, block: _Block, dropout: Tensor | None) -> Piece:
        chosen, dtype = slice(layers.start, layers.stop), next(iter(parameters.values())).dtype
        weights = self.weights[chosen, None]
        units = self.output_units
        return Piece(
            adapter=self.adapter,
            parameters=parameters,
            source=self.source.rows(layers, block, dtype),
            target=self.target.rows(layers, block, torch.float32, self.centre[chosen]),
            deviation=self.deviation[chosen, None, None],
            dropout=dropout,
            output_units=None if units is None else (units[0][chosen], units[1][chosen]),
            form=self.form,
            weights=weights if self.token_weights is None else weights * self._of_tokens(block),
        )

    def _of_tokens(self, block: _Block) -> Tensor:
        """Weights ``[real rows]`` of a piece's tokens."""
        assert self.token_weights is not None
        return self.token_weights[block.texts, block.tokens].flatten().index_select(0, block.real)

    @property
    def _drops_alike(self) -> bool:
        """Whether all layers drop the same units, which is drawn once: where no two have weights in common."""
        return self.adapter.up is not None and len(self.adapter.up.weight) == len(self.target.layers)

    def _dropout(self, layers: range, block: _Block) -> Tensor | None:
        """What the hidden units of ``layers`` are multiplied by, ``[layers, real rows, h]``; None where by 1."""
        adapter = self.adapter
        if adapter.up is None or not adapter.training or adapter.dropout == 0:
            return None
        batch, tokens = self.mask.shape
        tiles, units = num_tiles(tokens), adapter.up.weight.shape[1]
        first_tile = (block.tokens.start or 0) // TILE_TOKENS
        places = [(layer * batch + text) * tiles + first_tile for layer in layers for text in range(batch)[block.texts]]
        drawn = draw_dropout(
            adapter.dropout,
            self.seed,
            places,
            block.shape[1],
            units,
            self.target.tensor.device,
            adapter.up.weight.dtype,
        )
        weights = drawn.view(len(layers), -1, units)
        return weights if block.is_full else weights.index_select(1, block.real)

    def _blocks(self) -> Iterator[_Block]:
        """The grid of texts and tokens in blocks of at most ``piece_rows``, without those that hold nothing real."""
        batch, tokens = self.mask.shape
        step = max(1, self.piece_rows // TILE_TOKENS) * TILE_TOKENS
        texts = max(1, step // max(tokens, 1))
        for first_text in range(0, batch, texts):
            for first_token in range(0, tokens, step):
                where = (slice(first_text, first_text + texts), slice(first_token, first_token + step))
                part = self.mask[where]
                real = part.flatten().nonzero()[:, 0]
                if len(real):
                    yield _Block(*where, real.to(self.target.tensor.device), (part.shape[0], part.shape[1]))


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, with_gradients: bool, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        wanted = [with_gradients and needed for needed in ctx.needs_input_grad[2:]]
        loss, unweighted, gradients = work.loss_and_gradients(wanted)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(unweighted)
        return loss, unweighted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *times_arriving(ctx.saved_tensors, arriving))


def _output_units(scale: KVScale, standard: tuple[Tensor, Tensor] | None, kind: int) -> tuple[Tensor, Tensor] | None:
    """Shift ``[layers, 1, width]`` and factor ``[layers, 1, 1]`` from an adapter's output to the loss's units.

    None where the output has them already, as it does when the projector was standardised by this scale.
    """
    centre, deviation = scale.mean[kind][:, None], scale.deviation[kind][:, None, None]
    if standard is None:
        return -centre / deviation, 1 / deviation
    mean, spread = standard[0][kind][: len(centre), None], standard[1][kind][: len(centre), None, None]
    if torch.equal(mean, centre) and torch.equal(spread, deviation):
        return None
    return (mean - centre) / deviation, spread / deviation


def _require_shapes(teacher: str, adapter: ElasticBottleneck, source: _Side, target: _Side, mask: Tensor) -> None:
    given, expected = (source.width, target.width), (adapter.in_dim, adapter.out_dim)
    if given != expected:
        raise ProjectorError(
            f"the adapters of teacher {teacher!r} map KV of width {expected[0]} to {expected[1]}; got {given[0]} and "
            f"{given[1]}. Build the projector for the kv_dim of both models (teacher_config_from)."
        )
    layers = target.tensor.shape[1], source.tensor.shape[1]
    if adapter.num_layers > len(target.layers) or max(target.layers) >= layers[0] or max(source.layers) >= layers[1]:
        raise ProjectorError(
            f"{len(target.layers)} layers are compared for teacher {teacher!r}; its KV and its adapters "
            f"({adapter.num_layers}) must have as many"
        )
    for side in (source, target):
        if (side.tensor.shape[0], side.tensor.shape[3]) != tuple(mask.shape):
            raise KVGraftError(
                f"mask {list(mask.shape)} must be [batch, tokens] of both the student's and the teacher's KV; one is "
                f"{list(side.tensor.shape)}"
            )
