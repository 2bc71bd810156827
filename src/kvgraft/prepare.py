"""From a recipe to everything that training needs: text, tokenizers, teachers' KV on disk, layers and scales."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvgraft.align.layers import map_layers
from kvgraft.data.batching import EncodedExample, encode_example
from kvgraft.data.chat import template_fingerprint
from kvgraft.data.datasets import Example, load_train_and_held_out
from kvgraft.data.tokenizers import train_tokenizer
from kvgraft.distill.dataset import AlignmentCounts, TeacherSource
from kvgraft.errors import DataError, RecipeError
from kvgraft.kv import KVGeometry
from kvgraft.models import loading
from kvgraft.models.capture import kv_geometry
from kvgraft.models.cut import chosen_layers, cut_config, cut_model, origin_layers
from kvgraft.models.lora import add_lora
from kvgraft.models.students import new_student, student_config
from kvgraft.processes import process_state
from kvgraft.recipe import Recipe, StoreRecipe, StudentRecipe, TeacherRecipe
from kvgraft.store.fill import FillReport, encode_for_teacher, fill_store, store_folder
from kvgraft.store.format import StoreIdentity, text_fingerprint
from kvgraft.store.reader import KVStore

logger = logging.getLogger(__name__)

# A teacher's tokens over the student's maximum: room for vocabularies that cut text finer than the student's.
_TEACHER_LENGTH_FACTOR = 2


@dataclass
class Phases:
    """Wall time in seconds of each phase, in the order in which they ran."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the block's time to ``phase``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


@dataclass(frozen=True)
class Texts:
    """The text of a run, and as the student reads it."""

    train_examples: list[Example]
    held_out_examples: list[Example]
    tokenizer: PreTrainedTokenizerBase
    train: list[EncodedExample]
    held_out: list[EncodedExample]


@dataclass(frozen=True)
class PreparedTeacher:
    """A teacher whose KV is on disk for training and held-out text."""

    recipe: TeacherRecipe
    config: PretrainedConfig
    layer_map: list[tuple[int, int]]
    train: TeacherSource
    held_out: TeacherSource
    report: FillReport
    alignment: AlignmentCounts

    @property
    def store(self) -> KVStore:
        """KV over the training text."""
        return self.train.store


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` made."""

    recipe: Recipe
    texts: Texts
    student_config: PretrainedConfig
    teachers: list[PreparedTeacher]
    phases: Phases

    def make_student(self) -> PreTrainedModel:
        """The student before training, the same at every call."""
        return make_student(self.recipe, self.texts.tokenizer)


def prepare(recipe: Recipe) -> Prepared:
    """Read the text and fill the stores; what a store holds already is not done again.

    Raises:
        KVGraftError: of the room where it went wrong.
    """
    phases = Phases()
    with phases.timed("read text"):
        texts = read_texts(recipe)
    config = load_student_config(recipe, texts.tokenizer)
    teachers = [_prepare_teacher(recipe, teacher, texts, config, phases) for teacher in recipe.teachers]
    return Prepared(recipe, texts, config, teachers, phases)


def read_texts(recipe: Recipe) -> Texts:
    """The recipe's text, encoded with the student's tokenizer (trained here if the recipe names none)."""
    tokenizer = existing_tokenizer(recipe)
    train, held_out = load_examples_of(recipe, tokenizer)
    if tokenizer is None:
        tokenizer = train_tokenizer((example.text for example in train), recipe.student.vocab_size)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise DataError("the student's tokenizer has neither a padding nor an end-of-text token; name another one")
    encoded = [
        [encode_example(example, tokenizer, recipe.data.max_length, recipe.data.loss_on) for example in examples]
        for examples in (train, held_out)
    ]
    cut = sum(bool(example.truncated_bytes) for examples in encoded for example in examples)
    if cut:
        logger.warning("%d texts were cut to data.max_length %d tokens", cut, recipe.data.max_length)
    return Texts(train, held_out, tokenizer, *encoded)


def load_examples_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> tuple[list[Example], list[Example]]:
    """Training and held-out texts of the recipe; ``tokenizer`` renders chats where it has a template."""
    data = recipe.data
    return load_train_and_held_out(
        data.train,
        data.held_out,
        data.train_samples,
        data.held_out_samples,
        data.seed,
        tokenizer=tokenizer,
        keep_turns=data.chat_template == "own",
    )


def load_student_config(recipe: Recipe, tokenizer_or_size: PreTrainedTokenizerBase | int) -> PretrainedConfig:
    """Config of the recipe's student, without weights."""
    student = recipe.student
    if student.model is not None:
        return loading.load_config(student.model, student.revision)
    if student.cut_from is not None:
        whole = loading.load_config(student.cut_from, student.revision)
        return cut_config(whole, _kept_layers(student, whole))
    assert student.new is not None
    return student_config(student.new, tokenizer_or_size)


def make_student(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The student before training."""
    student = recipe.student
    if student.model is not None:
        model = loading.load_model(student.model, student.revision, dtype=student.dtype, device="cpu")
        return model if student.lora is None else add_lora(model, **student.lora.model_dump(), seed=recipe.seed)
    if student.cut_from is not None:
        whole = loading.load_model(student.cut_from, student.revision, dtype=student.dtype, device="cpu")
        return cut_model(whole, _kept_layers(student, whole.config))
    assert student.new is not None
    return new_student(student.new, tokenizer, recipe.seed).to(getattr(torch, student.dtype))


def _kept_layers(student: StudentRecipe, whole: PretrainedConfig) -> list[int]:
    return chosen_layers(kv_geometry(whole).num_layers, student.layers, student.every)


def teacher_max_length(recipe: Recipe, config: PretrainedConfig) -> int:
    """Teacher tokens after which a text is cut: its context, or twice the student's length if that is less."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = _TEACHER_LENGTH_FACTOR * recipe.data.max_length
    return longest if context is None else min(longest, context)


def existing_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase | None:
    name = recipe.student.tokenizer or recipe.student.model or recipe.student.cut_from
    return None if name is None else loading.load_tokenizer(name, recipe.student.revision)


@dataclass(frozen=True)
class IdentifiedModel:
    """A model whose KV is to be stored, known well enough to find its store; its weights are not loaded yet."""

    recipe: TeacherRecipe
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    tokenizer_fingerprint: str
    load: Callable[[], PreTrainedModel]

    @property
    def geometry(self) -> KVGeometry:
        """Layers and heads of the model."""
        return kv_geometry(self.config)


def identify(model: TeacherRecipe) -> IdentifiedModel:
    """Config, tokenizer and fingerprints of ``model``; ``load`` gives the model itself, once."""

    @lru_cache(1)
    def load() -> PreTrainedModel:
        device = model.device
        if device == "auto" and process_state().num_processes > 1:
            device = str(process_state().device)
        return loading.load_model(model.model, model.revision, dtype=model.dtype, device=device)

    tokenizer = loading.load_tokenizer(model.model, model.revision)
    return IdentifiedModel(
        recipe=model,
        config=loading.load_config(model.model, model.revision),
        tokenizer=tokenizer,
        fingerprint=f"{loading.fingerprint(model.model, model.revision)} in {model.dtype}",
        tokenizer_fingerprint=loading.tokenizer_fingerprint(tokenizer),
        load=load,
    )


def store_kv(
    model: IdentifiedModel, examples: list[Example], layers: tuple[int, ...], max_length: int, settings: StoreRecipe
) -> tuple[KVStore, FillReport]:
    """The store of ``model``'s KV over ``examples``, filled where it is not yet; several processes share the work."""
    encoded = encode_for_teacher(examples, model.tokenizer, max_length)
    identity = StoreIdentity(
        model=model.fingerprint,
        tokenizer=model.tokenizer_fingerprint,
        text=text_fingerprint(text.sample_key for text in encoded),
        layers=layers,
        num_kv_heads=model.geometry.num_kv_heads,
        head_dim=model.geometry.head_dim,
        dtype=settings.dtype,
        max_length=max_length,
        template=template_fingerprint(examples, model.tokenizer),
    )
    return fill_store(
        store_folder(settings.path, model.recipe.name, identity),
        identity,
        model.recipe.name,
        model.load,
        encoded,
        shard_bytes=settings.shard_megabytes * 1_000_000,
        token_budget=settings.token_budget,
        verify=settings.verify,
    )


def _prepare_teacher(
    recipe: Recipe, teacher: TeacherRecipe, texts: Texts, student: PretrainedConfig, phases: Phases
) -> PreparedTeacher:
    with phases.timed(f"identify {teacher.name}"):
        model = identify(teacher)
        layer_map = layer_map_of(recipe, student, model.config)
        layers = tuple(sorted({teacher_layer for _, teacher_layer in layer_map}))
        max_length = teacher_max_length(recipe, model.config)

    def source_of(examples: list[Example], part: str) -> tuple[TeacherSource, FillReport]:
        with phases.timed(f"capture {teacher.name} ({part} text)"):
            store, report = store_kv(model, examples, layers, max_length, recipe.store)
        teacher_layers = [teacher_layer for _, teacher_layer in layer_map]
        alignment = recipe.alignment
        return TeacherSource(teacher.name, store, teacher_layers, alignment.tokens, alignment.skip_first_tokens), report

    train, report = source_of(texts.train_examples, "training")
    held_out, _ = source_of(texts.held_out_examples, "held-out")
    with phases.timed(f"align {teacher.name}"):
        alignment = train.counts(texts.train)
    require_coverage(teacher.name, alignment)
    return PreparedTeacher(teacher, model.config, layer_map, train, held_out, report, alignment)


def layer_map_of(recipe: Recipe, student: PretrainedConfig, teacher: PretrainedConfig) -> list[tuple[int, int]]:
    """Pairs of student layer and teacher layer, by ``alignment.layers``."""
    return map_layers(
        recipe.alignment.layers,
        kv_geometry(student).num_layers,
        kv_geometry(teacher).num_layers,
        origin_layers(student, teacher),
    )


def require_coverage(teacher: str, alignment: AlignmentCounts) -> None:
    """Raise RecipeError where ``teacher`` answers for no token of the student's text."""
    if alignment.coverage == 0:
        raise RecipeError(
            f"no token of the student's text is answered by teacher {teacher} ({dict(alignment.dropped)}); "
            "check that both read the same text and that data.max_length leaves room for it"
        )
