"""All adapters of a run: teacher KV to the student's width, or the student's KV to each teacher's (SPEC R7)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvgraft.errors import ProjectorError
from kvgraft.kv import KV
from kvgraft.projector.adapters import Activation, ElasticBottleneck, InitMethod
from kvgraft.projector.sizing import auto_mlp_ratio

Direction = Literal["teacher_to_student", "student_to_teacher"]
Pair = tuple[Tensor, Tensor]

WEIGHTS_FILE = "projector.safetensors"
CONFIG_FILE = "config.json"
FORMAT_VERSION = 1

_DIRECTIONS = {"teacher_to_student": "project_teacher_kv", "student_to_teacher": "project_student_kv"}


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


class KVDimensionProjector(nn.Module):
    """One adapter for the keys and one for the values of every teacher.

    Args:
        teacher_configs: ``{name: {"d_model": int, "num_layers": int, "kv_dim": int (optional)}}``; any name works.
            :func:`teacher_config_from` derives the inner part from a model.
        student_d_model: width of the student's KV.
        mlp_ratio: hidden width over input width (default 1.0), ``"linear"`` for one linear map, or ``"auto"`` for
            each teacher's by its width (:func:`kvgraft.projector.sizing.auto_mlp_ratio`).
        dropout: in [0, 1), default 0.1.
        init_method: ``xavier`` (default), ``kaiming`` or ``normal``.
        trainable: whether the adapters take gradients, default true.
        per_layer: one adapter per layer instead of one shared by all layers of a teacher.
        direction: ``teacher_to_student`` (default) or ``student_to_teacher``.
        layer_norm, activation, skip: see :class:`ElasticBottleneck`.

    Raises:
        ProjectorError: no teacher, or a setting out of its range.
    """

    def __init__(
        self,
        teacher_configs: Mapping[str, Mapping[str, int]],
        student_d_model: int,
        mlp_ratio: float | Literal["linear", "auto"] = 1.0,
        dropout: float = 0.1,
        init_method: InitMethod = "xavier",
        trainable: bool = True,
        *,
        per_layer: bool = False,
        direction: Direction = "teacher_to_student",
        layer_norm: bool = True,
        activation: Activation = "silu",
        skip: bool = False,
    ) -> None:
        super().__init__()
        if not teacher_configs:
            raise ProjectorError('teacher_configs is empty: give {"name": {"d_model": ..., "num_layers": ...}}')
        if direction not in _DIRECTIONS:
            raise ProjectorError(f"direction must be one of {', '.join(_DIRECTIONS)}; got {direction!r}")
        self.teachers = {name: _teacher_config(name, config) for name, config in teacher_configs.items()}
        self.student_d_model = _whole_number("student_d_model", student_d_model)
        self.direction = direction
        self.per_layer = per_layer
        self._settings: dict[str, Any] = {
            "mlp_ratio": mlp_ratio,
            "dropout": dropout,
            "init_method": init_method,
            "trainable": trainable,
            "per_layer": per_layer,
            "direction": direction,
            "layer_norm": layer_norm,
            "activation": activation,
            "skip": skip,
        }
        # Lists and not dicts: a module's name must not hold a dot, a teacher's may.
        self.key_adapters = nn.ModuleList(self._adapter(teacher) for teacher in self.teachers.values())
        self.value_adapters = nn.ModuleList(self._adapter(teacher) for teacher in self.teachers.values())
        self.requires_grad_(trainable)
        self._standardised: list[str] = []

    def standardise_outputs(self, teacher: str, mean: Tensor, deviation: Tensor) -> None:
        """Let ``teacher``'s adapters work in units of their target: outputs become ``mean + deviation * adapter(x)``.

        Keys and values have channels whose mean dwarfs their spread, and layers of very different spread. An adapter
        that had to learn both with one learning rate would spend its first steps on nothing else. Kept and saved as
        buffers; parameters are counted without them.

        Args:
            mean: ``[2, num_layers, width]``, keys first.
            deviation: ``[2, num_layers]``, above zero.
        """
        key_adapter, _ = self.adapters(teacher)
        layers = self.teachers[teacher].num_layers
        if mean.shape != (2, layers, key_adapter.out_dim) or deviation.shape != (2, layers):
            raise ProjectorError(
                f"outputs for teacher {teacher!r} are standardised by a mean [2, {layers}, {key_adapter.out_dim}] and "
                f"a deviation [2, {layers}]; got {list(mean.shape)} and {list(deviation.shape)}"
            )
        index = list(self.teachers).index(teacher)
        self.register_buffer(f"output_mean_{index}", mean.clone())
        self.register_buffer(f"output_deviation_{index}", deviation.clone())
        if teacher not in self._standardised:
            self._standardised.append(teacher)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, fit for JSON."""
        teachers = {
            name: {field: size for field, size in asdict(teacher).items() if size is not None}
            for name, teacher in self.teachers.items()
        }
        return {"teacher_configs": teachers, "student_d_model": self.student_d_model, **self._settings}

    def adapters(self, teacher: str) -> tuple[ElasticBottleneck, ElasticBottleneck]:
        """The key adapter and the value adapter of ``teacher``."""
        if teacher not in self.teachers:
            raise ProjectorError(f"no adapter for teacher {teacher!r}; this projector knows {', '.join(self.teachers)}")
        index = list(self.teachers).index(teacher)
        return self.key_adapters[index], self.value_adapters[index]  # type: ignore[return-value]

    def project_teacher_kv(self, teacher: str, keys: Tensor | KV | Pair, values: Tensor | None = None) -> Pair:
        """A teacher's KV in the student's width: keys and values ``[batch, layers, tokens, student_d_model]``.

        Args:
            teacher: its name in ``teacher_configs``.
            keys: ``[batch, layers, tokens, width]`` or ``[batch, layers, heads, tokens, head_dim]``, or a ``KV`` or a
                pair that holds the values too.
            values: the same shape as ``keys``; left out where ``keys`` holds both.

        Raises:
            ProjectorError: an unknown teacher, a shape it was not built for, or a projector of the other direction.
        """
        return self._project("teacher_to_student", teacher, keys, values)

    def project_multi_teacher_kv(self, teacher_kvs: Mapping[str, KV | Pair]) -> dict[str, Pair]:
        """:meth:`project_teacher_kv` for ``{name: (keys, values)}`` or ``{name: KV}``, in the order given."""
        return {name: self.project_teacher_kv(name, pair) for name, pair in teacher_kvs.items()}

    def project_student_kv(self, teacher: str, keys: Tensor | KV | Pair, values: Tensor | None = None) -> Pair:
        """The student's KV in ``teacher``'s width: keys and values ``[batch, layers, tokens, teacher width]``.

        The arguments are those of :meth:`project_teacher_kv`, of the student's width and with one layer for each of
        the teacher's ``num_layers``.
        """
        return self._project("student_to_teacher", teacher, keys, values)

    def count_parameters(self, trainable_only: bool = False) -> int:
        """Numbers in all adapters, or in those that take gradients."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write ``projector.safetensors`` and ``config.json`` into ``folder``.

        Args:
            folder: created where it is missing; files of the same names are replaced whole.
            state_dict: weights gathered elsewhere (sharded training); default this module's.
        """
        weights = self.state_dict() if state_dict is None else state_dict
        differing = sorted(set(weights) ^ set(self.state_dict()))
        if differing:
            raise ProjectorError(f"state_dict does not hold this projector's weights; differing names: {differing[:5]}")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The configuration goes last: a first save that was cut short has none, and loading refuses it.
        temporary = folder / f"{WEIGHTS_FILE}.tmp"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, temporary)
        os.replace(temporary, folder / WEIGHTS_FILE)
        temporary = folder / f"{CONFIG_FILE}.tmp"
        written = {"format_version": FORMAT_VERSION, "standardised": self._standardised, **self.config}
        temporary.write_text(json.dumps(written, indent=2), encoding="utf-8")
        os.replace(temporary, folder / CONFIG_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> KVDimensionProjector:
        """The projector that :meth:`save_pretrained` wrote, on the CPU.

        Raises:
            ProjectorError: a file is missing, damaged, or does not go with the other.
        """
        folder = Path(folder)
        config, weights = _read_config(folder), _read_weights(folder)
        try:
            with torch.device("meta"):
                standardised = config.pop("standardised", [])
                projector = cls(**config)
                for teacher in standardised:
                    layers = projector.teachers[teacher].num_layers
                    width = projector.adapters(teacher)[0].out_dim
                    projector.standardise_outputs(teacher, torch.empty(2, layers, width), torch.empty(2, layers))
            projector.load_state_dict(weights, assign=True)
        except (TypeError, AttributeError) as error:
            raise ProjectorError(f"{folder / CONFIG_FILE} is not a projector's configuration: {error}") from error
        except RuntimeError as error:
            raise ProjectorError(
                f"{folder / WEIGHTS_FILE} does not go with {CONFIG_FILE} beside it; copy both from one save. {error}"
            ) from error
        return projector

    def _adapter(self, teacher: TeacherConfig) -> ElasticBottleneck:
        widths = (teacher.width, self.student_d_model)
        in_dim, out_dim = widths if self.direction == "teacher_to_student" else widths[::-1]
        settings = self._settings
        ratio = auto_mlp_ratio(teacher.width) if settings["mlp_ratio"] == "auto" else settings["mlp_ratio"]
        return ElasticBottleneck(
            in_dim,
            out_dim,
            ratio,
            settings["dropout"],
            settings["init_method"],
            teacher.num_layers if settings["per_layer"] else 1,
            settings["layer_norm"],
            settings["activation"],
            settings["skip"],
        )

    def _project(self, direction: Direction, teacher: str, keys: Tensor | KV | Pair, values: Tensor | None) -> Pair:
        if direction != self.direction:
            raise ProjectorError(
                f"{_DIRECTIONS[direction]} needs a projector with direction={direction!r}; this one was built for "
                f"{self.direction!r}, whose method is {_DIRECTIONS[self.direction]}"
            )
        key_adapter, value_adapter = self.adapters(teacher)
        keys, values = self._checked(teacher, *_as_pair(teacher, keys, values))
        outputs = key_adapter(keys), value_adapter(values)
        return self._in_target_units(teacher, outputs) if teacher in self._standardised else outputs

    def _in_target_units(self, teacher: str, outputs: Pair) -> Pair:
        index, layers = list(self.teachers).index(teacher), outputs[0].shape[1]
        mean = self.get_buffer(f"output_mean_{index}")[:, :layers, None]
        deviation = self.get_buffer(f"output_deviation_{index}")[:, :layers, None, None]
        keys, values = (mean[kind] + deviation[kind] * output for kind, output in enumerate(outputs))
        return keys, values

    def _checked(self, name: str, keys: Tensor, values: Tensor) -> Pair:
        """Keys and values with joined heads, of the width and layers that the adapters of ``name`` take."""
        if keys.shape != values.shape:
            raise ProjectorError(
                f"keys {list(keys.shape)} and values {list(values.shape)} for teacher {name!r} must share one shape"
            )
        if keys.dim() not in (4, 5):
            raise ProjectorError(
                f"KV for teacher {name!r} must be [batch, layers, tokens, width] or [batch, layers, heads, tokens, "
                f"head_dim]; got {list(keys.shape)}"
            )
        if keys.dim() == 5:
            keys, values = keys.transpose(2, 3).flatten(3), values.transpose(2, 3).flatten(3)
        teacher, given = self.teachers[name], keys.shape[3]
        expected = teacher.width if self.direction == "teacher_to_student" else self.student_d_model
        if given != expected:
            raise ProjectorError(self._width_message(name, given, expected))
        # A shared adapter also takes KV whose layers were mapped to a shallower student's, as the guide's loop does.
        if keys.shape[1] != teacher.num_layers and (self.per_layer or keys.shape[1] > teacher.num_layers):
            raise ProjectorError(
                f"KV for teacher {name!r} has {keys.shape[1]} layers; its adapters were built for num_layers="
                f"{teacher.num_layers}. Pass one KV layer for each, or set num_layers in teacher_configs to the number "
                "of layers that are passed in."
            )
        return keys, values

    def _width_message(self, name: str, given: int, expected: int) -> str:
        reason = (
            "Under grouped-query attention kv_dim = num_kv_heads * head_dim is smaller than d_model: the width of the "
            "KV counts, not the hidden size."
        )
        if self.direction == "student_to_teacher":
            return (
                f"the student's KV for teacher {name!r} is {given} wide, but student_d_model is {expected}. {reason} "
                f"Build the projector with student_d_model={given}."
            )
        d_model = self.teachers[name].d_model
        message = f"KV of teacher {name!r} is {given} wide, but its adapters take {expected} (d_model {d_model}). "
        if given == d_model:
            return message + f"{given} is the hidden size d_model, not the KV's width kv_dim={expected}: pass the KV."
        return message + f'{reason} Use teacher_config_from(model), or add "kv_dim": {given} to its teacher_configs.'


def teacher_config_from(model_or_config: Any) -> dict[str, int]:
    """``{"d_model", "num_layers", "kv_dim"}`` of a transformers model or its configuration (SPEC R1)."""
    # Here and not above: the projector itself needs no transformers.
    from kvgraft.models.capture import kv_geometry

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


def _as_pair(teacher: str, keys: Tensor | KV | Pair, values: Tensor | None) -> Pair:
    if isinstance(keys, KV) and values is None:
        return keys.flatten()
    if isinstance(keys, tuple | list) and len(keys) == 2 and values is None:
        keys, values = keys
    if isinstance(keys, Tensor) and isinstance(values, Tensor):
        return keys, values
    raise ProjectorError(
        f"KV for teacher {teacher!r} must be two tensors (keys, values) or one KV; got {type(keys).__name__} and "
        f"{type(values).__name__}"
    )


def _teacher_config(name: str, config: Mapping[str, int]) -> TeacherConfig:
    allowed = {"d_model", "num_layers", "kv_dim"}
    if not isinstance(config, Mapping) or not {"d_model", "num_layers"} <= set(config) <= allowed:
        raise ProjectorError(
            f'the config of teacher {name!r} must be {{"d_model": int, "num_layers": int}}, with "kv_dim" at will; '
            f"got {config!r}"
        )
    for field, size in config.items():
        _whole_number(f"{field} of teacher {name!r}", size)
    return TeacherConfig(**config)


def _whole_number(name: str, size: object) -> int:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ProjectorError(f"{name} must be a whole number of at least 1; got {size!r}")
    return size


def _read_config(folder: Path) -> dict[str, Any]:
    path = _existing(folder, CONFIG_FILE)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProjectorError(f"{path} is not JSON: {error}") from error
    version = config.pop("format_version", None) if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise ProjectorError(
            f"{path} has format_version {version}; this kvgraft reads {FORMAT_VERSION}. Save the projector again with "
            "KVDimensionProjector.save_pretrained."
        )
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = _existing(folder, WEIGHTS_FILE)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ProjectorError(f"{path} is damaged or not a safetensors file: {error}") from error


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise ProjectorError(f"no {name} in {folder}: give the folder that KVDimensionProjector.save_pretrained wrote")
    return path
