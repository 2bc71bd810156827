"""From a recipe to what a new student's embeddings start from, found once and kept beside the stores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
from transformers import PretrainedConfig

from kvgraft.data.batching import EncodedExample
from kvgraft.data.chat import encode_text, template_fingerprint
from kvgraft.data.spans import EncodedText
from kvgraft.models import loading
from kvgraft.models.embeddings import EmbeddingStart, aligned_embeddings, principal_rows
from kvgraft.processes import process_state
from kvgraft.progress import progress_bar
from kvgraft.recipe import Recipe
from kvgraft.store.atomic_file import write_atomically

if TYPE_CHECKING:
    from kvgraft.identify import IdentifiedModel
    from kvgraft.prepare import Texts


def prepare_embeddings(
    recipe: Recipe, teachers: Sequence[IdentifiedModel], texts: Texts, student: PretrainedConfig
) -> EmbeddingStart:
    """What ``student.embeddings_from`` asks for; the teacher is loaded only where no earlier run left it on disk.

    Raises:
        AlignmentError: the training text has too few tokens that both read.
    """
    teacher = next(model for model in teachers if model.recipe.name == recipe.student.embeddings_from)
    vocabulary, width = student.get_text_config().vocab_size, student.get_text_config().hidden_size
    path = _path(
        recipe.store.path,
        teacher.fingerprint,
        teacher.tokenizer_fingerprint,
        template_fingerprint(texts.train_examples, teacher.tokenizer),
        loading.tokenizer_fingerprint(texts.tokenizer),
        [text.sample_key for text in texts.train],
        [recipe.data.max_length, recipe.data.chat_template, vocabulary, width],
    )
    with process_state().main_process_first():
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, [memoryview(_found(teacher, texts, vocabulary, width))])
        return EmbeddingStart(**safetensors.torch.load_file(path))


def _found(teacher: IdentifiedModel, texts: Texts, vocabulary: int, width: int) -> bytes:
    embeddings = teacher.load().get_input_embeddings().weight
    with progress_bar(f"embeddings from {teacher.recipe.name}", len(texts.train), "texts") as advance:

        def pairs() -> Iterator[tuple[EncodedExample, EncodedText]]:
            for own, example in zip(texts.train, texts.train_examples, strict=True):
                yield own, encode_text(example, teacher.tokenizer)
                advance(1)

        token_ids, means = aligned_embeddings(pairs(), vocabulary, embeddings)
    return safetensors.torch.save({"token_ids": token_ids, "rows": principal_rows(means, width)})


def _path(folder: Path, *identity: object) -> Path:
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return folder / f"embeddings-{digest}.safetensors"
