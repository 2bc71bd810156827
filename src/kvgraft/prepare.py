"""From a recipe to everything that training needs: text, tokenizers, teachers' KV on disk, layers and scales."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvgraft.align.evidence import EVIDENCE_METHODS, LayerEvidence, evidence_path
from kvgraft.align.layers import map_layers
from kvgraft.bfloat16 import warn_where_slow
from kvgraft.data.batching import EncodedExample, encode_example
from kvgraft.data.datasets import Example, load_train_and_held_out
from kvgraft.data.spans import EncodedText
from kvgraft.data.tokenizers import train_tokenizer
from kvgraft.distill.dataset import AlignmentCounts, TeacherSource
from kvgraft.distill.objectives import projector_direction
from kvgraft.errors import DataError, RecipeError
from kvgraft.identify import IdentifiedModel, identify
from kvgraft.models import loading
from kvgraft.models.cut import chosen_layers, cut_config, cut_model, origin_layers
from kvgraft.models.embeddings import EmbeddingStart, start_embeddings
from kvgraft.models.geometry import context_of, depth_of, kv_geometry, relative_depths
from kvgraft.models.lora import add_lora
from kvgraft.models.packing import require_exact_packing
from kvgraft.models.students import new_student, student_config
from kvgraft.prepare_embeddings import prepare_embeddings
from kvgraft.prepare_kv import online_kv, store_for_training
from kvgraft.prepare_log_probs import reads_one_vocabulary
from kvgraft.processes import process_state
from kvgraft.projector.settings import Direction
from kvgraft.recipe import Recipe, StudentRecipe, TeacherRecipe
from kvgraft.store.fill import FillReport, encode_for_teacher
from kvgraft.store.online import OnlineKV
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
    """A teacher whose KV is at hand for training and held-out text.

    ``running`` is the model itself where it runs beside the student; None where all that is needed is on disk.
    """

    recipe: TeacherRecipe
    config: PretrainedConfig
    layer_map: list[tuple[int, int]]
    train: TeacherSource
    held_out: TeacherSource
    report: FillReport
    alignment: AlignmentCounts
    evidence: LayerEvidence | None = None
    running: IdentifiedModel | None = None

    @property
    def store(self) -> KVStore | OnlineKV:
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
    embeddings: EmbeddingStart | None = None

    def make_student(self) -> PreTrainedModel:
        """The student before training, the same at every call."""
        student = make_student(self.recipe, self.texts.tokenizer)
        if self.embeddings is not None:
            start_embeddings(student, self.embeddings)
        return student


def prepare(recipe: Recipe, texts: Texts | None = None) -> Prepared:
    """Read the text, unless ``texts`` are given, and fill the stores; what a store holds already is not done again.

    Raises:
        KVGraftError: of the room where it went wrong.
    """
    warn_where_slow({"training.bf16": recipe.training.bf16})
    phases = Phases()
    with phases.timed("read text"):
        texts = texts or read_texts(recipe)
    config = load_student_config(recipe, texts.tokenizer)
    if recipe.training.batching == "packed":
        require_exact_packing(make_student(recipe, texts.tokenizer))
    models = []
    for teacher in recipe.teachers:
        with phases.timed(f"identify {teacher.name}"):
            models.append(identify(teacher))
            require_long_context(
                recipe,
                models[-1],
                [*texts.train_examples, *texts.held_out_examples],
                [*texts.train, *texts.held_out],
            )
            if recipe.needs_log_probs:
                reads_one_vocabulary(recipe, teacher.name, texts.tokenizer, models[-1].tokenizer)
    teachers = [_prepare_teacher(recipe, model, texts, config, phases) for model in models]
    embeddings = None
    if recipe.student.embeddings_from is not None:
        with phases.timed(f"start embeddings from {recipe.student.embeddings_from}"):
            embeddings = prepare_embeddings(recipe, models, texts, config)
    return Prepared(recipe, texts, config, teachers, phases, embeddings)


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
    for part, examples in zip(("training", "held-out"), encoded, strict=True):
        _require_labels(part, examples, recipe)
    return Texts(train, held_out, tokenizer, *encoded)


def _require_labels(part: str, examples: list[EncodedExample], recipe: Recipe) -> None:
    """Raise DataError where no token of ``examples`` enters the loss, and warn where some texts have none."""
    silent = sum(not example.has_label for example in examples)
    if not silent:
        return
    data = recipe.data
    said = f"{silent} of {len(examples)} {part} texts have no token that enters the loss"
    why = f"data.max_length {data.max_length} and data.loss_on {data.loss_on} leave nothing of their completions"
    if silent == len(examples):
        raise DataError(f"{said}: {why}. Raise data.max_length, set data.loss_on: all, or shorten the prompts")
    logger.warning("%s: %s", said, why)


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
        streaming=data.streaming,
        shuffle_buffer=data.shuffle_buffer,
        columns=data.columns.model_dump(exclude_none=True) if data.columns else None,
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
        if student.lora is None:
            return model
        return add_lora(model, **student.lora.model_dump(), seed=recipe.seed, revision=student.revision)
    if student.cut_from is not None:
        whole = loading.load_model(student.cut_from, student.revision, dtype=student.dtype, device="cpu")
        return cut_model(whole, _kept_layers(student, whole.config))
    assert student.new is not None
    return new_student(student.new, tokenizer, recipe.seed).to(getattr(torch, student.dtype))


def _kept_layers(student: StudentRecipe, whole: PretrainedConfig) -> list[int]:
    return chosen_layers(depth_of(whole), student.layers, student.every)


def teacher_max_length(recipe: Recipe, config: PretrainedConfig) -> int:
    """Teacher tokens after which a text is cut: its context, or twice the student's length if that is less."""
    context = context_of(config)
    longest = _TEACHER_LENGTH_FACTOR * recipe.data.max_length
    return longest if context is None else min(longest, context)


def existing_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the student has before it reads any text; None where one is to be trained.

    Raises:
        RecipeError: it gives ids that the embeddings of a student that exists do not have.
    """
    student = recipe.student
    origin = student.model or student.cut_from
    if student.tokenizer is None:
        return None if origin is None else loading.load_tokenizer(origin, student.revision)
    # The revision is one of the model's repository.
    tokenizer = loading.load_tokenizer(student.tokenizer, student.revision if student.tokenizer == origin else None)
    if origin is not None:
        too_many = student_vocabulary_problem(loading.load_config(origin, student.revision), tokenizer)
        if too_many is not None:
            raise RecipeError(too_many)
    return tokenizer


def _prepare_teacher(
    recipe: Recipe, model: IdentifiedModel, texts: Texts, student: PretrainedConfig, phases: Phases
) -> PreparedTeacher:
    teacher, alignment = model.recipe, recipe.alignment_of(model.recipe)
    max_length = teacher_max_length(recipe, model.config)
    evidence = None
    if alignment.layers in EVIDENCE_METHODS:
        with phases.timed(f"find layers of {teacher.name}"), process_state().main_process_first():
            evidence = find_layer_evidence(recipe, model, texts, projector_direction(recipe.kv_loss.objective))
        layer_map = evidence.layer_map
    else:
        layer_map = layer_map_of(recipe, teacher, student, model.config)
    layers = tuple(sorted({teacher_layer for _, teacher_layer in layer_map}))
    online = recipe.kv_loss.source == "online"

    def source_of(examples: list[Example], part: str) -> tuple[TeacherSource, FillReport]:
        with phases.timed(f"capture {teacher.name} ({part} text)"):
            likelihoods = None
            store: KVStore | OnlineKV
            if online:
                store, report = online_kv(model, examples, layers, max_length, recipe)
            else:
                # Held-out text measures each teacher by itself and needs no weights.
                weighted = recipe.kv_loss.combine == "confidence" and examples is texts.train_examples
                store, report, likelihoods = store_for_training(
                    model, examples, layers, max_length, recipe, with_likelihoods=weighted
                )
        teacher_layers = [teacher_layer for _, teacher_layer in layer_map]
        skipped = alignment.skip_first_tokens
        return TeacherSource(teacher.name, store, teacher_layers, alignment.tokens, skipped, likelihoods), report

    train, report = source_of(texts.train_examples, "training")
    held_out, _ = source_of(texts.held_out_examples, "held-out")
    with phases.timed(f"align {teacher.name}"):
        counts = train.counts(texts.train)
    require_coverage(teacher.name, counts)
    if not online:
        # What it had to say is on disk, and a card need not hold all teachers at once.
        model.let_go()
    running = model if online else None
    return PreparedTeacher(teacher, model.config, layer_map, train, held_out, report, counts, evidence, running)


def find_layer_evidence(recipe: Recipe, model: IdentifiedModel, texts: Texts, direction: Direction) -> LayerEvidence:
    """Which layers of the recipe's student and of ``model`` go together, by its ``alignment.layers``."""
    # Here and not above: fitting, whose least squares this uses, prepares its data with this module.
    from kvgraft.layer_evidence import CALIBRATION_TOKENS, find_layers

    student, alignment = recipe.student, recipe.alignment_of(model.recipe)
    method, max_length = alignment.layers, teacher_max_length(recipe, model.config)
    # More than enough: find_layers stops after so many tokens, and every text has one.
    examples, own = texts.train_examples[:CALIBRATION_TOKENS], texts.train[:CALIBRATION_TOKENS]
    path = evidence_path(
        recipe.store.path,
        str(method),
        loading.fingerprint(str(student.model or student.cut_from), student.revision),
        [student.layers, student.every],
        model.fingerprint,
        loading.tokenizer_fingerprint(texts.tokenizer),
        model.tokenizer_fingerprint,
        [example.sample_key for example in own],
        [recipe.data.max_length, max_length, alignment.tokens, alignment.skip_first_tokens, direction],
    )
    return find_layers(
        path,
        "cka" if method == "cka" else "predictive",
        lambda: make_student(recipe, texts.tokenizer),
        model.load,
        own,
        encode_for_teacher(examples, model.tokenizer, max_length),
        alignment.tokens,
        alignment.skip_first_tokens,
        direction,
    )


def student_context_problem(recipe: Recipe, config: PretrainedConfig) -> str | None:
    """What to tell where the student of ``config`` would read texts beyond its context; None where it would not."""
    context = context_of(config)
    if context is None or recipe.data.max_length <= context:
        return None
    return (
        f"data.max_length {recipe.data.max_length} is longer than the student's context {context}; "
        f"set it to at most {context}"
    )


def student_vocabulary_problem(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What to tell where ``tokenizer`` gives ids that the student of ``config`` has not; None where it does not."""
    embeddings = config.get_text_config().vocab_size
    if len(tokenizer) <= embeddings:
        return None
    return (
        f"the student's tokenizer has {len(tokenizer):,} tokens and its model embeddings of {embeddings:,}; name one "
        "of at most as many tokens in student.tokenizer, or leave that out for the model's own"
    )


def require_long_context(
    recipe: Recipe,
    model: IdentifiedModel,
    examples: Sequence[Example],
    read_by_student: Sequence[EncodedExample | EncodedText],
) -> None:
    """Raise RecipeError where ``model`` cannot read as far into a text as the student does, and may not be cut."""
    context = model.context
    if model.recipe.long_texts == "cut" or context is None or context > teacher_max_length(recipe, model.config):
        return
    read_by_teacher = encode_for_teacher(examples, model.tokenizer, context)
    cut = [
        own.sample_key
        for own, other in zip(read_by_student, read_by_teacher, strict=True)
        if other.truncated_bytes > own.truncated_bytes
    ]
    if cut:
        raise RecipeError(
            f"teacher {model.recipe.name} reads {context} tokens, less than the student does of {len(cut)} of "
            f"{len(examples)} texts (data.max_length {recipe.data.max_length}); lower data.max_length, or set "
            f"long_texts: cut for this teacher, which then answers for the part of a text that it can read"
        )


def layer_map_of(
    recipe: Recipe, teacher: TeacherRecipe, student_config: PretrainedConfig, teacher_config: PretrainedConfig
) -> list[tuple[int, int]]:
    """Pairs of student layer and layer of ``teacher``, by its ``alignment.layers``."""
    return map_layers(
        recipe.alignment_of(teacher).layers,
        kv_geometry(student_config).num_layers,
        kv_geometry(teacher_config).num_layers,
        origin_layers(student_config, teacher_config),
        (relative_depths(student_config), relative_depths(teacher_config)),
    )


def require_coverage(teacher: str, alignment: AlignmentCounts) -> None:
    """Raise RecipeError where ``teacher`` answers for no token of the student's text, or only for skipped ones."""
    if alignment.coverage == 0:
        raise RecipeError(
            f"no token of the student's text is answered by teacher {teacher} ({dict(alignment.dropped)}); "
            "check that both read the same text and that data.max_length leaves room for it"
        )
    if alignment.compared_tokens == 0:
        raise RecipeError(
            f"no training text is long enough for teacher {teacher}: alignment.skip_first_tokens leaves out the first "
            "tokens of each, and no other is left; set it to 0, or give longer texts"
        )
