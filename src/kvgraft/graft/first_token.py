"""How soon a student's first token comes: from a stored cache of a teacher, or after reading the text itself."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from kvgraft.align.tokens import AlignmentPolicy
from kvgraft.data.datasets import Example
from kvgraft.data.spans import encode_with_spans
from kvgraft.errors import GraftError
from kvgraft.graft.sources import graft_stored, own_beginning
from kvgraft.identify import IdentifiedModel
from kvgraft.models.cache import context_length
from kvgraft.prepare_kv import store_kv
from kvgraft.processes import on_cpu
from kvgraft.projector.projector import KVDimensionProjector
from kvgraft.recipe import StoreRecipe
from kvgraft.report.graft import FirstToken
from kvgraft.store.reader import KVStore

_CHARACTERS_A_TOKEN = 12


@torch.no_grad()
def first_token(
    student: IdentifiedModel,
    teacher: IdentifiedModel,
    projectors: Mapping[str, KVDimensionProjector],
    text: str,
    tokens: int,
    settings: StoreRecipe,
    *,
    policy: AlignmentPolicy = "cover",
    own_first_tokens: int = 0,
    repeats: int = 3,
) -> FirstToken:
    """Time every way in turns, so that a busy moment hits all.

    Args:
        student, teacher: the two models.
        projectors: from ``teacher`` to the student, reading any of its layers; by the name of each.
        text: of at least so many tokens, otherwise all of it counts.
        tokens: of the student, as many as both models' contexts allow.
        settings: how the store is written; its path is not used.
        policy: token alignment, see :func:`kvgraft.align_tokens`.
        own_first_tokens: of the text that the student reads itself on the way from the store.
        repeats: turns.

    Raises:
        GraftError: ``text`` has no token.
    """
    model, own_teacher = student.load(), teacher.load()
    # Room for a BOS and the token that follows.
    length = min(tokens, context_length(model) - 2, context_length(own_teacher) // 2)
    ids = student.tokenizer(text[: _CHARACTERS_A_TOKEN * length], add_special_tokens=False)["input_ids"][:length]
    if not ids:
        raise GraftError("there is no text to time the first token on")
    text = student.tokenizer.decode(ids)
    encoded = encode_with_spans(student.tokenizer, text)
    of_teacher = torch.tensor([encode_with_spans(teacher.tokenizer, text).input_ids], device=own_teacher.device)
    # Any token does: what is timed is the pass over one.
    follows = torch.tensor([encoded.input_ids[-1:]])
    read = torch.cat([torch.tensor([encoded.input_ids]), follows], 1).to(model.device)
    own_tokens = min(own_first_tokens, len(encoded.input_ids))

    def go_on(store: KVStore, projector: KVDimensionProjector) -> None:
        cache = graft_stored(
            model,
            projector,
            store,
            [encoded],
            teacher=teacher.recipe.name,
            policy=policy,
            own_kv=own_beginning(model, [encoded], own_tokens) if own_tokens else None,
            own_first_tokens=own_tokens,
        )
        model(**cache.forward_inputs(follows))

    with tempfile.TemporaryDirectory() as folder:
        layers = tuple(range(teacher.geometry.num_layers))
        own_settings = settings.model_copy(update={"path": Path(folder)})
        store, _ = store_kv(teacher, [Example(text)], layers, of_teacher.shape[1], own_settings)
        ways: list[Callable[[], object]] = [partial(go_on, store, projector) for projector in projectors.values()]
        ways += [partial(model, read, logits_to_keep=1), partial(own_teacher, of_teacher, logits_to_keep=1)]
        *from_store, reads, teacher_reads = _medians(ways, repeats)
        bytes_per_token = store.bytes_per_token
    return FirstToken(
        tokens=len(encoded.input_ids),
        from_store=dict(zip(projectors, from_store, strict=True)),
        student=reads,
        teacher=teacher_reads,
        bytes_per_token=bytes_per_token,
    )


def _medians(ways: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    found: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for times, way in zip(found, ways, strict=True):
            started = time.perf_counter()
            way()
            if not on_cpu():
                # A card is handed its work and goes on with it after the call.
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in found]
