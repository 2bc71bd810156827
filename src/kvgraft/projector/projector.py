"""All adapters of a run: teacher KV to the student's width, or the student's KV to each teacher's (SPEC R7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kvgraft.errors import ProjectorError
from kvgraft.kv import KV
from kvgraft.projector.adapters import Activation, ElasticBottleneck, InitMethod
from kvgraft.projector.layerwise import is_bare, project_layerwise
from kvgraft.projector.saving import CONFIG_FILE, WEIGHTS_FILE, read_config, read_weights, write_projector
from kvgraft.projector.settings import (
    Direction,
    Sharing,
    SourceKinds,
    SourceLayers,
    read_source_layers,
    read_teacher_config,
    require_sharing,
    whole_number,
)
from kvgraft.projector.sizing import auto_mlp_ratio
from kvgraft.projector.sources import AdapterInputs, Pair, as_pair, with_previous_tokens

_DIRECTIONS = {"teacher_to_student": "project_teacher_kv", "student_to_teacher": "project_student_kv"}


class KVDimensionProjector(nn.Module):
    """One adapter for the keys and one for the values of every teacher.

    Args:
        teacher_configs: ``{name: {"d_model": int, "num_layers": int, "kv_dim": int (optional)}}``; any name works.
            :func:`teacher_config_from` derives the inner part from a model.
        student_d_model: width of the student's KV.
        mlp_ratio: hidden width over input width (default 1.0), ``"linear"`` for one linear map, or ``"auto"`` for
            each teacher's by its width (:func:`kvgraft.projector.sizing.auto_mlp_ratio`).
        dropout: in [0, 1), default 0.1.
        init_method: ``xavier`` (default), ``kaiming``, ``normal``, ``identity`` (equal widths: the KV as it is), or
            ``least_squares``: adapters with a linear part that a calibration pass fits in closed form
            (:func:`kvgraft.fit.closed_form.fit_closed_form`).
        trainable: whether the adapters take gradients, default true.
        per_layer: short for ``sharing="per_layer"``.
        sharing: what the layers of a teacher have in common. ``shared`` (default): one adapter. ``per_layer``:
            nothing. ``grouped``: ``num_groups`` runs of consecutive layers have one adapter each. ``trunk``: the
            bottleneck's matrices are those of the layer's group, while norm, biases and linear part are its own.
        num_groups: for ``grouped`` and ``trunk``, default 1.
        direction: ``teacher_to_student`` (default) or ``student_to_teacher``.
        source_layers: for each teacher, the input layers (positions in what is passed in) that each output layer reads,
            as many for every output layer; their widths are joined. Default: each output layer reads its own.
        source_kinds: ``same`` (default): keys are made from keys, values from values. ``both``: each is made from keys
            and values together.
        context_tokens: tokens before each that its adapters read too, default none.
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
        sharing: Sharing | None = None,
        num_groups: int = 1,
        direction: Direction = "teacher_to_student",
        layer_norm: bool = True,
        activation: Activation = "silu",
        skip: bool = False,
        source_layers: SourceLayers | None = None,
        source_kinds: SourceKinds = "same",
        context_tokens: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(teacher_configs, Mapping) or not teacher_configs:
            raise ProjectorError(
                f'teacher_configs must be {{"name": {{"d_model": ..., "num_layers": ...}}}}; got {teacher_configs!r}'
            )
        if direction not in _DIRECTIONS:
            raise ProjectorError(f"direction must be one of {', '.join(_DIRECTIONS)}; got {direction!r}")
        self.teachers = {name: read_teacher_config(name, config) for name, config in teacher_configs.items()}
        self.student_d_model = whole_number("student_d_model", student_d_model)
        self.direction = direction
        self.sharing: Sharing = sharing or ("per_layer" if per_layer else "shared")
        self.source_kinds = source_kinds
        self.source_layers = read_source_layers(source_layers or {}, self.teachers)
        require_sharing(self.sharing, per_layer, num_groups, source_kinds)
        self.context_tokens = whole_number("context_tokens", context_tokens, least=0)
        self._settings: dict[str, Any] = {
            "mlp_ratio": mlp_ratio,
            "dropout": dropout,
            "init_method": init_method,
            "trainable": trainable,
            "sharing": self.sharing,
            "num_groups": num_groups,
            "direction": direction,
            "layer_norm": layer_norm,
            "activation": activation,
            "skip": skip,
            "source_layers": self.source_layers or None,
            "source_kinds": source_kinds,
            "context_tokens": context_tokens,
        }
        # Lists and not dicts: a module's name must not hold a dot, a teacher's may.
        self.key_adapters = nn.ModuleList(self._adapter(name) for name in self.teachers)
        self.value_adapters = nn.ModuleList(self._adapter(name) for name in self.teachers)
        self.requires_grad_(trainable)
        self._standardised: dict[str, list[str]] = {"input": [], "output": []}

    def standardise_outputs(self, teacher: str, mean: Tensor, deviation: Tensor) -> None:
        """Let ``teacher``'s adapters work in units of their target: outputs become ``mean + deviation * adapter(x)``.

        Keys and values have channels whose mean dwarfs their spread, and layers of very different spread. An adapter
        that had to learn both with one learning rate would spend its first steps on nothing else. Kept and saved as
        buffers; parameters are counted without them.

        Args:
            mean: ``[2, output layers, width]``, keys first.
            deviation: ``[2, output layers]``, above zero.
        """
        self._standardise("output", teacher, mean, deviation)

    def standardise_inputs(self, teacher: str, mean: Tensor, deviation: Tensor) -> None:
        """Let ``teacher``'s adapters see ``(x - mean) / deviation``: the norm then is not ruled by outlier channels.

        Kept and saved as buffers, as those of :meth:`standardise_outputs`.

        Args:
            mean: ``[2, input layers, width]``, keys first.
            deviation: the same shape, above zero.
        """
        self._standardise("input", teacher, mean, deviation)

    def _standardise(self, side: str, teacher: str, mean: Tensor, deviation: Tensor) -> None:
        means, deviations = self._standard_shapes(side, teacher)
        if tuple(mean.shape) != means or tuple(deviation.shape) != deviations:
            raise ProjectorError(
                f"{side}s for teacher {teacher!r} are standardised by a mean {list(means)} and a deviation "
                f"{list(deviations)}; got {list(mean.shape)} and {list(deviation.shape)}"
            )
        index = list(self.teachers).index(teacher)
        self.register_buffer(f"{side}_mean_{index}", mean.clone())
        self.register_buffer(f"{side}_deviation_{index}", deviation.clone())
        if teacher not in self._standardised[side]:
            self._standardised[side].append(teacher)

    def _standard_shapes(self, side: str, teacher: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of mean and deviation of one side."""
        key_adapter, _ = self.adapters(teacher)
        if side == "output":
            layers = self.num_output_layers(teacher)
            return (2, layers, key_adapter.out_dim), (2, layers)
        shape = (2, self.teachers[teacher].num_layers, self._input_width(teacher))
        return shape, shape

    def standard(self, side: str, teacher: str) -> Pair | None:
        """Mean and deviation of the ``"input"`` or ``"output"`` of ``teacher``'s adapters, or None where there is none.

        Shapes as in :meth:`standardise_inputs` and :meth:`standardise_outputs`.
        """
        if teacher not in self._standardised[side]:
            return None
        index = list(self.teachers).index(teacher)
        return self.get_buffer(f"{side}_mean_{index}"), self.get_buffer(f"{side}_deviation_{index}")

    def num_output_layers(self, teacher: str) -> int:
        """Layers that come out for ``teacher``: as many as go in, or as ``source_layers`` names."""
        sources = self.source_layers.get(teacher)
        return self.teachers[teacher].num_layers if sources is None else len(sources)

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

    def count_parameters(self) -> int:
        """Numbers in all adapters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def compute_in(self, dtype: torch.dtype) -> KVDimensionProjector:
        """Cast the adapters to ``dtype``, and give this projector back. For projecting: training wants float32.

        Bfloat16 halves the weights and, on processors that multiply in it, the time. Unlike with ``.to(dtype)``, what
        goes in and comes out is standardised in float32.
        """
        self.key_adapters.to(dtype)
        self.value_adapters.to(dtype)
        return self

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
        write_projector(Path(folder), weights, {"standardised": self._standardised, **self.config})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> KVDimensionProjector:
        """The projector that :meth:`save_pretrained` wrote, on the CPU and with dropout off.

        Raises:
            ProjectorError: a file is missing, damaged, or does not go with the other.
        """
        folder = Path(folder)
        config, weights = read_config(folder), read_weights(folder)
        try:
            with torch.device("meta"):
                standardised = config.pop("standardised")
                projector = cls(**config)
                for side, teachers in standardised.items():
                    for teacher in teachers:
                        shapes = projector._standard_shapes(side, teacher)
                        projector._standardise(side, teacher, *(torch.empty(shape) for shape in shapes))
            projector.load_state_dict(weights, assign=True)
        except (TypeError, AttributeError, KeyError, ProjectorError) as error:
            raise ProjectorError(f"{folder / CONFIG_FILE} is not a projector's configuration: {error}") from error
        except RuntimeError as error:
            raise ProjectorError(
                f"{folder / WEIGHTS_FILE} does not go with {CONFIG_FILE} beside it; copy both from one save. {error}"
            ) from error
        return projector.eval()

    def sources_of(self, teacher: str, keys: Tensor | KV | Pair, values: Tensor | None = None) -> Pair:
        """What the adapters of ``teacher`` read: input of the key adapter and of the value adapter.

        The arguments are those of :meth:`project_teacher_kv`, or of :meth:`project_student_kv` in that direction.
        Standardised where the projector is; ``[batch, output layers, tokens, in_dim]`` each.
        """
        checked = self._checked(teacher, *as_pair(teacher, keys, values))
        keys, values = (with_previous_tokens(part, self.context_tokens) for part in checked)
        return self.sources_of_rows(teacher, keys, values)

    def sources_of_rows(self, teacher: str, keys: Tensor, values: Tensor) -> Pair:
        """:meth:`sources_of` for tokens out of their text, which bring along the tokens before them.

        Both ``[batch, layers, tokens, width]`` as :func:`kvgraft.projector.sources.with_previous_tokens` gives them.
        """
        inputs = self.adapter_inputs(teacher, keys, values)
        return inputs.of_layers(range(inputs.num_layers))

    def adapter_inputs(self, teacher: str, keys: Tensor, values: Tensor) -> AdapterInputs:
        """What :meth:`sources_of_rows` joins: keys and values, standardised where the projector is, and which are read.

        Both as :meth:`sources_of_rows` takes them.
        """
        reach, sources = 1 + self.context_tokens, self.source_layers.get(teacher)
        layers = keys.shape[1] // reach
        standard = self.standard("input", teacher)
        if standard is not None:
            mean, deviation = (part[:, :layers, None].repeat(1, reach, 1, 1) for part in standard)
            keys, values = (keys - mean[0]).div_(deviation[0]), (values - mean[1]).div_(deviation[1])
        own = [[layer] for layer in range(layers)] if sources is None else sources
        read = [[layer + step * layers for step in range(reach) for layer in chosen] for chosen in own]
        return AdapterInputs(keys, values, read, self.source_kinds == "both")

    def targets_of(self, teacher: str, keys: Tensor, values: Tensor) -> Pair:
        """What the adapters of ``teacher`` have to give so that the projector gives ``keys`` and ``values``.

        Both ``[batch, output layers, tokens, width]``; standardised where the projector is.
        """
        standard = self.standard("output", teacher)
        if standard is None:
            return keys, values
        mean, deviation = standard[0][:, :, None], standard[1][:, :, None, None]
        return (keys - mean[0]) / deviation[0], (values - mean[1]) / deviation[1]

    def _input_width(self, teacher: str) -> int:
        """Width of one token's keys (or values) in one layer of what is passed in."""
        return self.teachers[teacher].width if self.direction == "teacher_to_student" else self.student_d_model

    def _adapter(self, name: str) -> ElasticBottleneck:
        teacher, settings = self.teachers[name], self._settings
        layers, groups = self.num_output_layers(name), settings["num_groups"]
        num_sources = len(self.source_layers[name][0]) if name in self.source_layers else 1
        kinds = 1 if self.source_kinds == "same" else 2
        ratio = auto_mlp_ratio(teacher.width) if settings["mlp_ratio"] == "auto" else settings["mlp_ratio"]
        if groups > layers:
            raise ProjectorError(f"num_groups {groups} is more than the {layers} layers of teacher {name!r}")
        return ElasticBottleneck(
            self._input_width(name) * num_sources * kinds * (1 + self.context_tokens),
            self.student_d_model if self.direction == "teacher_to_student" else teacher.width,
            ratio,
            settings["dropout"],
            settings["init_method"],
            {"shared": 1, "grouped": groups}.get(self.sharing, layers),
            settings["layer_norm"],
            settings["activation"],
            settings["skip"],
            groups if self.sharing == "trunk" else None,
        )

    def _project(self, direction: Direction, teacher: str, keys: Tensor | KV | Pair, values: Tensor | None) -> Pair:
        if direction != self.direction:
            raise ProjectorError(
                f"{_DIRECTIONS[direction]} needs a projector with direction={direction!r}; this one was built for "
                f"{self.direction!r}, whose method is {_DIRECTIONS[self.direction]}"
            )
        adapters = self.adapters(teacher)  # refuses a teacher it does not know
        checked = self._checked(teacher, *as_pair(teacher, keys, values))
        inputs = self.adapter_inputs(teacher, *(with_previous_tokens(part, self.context_tokens) for part in checked))
        standard = self.standard("output", teacher)
        if not torch.is_grad_enabled() and all(map(is_bare, adapters)):
            return project_layerwise(adapters, inputs, standard)
        sources = inputs.of_layers(range(inputs.num_layers))
        outputs = adapters[0](sources[0]), adapters[1](sources[1])
        if standard is None:
            return outputs
        mean, deviation = standard[0][:, : inputs.num_layers, None], standard[1][:, : inputs.num_layers, None, None]
        return mean[0] + deviation[0] * outputs[0], mean[1] + deviation[1] * outputs[1]

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
        teacher, given, expected = self.teachers[name], keys.shape[3], self._input_width(name)
        if given != expected:
            raise ProjectorError(self._width_message(name, given, expected))
        # A shared adapter also takes KV whose layers were mapped to a shallower student's, as the guide's loop does.
        fewer_layers = self.sharing == "shared" and name not in self.source_layers
        if keys.shape[1] != teacher.num_layers and not (fewer_layers and keys.shape[1] < teacher.num_layers):
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
