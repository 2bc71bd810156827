"""What a projector is built from: its teachers, and the settings that say what it reads and what its layers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kvgraft.errors import ProjectorError

Direction = Literal["teacher_to_student", "student_to_teacher"]
Sharing = Literal["shared", "per_layer", "grouped", "trunk"]
SourceKinds = Literal["same", "both"]
SourceLayers = Mapping[str, Sequence[Sequence[int]]]


@dataclass(frozen=True)
class TeacherConfig:
    """What the projector knows of one teacher.

    Attributes:
        d_model: hidden size, and the width of the KV where ``kv_dim`` is not given.
        num_layers: layers of the KV that is passed in.
        kv_dim: width of the KV, ``num_kv_heads * head_dim``; default ``d_model``.
    """

    d_model: int
    num_layers: int
    kv_dim: int | None = None

    @property
    def width(self) -> int:
        """Width of one token's keys (or values) in one layer."""
        return self.d_model if self.kv_dim is None else self.kv_dim


def teacher_config_from(model_or_config: Any) -> dict[str, int]:
    """``{"d_model", "num_layers", "kv_dim"}`` of a transformers model or its configuration (SPEC R1)."""
    # Here and not above: the projector itself needs no transformers.
    from kvgraft.models.geometry import kv_geometry

    config = getattr(model_or_config, "config", model_or_config)
    if not hasattr(config, "get_text_config"):
        raise ProjectorError(
            f"teacher_config_from takes a transformers model or its configuration; got {type(model_or_config).__name__}"
        )
    geometry = kv_geometry(config)
    return {
        "d_model": config.get_text_config().hidden_size,
        "num_layers": geometry.num_layers,
        "kv_dim": geometry.kv_dim,
    }


def read_teacher_config(name: str, config: Mapping[str, int]) -> TeacherConfig:
    allowed = {"d_model", "num_layers", "kv_dim"}
    if not isinstance(config, Mapping) or not {"d_model", "num_layers"} <= set(config) <= allowed:
        raise ProjectorError(
            f'the config of teacher {name!r} must be {{"d_model": int, "num_layers": int}}, with "kv_dim" at will; '
            f"got {config!r}"
        )
    for field, size in config.items():
        whole_number(f"{field} of teacher {name!r}", size)
    return TeacherConfig(**config)


def read_source_layers(sources: SourceLayers, teachers: Mapping[str, TeacherConfig]) -> dict[str, list[list[int]]]:
    if not isinstance(sources, Mapping) or not all(isinstance(layers, Sequence) for layers in sources.values()):
        raise ProjectorError(
            f'source_layers must be {{"name": a list of input layers for every output layer}}, such as '
            f'{{"big": [[0], [2]]}}; got {sources!r}'
        )
    unknown = sorted(set(sources) - set(teachers))
    if unknown:
        raise ProjectorError(f"source_layers names teachers {unknown}; this projector has {', '.join(teachers)}")
    for name, layers in sources.items():
        if not all(isinstance(chosen, Sequence) for chosen in layers):
            raise ProjectorError(
                f"source_layers of teacher {name!r} must be a list of input layers for every output layer, such as "
                f"[[0], [2]]; got {list(layers)}"
            )
        counts, found = {len(chosen) for chosen in layers}, {layer for chosen in layers for layer in chosen}
        last = teachers[name].num_layers - 1
        if len(counts) != 1 or counts == {0} or not found <= set(range(last + 1)):
            raise ProjectorError(
                f"source_layers of teacher {name!r} must give every output layer equally many of the input layers "
                f"0..{last}; got {[list(chosen) for chosen in layers]}"
            )
    return {name: [list(chosen) for chosen in layers] for name, layers in sources.items()}


def require_sharing(sharing: str, per_layer: bool, num_groups: int, source_kinds: str) -> None:
    for name, value, allowed in (
        ("sharing", sharing, get_args(Sharing)),
        ("source_kinds", source_kinds, get_args(SourceKinds)),
    ):
        if value not in allowed:
            raise ProjectorError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    if per_layer and sharing != "per_layer":
        raise ProjectorError(f"per_layer=True and sharing={sharing!r} contradict each other; give sharing alone")
    whole_number("num_groups", num_groups)


def whole_number(name: str, size: object, least: int = 1) -> int:
    """``size`` where it is a whole number of at least ``least``; otherwise an error that names it."""
    if not isinstance(size, int) or isinstance(size, bool) or size < least:
        raise ProjectorError(f"{name} must be a whole number of at least {least}; got {size!r}")
    return size
