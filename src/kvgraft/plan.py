"""What a recipe will take, and whether it can work at all, before anything runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import BaseModel
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from kvgraft.align.evidence import EVIDENCE_METHODS
from kvgraft.align.layers import map_layers
from kvgraft.data.chat import encode_text, require_template
from kvgraft.data.datasets import Example, in_template
from kvgraft.distill.build import build_projector
from kvgraft.distill.objectives import projector_direction
from kvgraft.distill.relations import require_relation_heads
from kvgraft.distill.trackers import tracker_problems
from kvgraft.errors import KVGraftError, RecipeError
from kvgraft.identify import identify
from kvgraft.kv import KVGeometry
from kvgraft.memory import PeakMemory
from kvgraft.models import loading
from kvgraft.models.geometry import context_of, depth_of, kv_geometry, kv_layers
from kvgraft.models.lora import add_lora
from kvgraft.models.placement import QUANTIZED_BYTES
from kvgraft.prepare import (
    existing_tokenizer,
    layer_map_of,
    load_examples_of,
    load_student_config,
    student_context_problem,
    student_vocabulary_problem,
    teacher_max_length,
)
from kvgraft.prepare_kv import not_stored
from kvgraft.projector.sizing import FLOAT32_BYTES, TRAINING_COPIES, advise, auto_mlp_ratio
from kvgraft.recipe import Recipe, TeacherRecipe
from kvgraft.store.format import stored_bytes_per_token

# Texts whose teacher tokens are counted; the rest are estimated from their bytes.
_COUNTED_TEXTS = 300
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, **QUANTIZED_BYTES}


class ModelPlan(BaseModel):
    """Geometry and size of one model; ``kv_layers`` are the places of the ``num_layers`` that hold KV in its depth."""

    name: str
    architecture: str
    parameters: int
    depth: int
    num_layers: int
    kv_layers: list[int]
    num_kv_heads: int
    head_dim: int
    kv_dim: int
    hidden_size: int
    context: int | None
    vocab_size: int
    weight_bytes: int


class TeacherPlan(BaseModel):
    """What one teacher brings: layers, adapters, bytes of KV, and the guide's advice (SPEC section 3)."""

    model: ModelPlan
    layer_map: list[tuple[int, int]]
    mlp_ratio: float | str
    adapter_parameters: int
    projector_parameters: int
    kv_bytes_per_token: int
    kv_tokens: int
    kv_bytes: int
    advised_mlp_ratio: float
    advised_dropout: float
    reasons: list[str]


class Forecast(BaseModel):
    """What one process will take for a recipe on this machine: :func:`kvgraft.forecast.make_forecast`.

    Attributes:
        store_bytes: the teachers' KV on disk, what is there already included.
        peak_memory: the most memory at once.
        seconds: wall time of each phase, by the names in a run's results.
        calibration_seconds: what finding this out took.
    """

    store_bytes: int
    peak_memory: PeakMemory
    seconds: dict[str, float]
    calibration_seconds: float

    @property
    def total_seconds(self) -> float:
        """Of all phases."""
        return sum(self.seconds.values())


class TextPlan(BaseModel):
    """A text as the student will read it, split where its completion begins; all of it is that without a prompt."""

    prompt: str
    completion: str


class Plan(BaseModel):
    """Everything that ``kvgraft plan`` tells. ``problems`` is empty where the recipe can run.

    ``first_text`` is the first to train on, for a look at what columns and templates make of it.
    ``training_memory_bytes`` and ``store_bytes`` are arithmetic; ``forecast`` is there where it was asked for.
    """

    name: str
    student: ModelPlan | None
    teachers: list[TeacherPlan]
    train_texts: int
    held_out_texts: int
    first_text: TextPlan | None
    training_memory_bytes: int
    store_bytes: int
    free_disk_bytes: int
    problems: list[str]
    forecast: Forecast | None = None


def make_plan(recipe: Recipe) -> Plan:
    """Plan of ``recipe``, from configs and tokenizers alone: no weights are loaded.

    Bytes of KV are estimated from the first few hundred texts. Memory leaves activations out.
    """
    problems = tracker_problems(recipe.training.report_to)
    train: list[Example] = []
    held_out: list[Example] = []
    first_text = student_config = None
    trained = frozen = 0
    try:
        tokenizer = existing_tokenizer(recipe)
        train, held_out = load_examples_of(recipe, tokenizer)
        _require_template_for(train + held_out, tokenizer)
        first_text = _text_plan(train[0] if tokenizer is None else in_template(train[0], tokenizer))
        student_config = load_student_config(recipe, recipe.student.vocab_size if tokenizer is None else tokenizer)
        problems += _student_problems(recipe, student_config, tokenizer, len(train))
        trained, frozen = _student_sizes(recipe, student_config)
    except KVGraftError as error:
        problems.append(str(error))
    student = None if student_config is None else _model_plan("student", student_config, recipe.student.dtype)
    teachers = []
    for teacher in recipe.teachers:
        try:
            planned = _teacher_plan(recipe, teacher, student, student_config, train + held_out, len(train))
            teachers += [] if planned is None else [planned]
        except KVGraftError as error:
            problems.append(str(error))
    store_bytes = sum(teacher.kv_bytes for teacher in teachers)
    free = shutil.disk_usage(existing_parent(recipe.store.path)).free
    # What is there already is asked for only here: a teacher's fingerprint means reading its weights.
    if store_bytes > free and (missing := _missing_bytes(recipe, teachers, train, held_out)) > free:
        problems.append(
            f"the teachers' KV takes about {missing / 1e9:.3g} GB more and {free / 1e9:.3g} GB are free at "
            f"{recipe.store.path}; take fewer texts, fewer layers or another store.path"
        )
    trained += sum(teacher.projector_parameters for teacher in teachers)
    teacher_bytes = [teacher.model.weight_bytes for teacher in teachers]
    return Plan(
        name=recipe.name,
        student=student,
        teachers=teachers,
        train_texts=len(train),
        held_out_texts=len(held_out),
        first_text=first_text,
        training_memory_bytes=_memory(
            trained * FLOAT32_BYTES * TRAINING_COPIES + round(frozen * _BYTES[recipe.student.dtype]),
            teacher_bytes,
            online=recipe.kv_loss.source == "online",
        ),
        store_bytes=store_bytes,
        free_disk_bytes=free,
        problems=problems,
    )


def _text_plan(example: Example) -> TextPlan:
    start = example.prompt_characters
    return TextPlan(prompt=example.text[:start], completion=example.text[start:])


def require_workable(recipe: Recipe) -> None:
    """Raise RecipeError with everything that keeps ``recipe`` from working; nothing has run by then."""
    problems = make_plan(recipe).problems
    if problems:
        raise RecipeError(f"recipe {recipe.name} cannot work:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _memory(training: int, teachers: list[int], *, online: bool) -> int:
    """Bytes of training beside its teachers (``online``), or of what is largest: capture and training take turns."""
    return training + sum(teachers) if online else max([training, *teachers])


def _student_problems(
    recipe: Recipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None, train_texts: int
) -> list[str]:
    too_long = student_context_problem(recipe, config)
    problems = [] if too_long is None else [too_long]
    too_many = None if tokenizer is None else student_vocabulary_problem(config, tokenizer)
    problems += [] if too_many is None else [too_many]
    if train_texts < recipe.training.batch_size and recipe.training.tokens_per_batch is None:
        problems.append(
            f"training.batch_size {recipe.training.batch_size} is more than the {train_texts} training texts; lower it"
        )
    return problems


def _require_template_for(examples: list[Example], tokenizer: PreTrainedTokenizerBase | None) -> None:
    if not any(example.turns for example in examples):
        return
    if tokenizer is None:
        raise RecipeError(
            "a new student's tokenizer has no chat template, which data.chat_template: own asks for; name a "
            "student.tokenizer that has one, or set data.chat_template: student"
        )
    require_template(tokenizer)


def _teacher_plan(
    recipe: Recipe,
    teacher: TeacherRecipe,
    student: ModelPlan | None,
    student_config: PretrainedConfig | None,
    examples: list[Example],
    train_texts: int,
) -> TeacherPlan | None:
    config = loading.load_config(teacher.model, teacher.revision)
    tokenizer = loading.load_tokenizer(teacher.model, teacher.revision)
    model = _model_plan(teacher.name, config, teacher.quantization or teacher.dtype)
    if student is None or student_config is None:
        return None  # What the student lacks is among the problems already.
    if recipe.alignment_of(teacher).layers in EVIDENCE_METHODS:
        # Which layers follows from their KV; how many does not.
        layer_map = map_layers("ratio", student.num_layers, model.num_layers)
    else:
        layer_map = layer_map_of(recipe, teacher, student_config, config)
    _require_layer_weights(recipe, teacher, len(layer_map))
    distinct = len({teacher_layer for _, teacher_layer in layer_map})
    geometry = KVGeometry(distinct, model.num_kv_heads, model.head_dim)
    bytes_per_token = stored_bytes_per_token(geometry, recipe.store.dtype)
    online = recipe.kv_loss.source == "online"
    tokens = _count_tokens(tokenizer, examples, teacher_max_length(recipe, config))
    ratio = recipe.projector.mlp_ratio
    ratio = auto_mlp_ratio(model.kv_dim) if ratio == "auto" else ratio
    direction = projector_direction(recipe.kv_loss.objective)
    adapter = 0
    if recipe.kv_loss.objective == "relational":
        require_relation_heads(recipe.kv_loss.relation_heads, student.kv_dim, model.kv_dim)
    else:
        teacher_config = {"d_model": model.hidden_size, "num_layers": len(layer_map), "kv_dim": model.kv_dim}
        with torch.device("meta"):
            projector = build_projector(
                recipe, recipe.kv_loss.objective, student.kv_dim, {teacher.name: teacher_config}
            )
        adapter = projector.count_parameters() // 2
    advice = advise(
        model.parameters,
        model.hidden_size,
        student.hidden_size,
        len(layer_map),
        train_texts or None,
        teacher_kv_dim=model.kv_dim,
        student_kv_dim=student.kv_dim,
        per_layer=recipe.projector.sharing == "per_layer",
        skip=recipe.projector.skip,
        direction=direction,
        # The store holds a layer once that several layers of the student read; what is advised counts each of those.
        bytes_per_number=bytes_per_token / replace(geometry, num_layers=len(layer_map)).bytes_per_token(1),
    )
    return TeacherPlan(
        model=model,
        layer_map=layer_map,
        mlp_ratio=ratio,
        adapter_parameters=adapter,
        projector_parameters=2 * adapter,
        kv_bytes_per_token=bytes_per_token,
        kv_tokens=tokens,
        kv_bytes=0 if online else tokens * bytes_per_token,
        advised_mlp_ratio=advice.mlp_ratio,
        advised_dropout=advice.dropout,
        reasons=[*advice.reasons, *_layers_reason(recipe.alignment_of(teacher).layers)],
    )


def _require_layer_weights(recipe: Recipe, teacher: TeacherRecipe, num_layers: int) -> None:
    weights = recipe.kv_loss.layer_weights
    if weights is not None and len(weights) != num_layers:
        raise RecipeError(
            f"kv_loss.layer_weights has {len(weights)} entries, and {num_layers} student layers are compared with "
            f"teacher {teacher.name}; give one for each of them, in their order"
        )


def _layers_reason(layers: object) -> list[str]:
    if layers not in EVIDENCE_METHODS:
        return []
    return [f"alignment.layers {layers}: the layers are found before capture; those above stand for their number."]


def _model_plan(name: str, config: PretrainedConfig, dtype: str) -> ModelPlan:
    text, geometry = config.get_text_config(), kv_geometry(config)
    parameters = count_parameters(config)
    return ModelPlan(
        name=name,
        architecture=config.model_type,
        parameters=parameters,
        depth=depth_of(config),
        num_layers=geometry.num_layers,
        kv_layers=list(kv_layers(config)),
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        kv_dim=geometry.kv_dim,
        hidden_size=text.hidden_size,
        context=context_of(config),
        vocab_size=text.vocab_size,
        weight_bytes=round(parameters * _BYTES[dtype]),
    )


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of a model of ``config``, without its weights."""
    return int(loading.model_without_weights(config).num_parameters())


def _student_sizes(recipe: Recipe, config: PretrainedConfig) -> tuple[int, int]:
    """Numbers of the student's parameters that are trained, and that stay as they are."""
    lora = recipe.student.lora
    if lora is None:
        return count_parameters(config), 0
    with torch.device("meta"):
        adapted = add_lora(loading.model_without_weights(config), **lora.model_dump(), seed=recipe.seed)
    trained = int(adapted.num_parameters(only_trainable=True))
    return trained, int(adapted.num_parameters()) - trained


def _missing_bytes(recipe: Recipe, teachers: list[TeacherPlan], *parts: list[Example]) -> int:
    """Bytes of the KV of ``teachers`` over ``parts`` that no store holds yet."""
    recipes = {teacher.name: teacher for teacher in recipe.teachers}
    characters = sum(len(example.text) for examples in parts for example in examples)
    total = 0.0
    for planned in teachers:
        model = identify(recipes[planned.model.name])
        found_later = recipe.alignment_of(model.recipe).layers in EVIDENCE_METHODS
        layers = None if found_later else tuple(sorted({layer for _, layer in planned.layer_map}))
        max_length = teacher_max_length(recipe, model.config)
        missing = [
            example for examples in parts for example in not_stored(model, examples, layers, max_length, recipe.store)
        ]
        total += planned.kv_bytes * sum(len(example.text) for example in missing) / characters
    return round(total)


def _count_tokens(tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_length: int) -> int:
    counted = examples[:_COUNTED_TEXTS]
    if not counted:
        return 0
    tokens = sum(len(encode_text(example, tokenizer, max_length).input_ids) for example in counted)
    share = sum(len(example.text) for example in examples) / sum(len(example.text) for example in counted)
    return round(tokens * share)


def existing_parent(path: Path) -> Path:
    """``path``, or the nearest folder above it that there is."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
