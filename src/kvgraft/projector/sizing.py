"""How wide the bottleneck should be and what it costs (SPEC section 3; the guide's tables, its counts computed)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kvgraft.errors import ProjectorError
from kvgraft.projector.adapters import hidden_width
from kvgraft.projector.presets import PRESETS
from kvgraft.projector.settings import Direction, whole_number

BILLION = 10**9
FLOAT32_BYTES = 4
# Weight, gradient and AdamW's two moments.
TRAINING_COPIES = 4


@dataclass(frozen=True)
class SizingAdvice:
    """What to set, why, and what it takes.

    Attributes:
        preset: name in :data:`kvgraft.projector.presets.PRESETS` whose ``mlp_ratio`` is advised.
        mlp_ratio, dropout: the settings.
        reasons: one sentence for each decision.
        adapter_parameters: numbers in one adapter, one map of keys or of values (all its layers where per layer).
        projector_parameters: both adapters of this teacher.
        parameter_memory_bytes: the projector's weights in float32.
        training_memory_bytes: weights, gradients and AdamW's two moments in float32, without activations.
        teacher_kv_bytes: the teacher's KV on disk, or None where the number of tokens is unknown.
    """

    preset: str
    mlp_ratio: float
    dropout: float
    reasons: list[str]
    adapter_parameters: int
    projector_parameters: int
    parameter_memory_bytes: int
    training_memory_bytes: int
    teacher_kv_bytes: int | None


def auto_mlp_ratio(d_model: int) -> float:
    """The guide's ``mlp_ratio="auto"``: under 4096 gives 0.5, under 6144 gives 1.0, anything wider 2.0."""
    if d_model < 4096:
        return 0.5
    return 1.0 if d_model < 6144 else 2.0


def adapter_parameters(
    in_dim: int,
    out_dim: int,
    mlp_ratio: float | Literal["linear"],
    *,
    skip: bool = False,
    layer_norm: bool = True,
    num_layers: int = 1,
    weights_only: bool = False,
) -> int:
    """Numbers in one :class:`ElasticBottleneck` of these settings.

    Args:
        in_dim, out_dim: widths.
        mlp_ratio: hidden width over ``in_dim``, or ``"linear"``.
        skip: with the linear map beside the bottleneck.
        layer_norm: with the norm before it.
        num_layers: independent adapters, 1 where all layers share one.
        weights_only: weight matrices alone, as the guide counts: no biases and no norm.
    """
    matrices, vectors = 0, 0
    if mlp_ratio == "linear" or skip:
        matrices, vectors = in_dim * out_dim, out_dim
    if mlp_ratio != "linear":
        hidden = hidden_width(in_dim, mlp_ratio)
        matrices += in_dim * hidden + hidden * out_dim
        vectors += hidden + out_dim + (2 * in_dim if layer_norm else 0)
    return num_layers * (matrices + (0 if weights_only else vectors))


def advise(
    teacher_parameters: int | None,
    teacher_d_model: int,
    student_d_model: int,
    num_layers: int,
    num_samples: int | None = None,
    *,
    teacher_kv_dim: int | None = None,
    student_kv_dim: int | None = None,
    per_layer: bool = False,
    skip: bool = False,
    direction: Direction = "teacher_to_student",
    tokens_per_sample: int | None = None,
    bytes_per_number: float = 2,
) -> SizingAdvice:
    """The guide's advice for one teacher, with its costs.

    Args:
        teacher_parameters: numbers in the teacher (7_000_000_000 for 7B); None goes by ``teacher_d_model``.
        teacher_d_model, student_d_model: hidden sizes.
        num_layers: layers of the teacher whose KV is used.
        num_samples: training texts; None is a standard data set.
        teacher_kv_dim, student_kv_dim: widths of the KV; default the hidden sizes, right only without grouped-query
            attention.
        per_layer, skip, direction: the projector's settings of the same names.
        tokens_per_sample: mean tokens of a text, for the size of the teacher's KV on disk.
        bytes_per_number: of the stored KV, default 2 (float16).

    Raises:
        ProjectorError: a size that is not a positive whole number, or an unknown direction.
    """
    _require_positive(
        teacher_parameters=teacher_parameters,
        teacher_d_model=teacher_d_model,
        student_d_model=student_d_model,
        num_layers=num_layers,
        num_samples=num_samples,
        teacher_kv_dim=teacher_kv_dim,
        student_kv_dim=student_kv_dim,
        tokens_per_sample=tokens_per_sample,
    )
    if not 0 < bytes_per_number < float("inf"):
        raise ProjectorError(f"bytes_per_number must be a number above 0; got {bytes_per_number!r}")
    if direction not in get_args(Direction):
        raise ProjectorError(f"direction must be one of {', '.join(get_args(Direction))}; got {direction!r}")
    preset, ratio_reason = _advised_preset(teacher_parameters, teacher_d_model)
    dropout, dropout_reasons = _advised_dropout(teacher_parameters, num_samples)
    teacher_width, student_width = teacher_kv_dim or teacher_d_model, student_kv_dim or student_d_model
    forwards = direction == "teacher_to_student"
    in_dim, out_dim = (teacher_width, student_width) if forwards else (student_width, teacher_width)
    mlp_ratio = PRESETS[preset].mlp_ratio
    adapter = adapter_parameters(in_dim, out_dim, mlp_ratio, skip=skip, num_layers=num_layers if per_layer else 1)
    kv_bytes, kv_reason = _teacher_kv_bytes(num_samples, tokens_per_sample, num_layers, teacher_width, bytes_per_number)
    return SizingAdvice(
        preset=preset,
        mlp_ratio=mlp_ratio,
        dropout=dropout,
        reasons=[ratio_reason, *dropout_reasons, kv_reason],
        adapter_parameters=adapter,
        projector_parameters=2 * adapter,
        parameter_memory_bytes=2 * adapter * FLOAT32_BYTES,
        training_memory_bytes=2 * adapter * FLOAT32_BYTES * TRAINING_COPIES,
        teacher_kv_bytes=kv_bytes,
    )


def _advised_preset(teacher_parameters: int | None, teacher_d_model: int) -> tuple[str, str]:
    if teacher_parameters is None:
        ratio = auto_mlp_ratio(teacher_d_model)
        preset = next(name for name, preset in PRESETS.items() if preset.mlp_ratio == ratio)
        return preset, f"mlp_ratio {ratio}: the teacher's size is unknown, its d_model is {teacher_d_model}."
    size = f"the teacher has {teacher_parameters / BILLION:.4g}B parameters"
    if teacher_parameters < 14 * BILLION:
        # The guide puts 7B to 14B in two rows; ruling R3 takes the closing table's.
        return "fast", f"mlp_ratio 0.5: {size}, under 14B."
    if teacher_parameters < 30 * BILLION:
        return "standard", f"mlp_ratio 1.0: {size}, 14B to 30B."
    if teacher_parameters <= 70 * BILLION:
        return "enhanced", f"mlp_ratio 2.0: {size}, 30B to 70B."
    return "enhanced", f"mlp_ratio 2.0: {size}, beyond the guide's 70B; its widest setting is taken."


def _advised_dropout(teacher_parameters: int | None, num_samples: int | None) -> tuple[float, list[str]]:
    if num_samples is None:
        dropout, reason = 0.1, "dropout 0.1: a standard data set is assumed, its size was not given."
    elif num_samples < 10_000:
        dropout, reason = 0.2, f"dropout 0.2: {num_samples:,} samples, under 10,000, against overfitting."
    elif num_samples <= 100_000:
        dropout, reason = 0.1, f"dropout 0.1: {num_samples:,} samples, a standard data set."
    else:
        dropout, reason = 0.05, f"dropout 0.05: {num_samples:,} samples, over 100,000."
    if teacher_parameters is None or teacher_parameters < 30 * BILLION or dropout >= 0.15:
        return dropout, [reason]
    return 0.15, [reason, "dropout 0.15 instead: a teacher of 30B or more asks for at least that."]


def _teacher_kv_bytes(
    num_samples: int | None, tokens_per_sample: int | None, num_layers: int, width: int, bytes_per_number: float
) -> tuple[int | None, str]:
    per_token = round(2 * num_layers * width * bytes_per_number)
    if num_samples is None or tokens_per_sample is None:
        return None, f"The teacher's KV takes {per_token:,} bytes a token on disk."
    total = per_token * num_samples * tokens_per_sample
    return total, f"The teacher's KV takes {total / 1e9:.3g} GB on disk: {per_token:,} bytes for each token."


def _require_positive(**sizes: object) -> None:
    for name, size in sizes.items():
        if size is not None:
            whole_number(name, size)
