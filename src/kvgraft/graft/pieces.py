"""KV put together: by position (pieces one after another, the student's own tokens among them, slots in order), or two
models' side by side.

All of it is on keys before rotation, so that a token may stand anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from kvgraft.errors import GraftError
from kvgraft.kv import KV, KVGeometry


def text_lengths(kv: KV) -> Tensor:
    """``[batch]`` int64: tokens of each row's text, one more than its highest position.

    Tokens that the mask leaves out count where their positions run on, as those of ``gather_aligned`` do; padding
    repeats a position or has 0, as in ``capture`` and ``stack_kv``.

    Raises:
        GraftError: the KV holds no token at all.
    """
    if not kv.positions.numel():
        raise GraftError(f"the KV is empty (batch, tokens {list(kv.mask.shape)}): there is nothing to graft")
    return kv.positions.amax(1) + 1


def concatenate(pieces: Sequence[KV]) -> KV:
    """Several texts' KV as that of one text, ``[batch, layers, heads, all tokens, head_dim]``.

    Each piece counts its positions from 0; they are moved behind the piece before it, row by row. A piece knows
    nothing of those before it: its tokens have not attended to them.

    Raises:
        GraftError: no piece, rotated keys, or pieces of other batch, layers or heads.
    """
    if not pieces:
        raise GraftError("there is nothing to concatenate: give at least one KV")
    first = pieces[0]
    positions, end = [], torch.zeros_like(first.positions[:, 0])
    for index, piece in enumerate(pieces):
        _require_before_rotation(piece, f"piece {index}")
        _require_same_kind(first, piece, f"piece {index}")
        positions.append(piece.positions + end[:, None])
        end = end + text_lengths(piece)
    return replace(
        first,
        keys=torch.cat([piece.keys for piece in pieces], 3),
        values=torch.cat([piece.values for piece in pieces], 3),
        positions=torch.cat(positions, 1),
        mask=torch.cat([piece.mask for piece in pieces], 1),
    )


def with_own_tokens(kv: KV, own_kv: KV, first_tokens: int = 0) -> KV:
    """``kv`` with tokens of the student's own: the first ones, and those that ``kv`` has nothing for.

    Args:
        kv: the student's geometry, keys before rotation.
        own_kv: the student's KV of the same text, all of it or a beginning; or a stored constant of one row, which
            then serves every row. Tokens meet by position.
        first_tokens: how many tokens from position 0 on to take from ``own_kv`` also where ``kv`` has them.

    Raises:
        GraftError: rotated keys, another geometry or batch, or ``own_kv`` without all of the first tokens.
    """
    _require_before_rotation(own_kv, "own_kv")
    if own_kv.mask.shape[0] == 1:
        own_kv = _repeated(own_kv, kv.mask.shape[0])
    own_kv = own_kv.to(kv.mask.device)
    _require_same_kind(kv, own_kv, "own_kv")
    own_first = (own_kv.mask & (own_kv.positions < first_tokens)).sum(1)
    too_short = (own_first < first_tokens).nonzero().flatten().tolist()
    if too_short:
        raise GraftError(
            f"own_kv holds {int(own_first[too_short[0]])} of the first {first_tokens} tokens in row {too_short[0]}; "
            "capture at least that many with the student, or ask for fewer"
        )
    if _in_slots(kv) and _in_slots(own_kv) and own_kv.mask.shape[1] <= kv.mask.shape[1]:
        return _own_in_place(kv, own_kv, first_tokens)
    kept = kv.mask & (kv.positions >= first_tokens)
    length = int(torch.maximum(text_lengths(kv), text_lengths(own_kv)).max())
    given = torch.zeros(kv.mask.shape[0], length, dtype=torch.bool, device=kv.mask.device)
    rows, tokens = kept.nonzero(as_tuple=True)
    given[rows, kv.positions[rows, tokens]] = True
    return replace(
        kv,
        keys=torch.cat([own_kv.keys.to(kv.keys.dtype), kv.keys], 3),
        values=torch.cat([own_kv.values.to(kv.values.dtype), kv.values], 3),
        positions=torch.cat([own_kv.positions, kv.positions], 1),
        mask=torch.cat([own_kv.mask & ~given.gather(1, own_kv.positions), kept], 1),
    )


def _in_slots(kv: KV) -> bool:
    """Whether every slot is that of its position, in every row."""
    slots = torch.arange(kv.mask.shape[1], device=kv.mask.device)
    return bool((kv.positions == slots).all())


def _own_in_place(kv: KV, own_kv: KV, first_tokens: int) -> KV:
    """:func:`with_own_tokens` where slots are positions: in order already, so that nothing is gathered afterwards."""
    length = own_kv.mask.shape[1]
    taken = own_kv.mask & ((own_kv.positions < first_tokens) | ~kv.mask[:, :length])

    def placed(own: Tensor, given: Tensor) -> Tensor:
        beginning = torch.where(taken[:, None, None, :, None], own.to(given.dtype), given[..., :length, :])
        return torch.cat([beginning, given[..., length:, :]], 3)

    mask = torch.cat([taken | kv.mask[:, :length], kv.mask[:, length:]], 1)
    return replace(kv, keys=placed(own_kv.keys, kv.keys), values=placed(own_kv.values, kv.values), mask=mask)


def side_by_side(own: KV, teacher: KV) -> tuple[Tensor, Tensor]:
    """Keys and values of the same tokens in two models as layers of one width, ``[batch, layers, tokens, width]``.

    Projectors take layers of one width. Here a layer is as much of one of the models' as both can be cut into: first
    all of ``own``, then all of ``teacher``.
    """
    width = common_width(own.geometry, teacher.geometry)
    keys, values = (
        torch.cat([in_widths(part, width) for part in parts], 1)
        for parts in zip(own.flatten(), teacher.flatten(), strict=True)
    )
    return keys, values


def common_width(one: KVGeometry, other: KVGeometry) -> int:
    """The greatest width that the layers of both can be cut into."""
    return math.gcd(one.kv_dim, other.kv_dim)


def in_widths(part: Tensor, width: int) -> Tensor:
    """``[batch, layers, tokens, kv_dim]`` to ``[batch, layers * kv_dim / width, tokens, width]``."""
    return part.reshape(*part.shape[:-1], -1, width).transpose(2, 3).flatten(1, 2)


def in_order(kv: KV) -> KV:
    """The same tokens in slots by position, every row ending at the last slot: ``[..., slots, head_dim]``.

    Two tokens are as many slots apart as positions, so that a sliding window counted in slots is the one meant. Slots
    without a token, padding on the left and gaps, are masked and zero.

    Raises:
        GraftError: a row without a token, a position below 0, or two tokens at one.
    """
    lengths = text_lengths(kv)
    _require_places(kv)
    first = torch.where(kv.mask, kv.positions, kv.positions.max() + 1).amin(1)
    slots = int((lengths - first).max())
    offset = slots - lengths
    if slots == kv.mask.shape[1] and bool(kv.mask.all()):
        expected = torch.arange(slots, device=lengths.device) - offset[:, None]
        if torch.equal(kv.positions, expected):
            return kv
    rows, tokens = kv.mask.nonzero(as_tuple=True)
    source = torch.full((len(lengths), slots), -1, device=lengths.device)
    source[rows, kv.positions[rows, tokens] + offset[rows]] = tokens
    mask = source >= 0
    index = source.clamp_min(0)[:, None, None, :, None]

    def placed(tensor: Tensor) -> Tensor:
        batch, layers, heads, _, width = tensor.shape
        taken = tensor.gather(3, index.expand(batch, layers, heads, slots, width))
        # Not multiplied: NaN in a token that is left out must not come through, not even behind the mask.
        return taken.masked_fill(~mask[:, None, None, :, None], 0)

    return replace(
        kv,
        keys=placed(kv.keys),
        values=placed(kv.values),
        positions=torch.arange(slots, device=lengths.device) - offset[:, None],
        mask=mask,
    )


def _require_places(kv: KV) -> None:
    """A token in every row, each at its own position."""
    empty = (~kv.mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise GraftError(
            f"row {empty[0]} has no token to graft: its text is empty or the teacher has no token for any of it; "
            "leave it out, or let the student read it"
        )
    if bool((kv.mask & (kv.positions < 0)).any()):
        raise GraftError("the KV has a token at a position below 0; positions count a text's tokens from 0")
    for row, (positions, mask) in enumerate(zip(kv.positions, kv.mask, strict=True)):
        taken, count = positions[mask].unique(return_counts=True)
        if bool((count > 1).any()):
            raise GraftError(
                f"row {row} has {int(count.max())} tokens at position {int(taken[count.argmax()])}; "
                "concatenate() moves pieces one behind the other"
            )


def _require_before_rotation(kv: KV, name: str) -> None:
    if kv.rotated:
        raise GraftError(
            f"the keys of {name} are rotated to the positions they were captured at; capture with rotated=False"
        )


def _require_same_kind(kv: KV, other: KV, name: str) -> None:
    expected = (kv.mask.shape[0], kv.geometry.num_layers, kv.geometry.num_kv_heads, kv.geometry.head_dim)
    given = (other.mask.shape[0], other.geometry.num_layers, other.geometry.num_kv_heads, other.geometry.head_dim)
    if given != expected:
        raise GraftError(
            f"{name} has (batch, layers, heads, head width) {given}, but it goes with KV of {expected}; "
            "take both from the same student over the same texts"
        )


def _repeated(kv: KV, batch: int) -> KV:
    return replace(
        kv,
        keys=kv.keys.expand(batch, *kv.keys.shape[1:]),
        values=kv.values.expand(batch, *kv.values.shape[1:]),
        positions=kv.positions.expand(batch, -1),
        mask=kv.mask.expand(batch, -1),
    )


def first_tokens(kv: KV, tokens: int) -> KV:
    """The first ``tokens`` of ``kv``; what is missing is masked."""
    missing = max(tokens - kv.mask.shape[1], 0)

    def fitted(part: Tensor) -> Tensor:
        return functional.pad(part[..., :tokens, :], (0, 0, 0, missing))

    return replace(
        kv,
        keys=fitted(kv.keys),
        values=fitted(kv.values),
        positions=functional.pad(kv.positions[:, :tokens], (0, missing)),
        mask=functional.pad(kv.mask[:, :tokens], (0, missing)),
    )
