"""Students cut from a larger model: some of its layers, with its embeddings, norms and head."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kvgraft.align.layers import uniform_layer_map
from kvgraft.errors import ModelError
from kvgraft.models.decoder import decoder_of
from kvgraft.models.geometry import depth_of, kv_geometry, kv_layers
from kvgraft.models.rotary import forget_rotations

# Settings under which what a layer computes depends on its place among the others.
_BY_PLACE = ("scale_attn_by_inverse_layer_idx", "num_kv_shared_layers", "is_heterogeneous")
# Settings that say of how many layers, from the first on, something holds; here that their MLP has no experts.
_FROM_THE_FIRST = ("first_k_dense_replace", "num_dense_layers")


def chosen_layers(depth: int, layers: Sequence[int] | int | None = None, every: int | None = None) -> list[int]:
    """Layers of a model of ``depth`` layers that a student keeps, in order.

    Args:
        depth: layers of the model.
        layers: which, counted from 0, or how many, spread evenly with both ends kept.
        every: in place of ``layers``, every so many, from the first.

    Raises:
        ModelError: neither or both were given, or layers that the model does not have, twice or out of order.
    """
    if (layers is None) == (every is None):
        raise ModelError("say which layers to keep: either `layers` (a list, or how many) or `every`")
    if every is not None:
        chosen = list(range(0, depth, every)) if every > 0 else []
    elif isinstance(layers, int):
        chosen = uniform_layer_map(depth, layers) if 0 < layers <= depth else []
    else:
        chosen = list(layers or ())
    in_order = chosen == sorted(set(chosen))
    if not chosen or not in_order or chosen[0] < 0 or chosen[-1] >= depth:
        given = f"every {every}" if every is not None else f"layers {layers}"
        raise ModelError(f"cannot keep {given} of {depth} layers: give layers 0..{depth - 1} in order, each once")
    return chosen


def cut_config(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The config of a model of ``config`` that keeps ``layers``; settings that follow the layers are cut too.

    It notes where its layers came from: ``origin_layers``, and ``origin_num_layers`` of the whole model.

    Raises:
        ModelError: layers of this architecture compute something else in another place, or none of ``layers`` holds KV.
    """
    made = copy.deepcopy(config)
    text = made.get_text_config()
    depth = depth_of(config)
    by_place = [name for name in _BY_PLACE if getattr(text, name, None)]
    if by_place:
        raise ModelError(
            f"a {text.model_type} with {', '.join(by_place)} cannot be cut: its layers depend on their place"
        )
    holding = kv_layers(config)
    if not set(layers) & set(holding):
        raise ModelError(f"layers {list(layers)} hold no KV, which is in layers {list(holding)}; keep one of those")
    settings = {
        name: [value[layer] for layer in layers]
        for name, value in vars(text).items()
        if isinstance(value, list | tuple) and len(value) == depth and not name.endswith("_id")
    }
    settings |= {
        name: sum(layer < getattr(text, name) for layer in layers)
        for name in _FROM_THE_FIRST
        if isinstance(getattr(text, name, None), int)
    }
    text.num_hidden_layers = len(layers)
    for name, value in settings.items():
        setattr(text, name, value)
    text.origin_layers, text.origin_num_layers = list(layers), depth
    return made


def origin_layers(student: PretrainedConfig, teacher: PretrainedConfig) -> list[int] | None:
    """For each layer of a cut student that holds KV the one of ``teacher`` that it was, or None.

    None where the student was not cut, or from a model of another architecture, depth or KV width.
    """
    own, other = student.get_text_config(), teacher.get_text_config()
    layers: list[int] | None = getattr(own, "origin_layers", None)
    if layers is None or len(layers) != own.num_hidden_layers:
        return None
    geometry, whole = kv_geometry(student), kv_geometry(teacher)
    same = (own.model_type, own.origin_num_layers, geometry.num_kv_heads, geometry.head_dim) == (
        other.model_type,
        depth_of(teacher),
        whole.num_kv_heads,
        whole.head_dim,
    )
    if not same:
        return None
    holding = kv_layers(teacher)
    return [holding.index(layers[place]) for place in kv_layers(student)]


def cut_model(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """``model`` with ``layers`` alone, changed in place: nothing is copied and no weight changes.

    Raises:
        ModelError: an architecture whose layers are not one list, or that would be another model once saved.
    """
    depth = depth_of(model.config)
    whole, made = model.config, cut_config(model.config, layers)
    stack = layer_stack(model, depth)
    kept = [stack[layer] for layer in layers]
    del stack[:]
    stack.extend(kept)
    for place, layer in enumerate(kept):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # type: ignore[assignment]
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is whole:
            module.config = made
        elif config is not None and config is whole.get_text_config():
            module.config = made.get_text_config()
    forget_rotations(model)
    require_same_from_config(model)
    return model


def layer_stack(model: PreTrainedModel, depth: int) -> nn.ModuleList:
    """The list of the ``depth`` layers of ``model``; ModelError where it has none."""
    stacks = [
        module for module in decoder_of(model).children() if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if len(stacks) != 1:
        raise ModelError(
            f"{type(model).__name__} cannot be cut: its {depth} layers are not one list of modules; use an "
            "architecture such as Llama, Qwen, Mistral, Gemma, Phi or GPT-2"
        )
    return stacks[0]


def require_same_from_config(model: PreTrainedModel) -> None:
    """Refuse a cut model that its own config would build otherwise, as it would be after saving and loading."""
    ours = _settings(model)
    try:
        with torch.device("meta"):
            theirs = _settings(type(model)(type(model.config).from_dict(model.config.to_dict())))
    except Exception as error:  # architectures check their configs as they like
        raise ModelError(f"{type(model).__name__} cannot be cut: its config allows no such layers: {error}") from error
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differing:
        raise ModelError(
            f"{type(model).__name__} cannot be cut: its config would make something else of {', '.join(differing[:3])}"
        )


def _settings(model: PreTrainedModel) -> dict[str, object]:
    """What decides a model's function: shapes of all weights, and the plain attributes of every layer's modules."""
    found: dict[str, object] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for place, layer in enumerate(layer_stack(model, depth_of(model.config))):
        for name, module in layer.named_modules(prefix=f"layer {place}"):
            for attribute, value in vars(module).items():
                if attribute[0] != "_" and attribute != "training" and isinstance(value, int | float | str | None):
                    found[f"{name}.{attribute}"] = value
    return found
