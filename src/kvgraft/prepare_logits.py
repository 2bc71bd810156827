"""From a prepared run to what its logit arms need: the teachers' log-probabilities on disk, or the teachers at hand."""

from __future__ import annotations

from dataclasses import dataclass

from kvgraft.align.predictions import vocabulary_size
from kvgraft.data.batching import EncodedExample
from kvgraft.data.datasets import Example
from kvgraft.distill.logit_part import LogitPart, LogitTeacher
from kvgraft.distill.logit_sources import LogitSource, require_logit_coverage
from kvgraft.identify import IdentifiedModel, identify
from kvgraft.prepare import Prepared, teacher_max_length
from kvgraft.prepare_log_probs import log_probs_to_fill, reads_one_vocabulary
from kvgraft.recipe import Recipe
from kvgraft.store.fill import encode_for_teacher, fill_store


@dataclass(frozen=True)
class PreparedLogits:
    """The logit part of the loss, and each teacher's predictions over training and held-out text.

    ``coverage`` is the share of the student's predictions that each teacher answers for.
    """

    part: LogitPart
    train: list[LogitSource]
    held_out: list[LogitSource]
    coverage: dict[str, float]


def prepare_logits(prepared: Prepared) -> PreparedLogits | None:
    """What the recipe's logit arms need, None where it has none; stores are filled where they are not yet.

    Raises:
        RecipeError: the loss needs one tokenizer and a teacher has another.
        KVGraftError: of the room where it went wrong.
    """
    recipe, texts = prepared.recipe, prepared.texts
    if not recipe.needs_log_probs:
        return None
    teachers: dict[str, LogitTeacher] = {}
    train: list[LogitSource] = []
    held_out: list[LogitSource] = []
    for prepared_teacher in prepared.teachers:
        teacher = prepared_teacher.recipe
        model = prepared_teacher.running or identify(teacher)
        shared = reads_one_vocabulary(recipe, teacher.name, texts.tokenizer, model.tokenizer)
        online = recipe.logit_loss.source == "online"
        teachers[teacher.name] = LogitTeacher(
            vocabulary_size(model.tokenizer), shared, model.load() if online else None
        )
        for part, examples, sources in (
            ("training", texts.train_examples, train),
            ("held-out", texts.held_out_examples, held_out),
        ):
            with prepared.phases.timed(f"log-probabilities of {teacher.name} ({part} text)"):
                sources.append(_source(recipe, model, examples, shared))
    coverage = {source.name: _coverage(source, texts.train) for source in train}
    student_vocabulary = vocabulary_size(texts.tokenizer)
    return PreparedLogits(LogitPart(recipe.logit_loss, teachers, student_vocabulary), train, held_out, coverage)


def _source(recipe: Recipe, model: IdentifiedModel, examples: list[Example], shared: bool) -> LogitSource:
    max_length = teacher_max_length(recipe, model.config)
    encoded = encode_for_teacher(examples, model.tokenizer, max_length)
    opened = None
    if recipe.logit_loss.source == "store":
        store = log_probs_to_fill(model, examples, encoded, max_length, recipe)
        # Where the KV is stored too, one pass has filled both.
        budget = recipe.store.token_budget
        opened, _ = fill_store(store, model.recipe.name, model.load, encoded, token_budget=budget)
    chunks = recipe.logit_loss.form == "chunk_likelihood"
    return LogitSource(model.recipe.name, {text.sample_key: text for text in encoded}, shared, chunks, opened)


def _coverage(source: LogitSource, examples: list[EncodedExample]) -> float:
    coverage = source.coverage(examples)
    require_logit_coverage(source.name, coverage)
    return coverage
