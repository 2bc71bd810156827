"""``kvgraft plan --guide``: the guide's schemes and the real models it names, sized, beside the guide's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from kvgraft.kv import KVGeometry
from kvgraft.models.known import KnownModel, known_models
from kvgraft.projector.presets import PRESETS
from kvgraft.projector.sizing import (
    FLOAT32_BYTES,
    TRAINING_COPIES,
    SizingAdvice,
    adapter_parameters,
    advise,
    auto_mlp_ratio,
)

STUDENT = "Qwen2-1.5B"
TEACHERS = ("Qwen2-7B", "Qwen1.5-14B", "Qwen2-72B", "Llama-3-70B")
STORED_BYTES = 2
MILLION = 10**6


@dataclass(frozen=True)
class Scheme:
    """One of the guide's schemes as printed; ``claimed_millions`` is its "params per teacher"."""

    title: str
    preset: str
    teacher: str
    d_model: int
    num_layers: int
    student_d_model: int
    claimed_millions: int


SCHEMES = (
    Scheme("A, fast", "fast", "Qwen2-7B", 3584, 28, 2048, 17),
    Scheme("B, standard", "standard", "Qwen2-14B", 5120, 40, 1536, 34),
    Scheme("C, enhanced", "enhanced", "Llama-3-70B", 8192, 80, 2048, 68),
)
# What the guide prints for a real pair of its text, in millions of weights of one adapter.
_CLAIMED_FOR_MODELS = {"Qwen2-7B": 17, "Qwen1.5-14B": 34, "Llama-3-70B": 68}


class Sizes(BaseModel):
    """One pair of widths at one mlp_ratio. ``adapter_weights`` counts matrices alone, as the guide does.

    ``projector_parameters`` are those of the adapters for keys and for values; memory is in float32, training memory
    holds gradients and AdamW's moments too. ``kv_bytes_per_token`` is the teacher's KV in float16, all its layers.
    """

    in_dim: int
    out_dim: int
    mlp_ratio: float
    adapter_weights: int
    adapter_parameters: int
    projector_parameters: int
    parameter_memory_bytes: int
    training_memory_bytes: int
    kv_bytes_per_token: int


class SchemeSizing(BaseModel):
    """A scheme of the guide beside what it takes."""

    title: str
    preset: str
    teacher: str
    num_layers: int
    dropout: float
    init_method: str
    guide_parameters: int
    sizes: Sizes


ReadingName = Literal["hidden size, as the guide", "kv_dim, as it is"]


class Reading(BaseModel):
    """One reading of d_model (SPEC R1), and what ``mlp_ratio="auto"`` would choose under it."""

    reading: ReadingName
    auto_mlp_ratio: float
    sizes: Sizes


class ModelSizing(BaseModel):
    """A real teacher of the guide, sized under both readings; ``guide_parameters`` is None where it names none."""

    teacher: str
    hub_name: str
    parameters: int
    num_layers: int
    hidden_size: int
    kv_dim: int
    mlp_ratio: float
    dropout: float
    reasons: list[str]
    guide_parameters: int | None
    readings: list[Reading]


class GuidePlan(BaseModel):
    """Everything that ``kvgraft plan --guide`` tells."""

    student: str
    student_hidden_size: int
    student_kv_dim: int
    schemes: list[SchemeSizing]
    models: list[ModelSizing]
    notes: list[str]


def make_guide_plan() -> GuidePlan:
    """The guide's schemes and models, computed from the configurations that ship with kvgraft."""
    models = known_models()
    student = models[STUDENT]
    schemes = [_scheme_sizing(scheme) for scheme in SCHEMES]
    return GuidePlan(
        student=student.name,
        student_hidden_size=student.hidden_size,
        student_kv_dim=student.geometry.kv_dim,
        schemes=schemes,
        models=[_model_sizing(models[name], student) for name in TEACHERS],
        notes=_notes(schemes, student, [models[name] for name in TEACHERS]),
    )


def _scheme_sizing(scheme: Scheme) -> SchemeSizing:
    preset = PRESETS[scheme.preset]
    return SchemeSizing(
        title=scheme.title,
        preset=scheme.preset,
        teacher=scheme.teacher,
        num_layers=scheme.num_layers,
        dropout=preset.dropout,
        init_method=preset.init_method,
        guide_parameters=scheme.claimed_millions * MILLION,
        sizes=_sizes(scheme.d_model, scheme.student_d_model, scheme.num_layers, preset.mlp_ratio),
    )


def _model_sizing(teacher: KnownModel, student: KnownModel) -> ModelSizing:
    geometry = teacher.geometry
    advice = _advice(teacher, student)
    widths: dict[ReadingName, tuple[int, int]] = {
        "hidden size, as the guide": (teacher.hidden_size, student.hidden_size),
        "kv_dim, as it is": (geometry.kv_dim, student.geometry.kv_dim),
    }
    claimed = _CLAIMED_FOR_MODELS.get(teacher.name)
    return ModelSizing(
        teacher=teacher.name,
        hub_name=teacher.hub_name,
        parameters=teacher.parameters,
        num_layers=geometry.num_layers,
        hidden_size=teacher.hidden_size,
        kv_dim=geometry.kv_dim,
        mlp_ratio=advice.mlp_ratio,
        dropout=advice.dropout,
        reasons=advice.reasons,
        guide_parameters=None if claimed is None else claimed * MILLION,
        readings=[
            Reading(
                reading=reading,
                auto_mlp_ratio=auto_mlp_ratio(width),
                sizes=_sizes(width, student_width, geometry.num_layers, advice.mlp_ratio),
            )
            for reading, (width, student_width) in widths.items()
        ],
    )


def _advice(teacher: KnownModel, student: KnownModel) -> SizingAdvice:
    return advise(
        teacher.parameters,
        teacher.hidden_size,
        student.hidden_size,
        teacher.geometry.num_layers,
        teacher_kv_dim=teacher.geometry.kv_dim,
        student_kv_dim=student.geometry.kv_dim,
        bytes_per_number=STORED_BYTES,
    )


def _sizes(in_dim: int, out_dim: int, num_layers: int, mlp_ratio: float) -> Sizes:
    adapter = adapter_parameters(in_dim, out_dim, mlp_ratio)
    return Sizes(
        in_dim=in_dim,
        out_dim=out_dim,
        mlp_ratio=mlp_ratio,
        adapter_weights=adapter_parameters(in_dim, out_dim, mlp_ratio, weights_only=True),
        adapter_parameters=adapter,
        projector_parameters=2 * adapter,
        parameter_memory_bytes=2 * adapter * FLOAT32_BYTES,
        training_memory_bytes=2 * adapter * FLOAT32_BYTES * TRAINING_COPIES,
        kv_bytes_per_token=KVGeometry(num_layers, 1, in_dim).bytes_per_token(STORED_BYTES),
    )


def _notes(schemes: list[SchemeSizing], student: KnownModel, teachers: list[KnownModel]) -> list[str]:
    wrong = [scheme for scheme in schemes if not _counts_agree(scheme.guide_parameters, scheme.sizes.adapter_weights)]
    full = [teacher.name for teacher in teachers if teacher.geometry.kv_dim == teacher.hidden_size]
    return [
        "Qwen2-14B, the teacher of scheme B, never existed: Qwen2 came as 0.5B, 1.5B, 7B, 57B-A14B and 72B. A width of "
        "5120 and 40 layers are Qwen1.5-14B's, which stands in its place among the models.",
        *(
            f"Scheme {scheme.title}: {scheme.sizes.in_dim} to {scheme.sizes.out_dim} at {scheme.sizes.mlp_ratio} takes "
            f"{scheme.sizes.adapter_weights / MILLION:.1f}M weights and not {scheme.guide_parameters // MILLION}M, "
            "which is the guide's figure for 5120 to 1536 at that ratio."
            for scheme in wrong
        ),
        "The guide calls the weights of one adapter those of a teacher. A teacher has two adapters, for keys and for "
        "values, each with biases and a norm besides: the projector's column.",
        f"Schemes A and C lead to a width of 2048, which {student.name} has nowhere: its hidden size is "
        f"{student.hidden_size} and its kv_dim {student.geometry.kv_dim}.",
        f"The hidden size is the width of the KV under full multi-head attention alone: here only for "
        f"{', '.join(full)}. What a projector receives is kv_dim wide (SPEC R1).",
    ]


def _counts_agree(claimed: int, counted: int) -> bool:
    """Within what rounding to a whole million leaves."""
    return abs(claimed - counted) < MILLION
