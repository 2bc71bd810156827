"""Where a teacher's KV on a student's tokens comes from: a store filled once, or the teacher itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgraft.align.tokens import AlignmentPolicy, align_encoded, align_tokens, gather_aligned
from kvgraft.data.spans import EncodedText, encode_with_spans
from kvgraft.errors import GraftError
from kvgraft.graft.cache import TeacherProjector, graft
from kvgraft.kv import KV, stack_kv
from kvgraft.models.cache import GraftedCache
from kvgraft.models.capture import capture
from kvgraft.store.reader import KVStore


def stored_kv(
    store: KVStore, text: EncodedText, *, layers: Sequence[int] | None = None, policy: AlignmentPolicy = "cover"
) -> KV:
    """A stored text's KV ``[1, layers, heads, student tokens, head_dim]`` on the student's tokens.

    Args:
        store: of the teacher.
        text: the text in the student's tokens.
        layers: teacher layers that the projector takes, repeats allowed; default all that the store holds.
        policy: token alignment, see :func:`kvgraft.align_tokens`.

    Raises:
        StoreError: the store has no such text or layer.
    """
    sample = store.read(text.sample_key, layers)
    return gather_aligned(sample.kv, align_tokens(text.spans, sample.spans, policy))


def live_kv(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    student_text: EncodedText,
    *,
    layers: Sequence[int] | None = None,
    policy: AlignmentPolicy = "cover",
) -> KV:
    """The teacher reads ``text`` now: its KV ``[1, layers, heads, student tokens, head_dim]`` on the student's tokens.

    Args:
        teacher, tokenizer: the model and its tokenizer.
        text: the text.
        student_text: the same text in the student's tokens.
        layers, policy: as :func:`stored_kv`; default all layers of the teacher.

    Raises:
        AlignmentError: ``student_text`` is of another text.
        ModelError: as :func:`kvgraft.capture`.
    """
    encoded = encode_with_spans(tokenizer, text)
    alignment = align_encoded(student_text, encoded, policy)
    # A layer that several student layers learn from is captured once.
    distinct = None if layers is None else sorted(set(layers))
    kv = capture(teacher, torch.tensor([encoded.input_ids]), layers=distinct)
    return gather_aligned(kv if layers is None else kv.select_layers(layers), alignment)


def graft_stored(
    student: PreTrainedModel,
    projector: TeacherProjector,
    store: KVStore,
    texts: Sequence[EncodedText],
    *,
    teacher: str,
    layers: Sequence[int] | None = None,
    policy: AlignmentPolicy = "cover",
    own_kv: KV | None = None,
    own_first_tokens: int = 0,
) -> GraftedCache:
    """A cache of ``texts``, a row each, without running the teacher or the student.

    Args:
        student, projector, teacher, own_kv, own_first_tokens: as :func:`kvgraft.graft.graft`.
        store: of the teacher.
        texts: in the student's tokens.
        layers, policy: as :func:`stored_kv`.

    Raises:
        KVGraftError: as :func:`stored_kv` and :func:`kvgraft.graft.graft`.
    """
    _require_texts(texts)
    kv = stack_kv([stored_kv(store, text, layers=layers, policy=policy) for text in texts])
    return graft(
        student,
        projector,
        kv,
        teacher=teacher,
        own_kv=own_kv,
        own_first_tokens=own_first_tokens,
        token_ids=[text.input_ids for text in texts],
    )


def graft_live(
    student: PreTrainedModel,
    projector: TeacherProjector,
    teacher_model: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    student_texts: Sequence[EncodedText],
    *,
    teacher: str,
    layers: Sequence[int] | None = None,
    policy: AlignmentPolicy = "cover",
    own_kv: KV | None = None,
    own_first_tokens: int = 0,
) -> GraftedCache:
    """A cache of ``texts``, a row each, that the teacher reads now; otherwise as :func:`graft_stored`.

    Args:
        student_texts: each of ``texts`` in the student's tokens.

    Raises:
        KVGraftError: as :func:`live_kv` and :func:`kvgraft.graft.graft`.
    """
    _require_texts(texts)
    if len(student_texts) != len(texts):
        raise GraftError(f"got {len(texts)} texts and {len(student_texts)} in the student's tokens; give one for each")
    rows = [
        live_kv(teacher_model, teacher_tokenizer, text, student_text, layers=layers, policy=policy)
        for text, student_text in zip(texts, student_texts, strict=True)
    ]
    return graft(
        student,
        projector,
        stack_kv(rows),
        teacher=teacher,
        own_kv=own_kv,
        own_first_tokens=own_first_tokens,
        token_ids=[text.input_ids for text in student_texts],
    )


def own_beginning(student: PreTrainedModel, texts: Sequence[EncodedText], tokens: int) -> KV:
    """The student's own KV of the first ``tokens`` of each text: what ``own_kv`` takes, at the cost of reading those.

    Raises:
        GraftError: a text is shorter, or there is none.
    """
    _require_texts(texts)
    shortest = min(len(text.input_ids) for text in texts)
    if not 1 <= tokens <= shortest:
        raise GraftError(f"own_beginning takes 1 to {shortest} tokens, the length of the shortest text; got {tokens}")
    return capture(student, torch.tensor([text.input_ids[:tokens] for text in texts]))


def _require_texts(texts: Sequence[object]) -> None:
    if not texts:
        raise GraftError("there is no text to graft: give at least one")
