"""From a KV to a cache that a student goes on from: its own, or a teacher's through a projector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgraft.errors import GraftError
from kvgraft.graft.pieces import in_order, with_own_tokens
from kvgraft.kv import KV, KVGeometry
from kvgraft.models.cache import GraftedCache, context_length, fill_cache, require_cache_support
from kvgraft.models.geometry import kv_geometry

TokenIds = Sequence[Sequence[int]]


class TeacherProjector(Protocol):
    """Anything that turns a teacher's KV into the student's, such as ``KVDimensionProjector``."""

    def project_teacher_kv(self, teacher: str, keys: KV, /) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, student layers, tokens, student kv_dim]``, keys before rotation."""
        ...


def graft(
    student: PreTrainedModel,
    projector: TeacherProjector,
    teacher_kv: KV,
    *,
    teacher: str,
    own_kv: KV | None = None,
    own_first_tokens: int = 0,
    token_ids: TokenIds | None = None,
) -> GraftedCache:
    """A cache from which ``student`` goes on as if it had read what the teacher has read.

    Dropout of the projector is off. Gradients flow through; call it under ``torch.no_grad()`` to decode.

    Args:
        student: a causal language model of transformers.
        projector: fitted from ``teacher`` to ``student``.
        teacher_kv: the teacher's KV on the student's tokens (:func:`kvgraft.gather_aligned`), keys before rotation:
            ``[batch, layers, heads, tokens, head_dim]``, with the layers that the projector takes.
        teacher: the teacher's name in the projector.
        own_kv: the student's KV of the same texts or of their beginnings, or a constant of one row; it stands in
            where the teacher has no token. Without it such tokens are hidden from attention.
        own_first_tokens: tokens at the start of each text to take from ``own_kv`` (attention sinks); default 0.
        token_ids: the student's ids of each text; see :func:`cache_from_kv`.

    Raises:
        GraftError: a projector for another student, or as :func:`cache_from_kv`.
        ProjectorError: the projector knows no such teacher, or takes KV of another width or number of layers.
    """
    require_cache_support(student)
    with _without_dropout(projector):
        kv = project(projector, teacher_kv, kv_geometry(student.config), teacher=teacher)
    if own_kv is not None:
        kv = with_own_tokens(kv, own_kv, own_first_tokens)
    elif own_first_tokens:
        raise GraftError(f"own_first_tokens is {own_first_tokens}, but there is no own_kv to take them from; give it")
    return cache_from_kv(student, kv, token_ids=token_ids)


def project(projector: TeacherProjector, teacher_kv: KV, geometry: KVGeometry, *, teacher: str) -> KV:
    """``teacher_kv`` in the student's ``geometry``, on the same tokens; dropout and gradients as the projector stands.

    Raises:
        GraftError: rotated keys, or a projector for a student of another geometry.
        ProjectorError: as :func:`graft`.
    """
    if teacher_kv.rotated:
        raise GraftError(
            f"the keys of teacher {teacher!r} are rotated to its own positions and cannot be grafted; "
            "capture with rotated=False"
        )
    keys, values = projector.project_teacher_kv(teacher, teacher_kv)
    batch, _, _, tokens, _ = teacher_kv.keys.shape
    expected = (batch, geometry.num_layers, tokens, geometry.kv_dim)
    for kind, tensor in (("keys", keys), ("values", values)):
        if tuple(tensor.shape) != expected:
            raise GraftError(
                f"the projector turns {kind} of teacher {teacher!r} into {list(tensor.shape)}, but this student takes "
                f"{list(expected)} ([batch, layers, tokens, kv_dim]); use the projector that was fitted for it"
            )
    # The projector may make more or fewer layers than it reads.
    return teacher_kv.unflatten(keys, values, geometry, range(geometry.num_layers))


def cache_from_kv(student: PreTrainedModel, kv: KV, *, token_ids: TokenIds | None = None) -> GraftedCache:
    """A cache of ``kv`` in ``student``'s own geometry, in transformers' own type.

    Rows may be padded on either side and have gaps; sliding-window layers keep what they would have kept. With the
    student's own captured KV, going on gives the logits of plain decoding up to rounding.

    Args:
        student: a causal language model of transformers.
        kv: all of the student's layers, keys before rotation, positions from 0 in each row.
        token_ids: per row the ids of the whole text. They are checked against ``kv`` and shown by ``generate`` in
            front of its answer; default the padding token.

    Raises:
        GraftError: a student without a cache of keys and values in every layer; rotated keys, another geometry, NaN
            or Inf; no token; a text of another length; more tokens than the student's context.
        ModelError: the student rotates keys in a way that is not covered.
    """
    require_cache_support(student)
    name = type(student).__name__
    geometry = kv_geometry(student.config)
    if kv.rotated:
        raise GraftError(f"the keys of a KV for {name} are rotated already; capture with rotated=False")
    if kv.geometry != geometry or kv.layers != tuple(range(geometry.num_layers)):
        raise GraftError(
            f"KV of layers {list(kv.layers)}, {kv.geometry.num_kv_heads} heads x {kv.geometry.head_dim} is not of "
            f"{name}, which has all of its {geometry.num_layers} layers with {geometry.num_kv_heads} heads x "
            f"{geometry.head_dim}; project it for this student"
        )
    kv = in_order(kv.require_finite(f"the KV for {name}"))
    lengths = (kv.positions[:, -1] + 1).tolist()
    if max(lengths) > context_length(student):
        raise GraftError(
            f"the KV holds {max(lengths)} tokens, but the context of {name} is {context_length(student)}; "
            "graft less text or take a student with a longer context"
        )
    return fill_cache(student, kv, _placed_ids(student, token_ids, lengths, kv.mask.shape[1]))


def _placed_ids(student: PreTrainedModel, token_ids: TokenIds | None, lengths: list[int], slots: int) -> Tensor:
    """``[batch, slots]``: ids of each row on its slots, the padding token where there are none."""
    padding = student.config.get_text_config().pad_token_id
    placed = torch.full((len(lengths), slots), padding if isinstance(padding, int) and padding >= 0 else 0)
    if token_ids is None:
        return placed
    given = [len(ids) for ids in token_ids]
    if given != lengths:
        raise GraftError(
            f"the KV is of texts of {lengths} tokens, but token_ids holds {given}; give the ids that the KV was "
            "aligned to, whole and unpadded"
        )
    for row, ids in enumerate(token_ids):
        shown = list(ids)[-slots:]
        placed[row, slots - len(shown) :] = torch.tensor(shown)
    return placed


@contextmanager
def _without_dropout(projector: object) -> Iterator[None]:
    training = isinstance(projector, nn.Module) and projector.training
    if isinstance(projector, nn.Module):
        projector.eval()
    try:
        yield
    finally:
        if training and isinstance(projector, nn.Module):
            projector.train()
