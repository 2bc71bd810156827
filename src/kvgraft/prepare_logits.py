"""From a prepared run to what its logit arms need: the teachers' log-probabilities on disk, or the teachers at hand."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kvgraft.align.predictions import shared_vocabulary, vocabulary_size
from kvgraft.data.batching import EncodedExample
from kvgraft.data.datasets import Example
from kvgraft.data.spans import EncodedText
from kvgraft.distill.logit_part import LogitPart, LogitTeacher
from kvgraft.distill.logit_sources import LogitSource, require_logit_coverage
from kvgraft.errors import RecipeError
from kvgraft.identify import IdentifiedModel, identify
from kvgraft.prepare import Prepared, teacher_max_length
from kvgraft.processes import process_state
from kvgraft.recipe import LogitLossRecipe, Recipe, TeacherRecipe
from kvgraft.store.fill import encode_for_teacher, store_folder
from kvgraft.store.fill_logits import fill_logit_store
from kvgraft.store.format import text_fingerprint
from kvgraft.store.logits import LogitIdentity, LogitStore

LOGIT_ARMS = ("logits", "kv_logits")


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
    if not set(LOGIT_ARMS) & set(recipe.arms):
        return None
    teachers: dict[str, LogitTeacher] = {}
    train: list[LogitSource] = []
    held_out: list[LogitSource] = []
    for prepared_teacher in prepared.teachers:
        teacher = prepared_teacher.recipe
        model = prepared_teacher.running or identify(teacher)
        shared = shared_vocabulary(texts.tokenizer, model.tokenizer) is not None
        if not shared:
            _require_other_vocabulary_form(recipe.logit_loss, teacher, texts.tokenizer, model.tokenizer)
        online = recipe.logit_loss.source == "online"
        teachers[teacher.name] = LogitTeacher(
            vocabulary_size(model.tokenizer), shared, model.load() if online else None
        )
        for part, examples, sources in (
            ("training", texts.train_examples, train),
            ("held-out", texts.held_out_examples, held_out),
        ):
            with prepared.phases.timed(f"log-probabilities of {teacher.name} ({part} text)"):
                sources.append(_source(recipe, model, examples, shared, online))
    coverage = {source.name: _coverage(source, texts.train) for source in train}
    student_vocabulary = vocabulary_size(texts.tokenizer)
    return PreparedLogits(LogitPart(recipe.logit_loss, teachers, student_vocabulary), train, held_out, coverage)


def store_log_probs(
    model: IdentifiedModel, encoded: list[EncodedText], max_length: int, recipe: Recipe, top_k: int
) -> LogitStore:
    """The logit store of ``model`` over texts as it reads them, filled where it is not yet.

    ``top_k`` is 0 for likelihoods alone.
    """
    settings = recipe.store
    identity = LogitIdentity(
        model=model.fingerprint,
        tokenizer=model.tokenizer_fingerprint,
        text=text_fingerprint(text.sample_key for text in encoded),
        max_length=max_length,
        vocabulary=vocabulary_size(model.tokenizer),
        top_k=top_k,
        temperature=recipe.logit_loss.temperature if top_k else 1.0,
    )
    with process_state().main_process_first():
        store, _ = fill_logit_store(
            store_folder(settings.path, f"{model.recipe.name}-logits", identity),
            identity,
            model.recipe.name,
            model.load,
            encoded,
            shard_bytes=settings.shard_megabytes * 1_000_000,
            token_budget=settings.token_budget,
            verify=settings.verify,
        )
    return store


def _source(recipe: Recipe, model: IdentifiedModel, examples: list[Example], shared: bool, online: bool) -> LogitSource:
    max_length = teacher_max_length(recipe, model.config)
    encoded = encode_for_teacher(examples, model.tokenizer, max_length)
    chunks = recipe.logit_loss.form == "chunk_likelihood"
    top_k = 0 if chunks else recipe.logit_loss.top_k
    store = None if online else store_log_probs(model, encoded, max_length, recipe, top_k)
    return LogitSource(model.recipe.name, {text.sample_key: text for text in encoded}, shared, chunks, store)


def _coverage(source: LogitSource, examples: list[EncodedExample]) -> float:
    coverage = source.coverage(examples)
    require_logit_coverage(source.name, coverage)
    return coverage


def _require_other_vocabulary_form(
    loss: LogitLossRecipe,
    teacher: TeacherRecipe,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> None:
    if loss.form in ("sorted_probability", "chunk_likelihood"):
        return
    own, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    same = sum(theirs.get(token) == index for token, index in own.items())
    raise RecipeError(
        f"logit_loss.form {loss.form} compares distributions over one vocabulary, and teacher {teacher.name} has "
        f"another tokenizer than the student: {same:,} of the student's {len(own):,} tokens have the same id in the "
        f"teacher's {len(theirs):,}. Give the student the teacher's tokenizer (student.tokenizer), or use "
        "logit_loss.form sorted_probability or chunk_likelihood"
    )
