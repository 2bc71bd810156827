"""Which architectures of the installed transformers can be captured, cut and grafted?

    python benchmarks/architectures.py

Every model type that transformers has as a causal language model is built small, with random weights, and captured on
two texts, one padded on the right. Captured means: keys turned by the model's own rotation again, and values, are what
its own cache holds, in every layer that counts, to 1e-4 of the largest number. Those that are captured are cut to two
layers and run, and go on from a cache of their own captured KV: exact means the logits of plain decoding, to 1e-4
likewise. Types that a few settings do not make small, or that do not run as they are, are not tried; nothing is said of
their worth.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvgraft.errors import KVGraftError, ModelError
from kvgraft.graft import cache_from_kv
from kvgraft.models.capture import capture, record_kv
from kvgraft.models.cut import cut_model
from kvgraft.models.geometry import depth_of, kv_geometry, kv_layers
from kvgraft.models.interception import attention_layers
from kvgraft.models.latent import cache_entry
from kvgraft.models.loading import model_without_weights
from kvgraft.models.rope import rotate

VOCABULARY, MOST_PARAMETERS, TOLERANCE = 97, 30_000_000, 1e-4
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 2,
    "num_local_experts": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "num_dense_layers": 1,
    "rotary_dim": 4,
    "decoder_layers": 4,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
# What else makes a type small, where its defaults are for as many layers as its authors' model has.
SMALL_BY_TYPE: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "mlp_layer_types": ["dense"] * 4},
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2, "mlp_layer_types": ["dense"] * 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48, "zero_expert_num": 2},
}


class NotTriedError(Exception):
    """A model that was not made small, or does not run by itself."""


@dataclass(frozen=True)
class Outcome:
    """What becomes of a model type, in a few words each; a cut and a graft are tried of what is captured."""

    kv: str
    cut: str = ""
    graft: str = ""


def main() -> None:
    """Print the types by what became of them."""
    transformers.logging.set_verbosity_error()
    outcomes: dict[str, list[str]] = defaultdict(list)
    console = Console()
    for model_type in track(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), console=Console(stderr=True)):
        outcome = outcome_of(model_type)
        outcomes[outcome.kv].append(model_type)
        for name, found in (("cut", outcome.cut), ("graft", outcome.graft)):
            if found:
                outcomes[f"{name}: {found}"].append(model_type)
    console.print(f"transformers {transformers.__version__}, {len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} model types")
    for outcome, types in sorted(outcomes.items(), key=lambda item: -len(item[1])):
        console.print(f"\n{outcome} ({len(types)}): {', '.join(types)}", highlight=False)


def outcome_of(model_type: str) -> Outcome:
    """What becomes of ``model_type``."""
    try:
        model = small_model(model_type)
        input_ids, mask, cache = own_cache(model)
    except NotTriedError as error:
        return Outcome(f"not tried: {error}")
    kv = capture_outcome(model, input_ids, mask, cache)
    if not kv.startswith("captured"):
        return Outcome(kv)
    # A cut changes the model.
    return Outcome(kv, graft=graft_outcome(model, input_ids), cut=cut_outcome(model, input_ids))


def capture_outcome(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, cache: list[Any]) -> str:
    """Whether KV of ``model`` is that of its own ``cache``."""
    try:
        difference = difference_from_own(model, input_ids, mask, cache)
    except ModelError as error:
        return f"refused: {_reason(str(error))}"
    if difference is None:
        return "captured, without a cache to compare with"
    if not difference < TOLERANCE:
        return "captured otherwise than its own cache"
    holding, depth = len(kv_layers(model.config)), depth_of(model.config)
    return "captured" if holding == depth else "captured in the layers that hold KV alike"


@torch.no_grad()
def graft_outcome(model: PreTrainedModel, input_ids: Tensor) -> str:
    """Whether ``model`` goes on from a cache of its own KV as from the text."""
    text, following = input_ids[:, :-3], input_ids[:, -3:]
    try:
        cache = cache_from_kv(model, capture(model, text))
    except KVGraftError as error:
        return f"refused: {_reason(str(error))}"
    logits = model(**cache.forward_inputs(following)).logits
    plain = model(input_ids=input_ids, use_cache=False).logits[:, -3:]
    return "exact" if float((logits - plain).abs().max() / plain.abs().max()) < TOLERANCE else "otherwise than decoding"


@torch.no_grad()
def cut_outcome(model: PreTrainedModel, input_ids: Tensor) -> str:
    """Whether ``model`` runs with its first layer and its last that holds KV."""
    try:
        student = cut_model(model, sorted({0, kv_layers(model.config)[-1]}))
    except ModelError as error:
        return f"refused: {_reason(str(error))}"
    student(input_ids=input_ids, use_cache=False)
    return "runs"


def small_model(model_type: str) -> PreTrainedModel:
    """A model of ``model_type`` with random weights."""
    try:
        config = AutoConfig.for_model(model_type, **known_fields(CONFIG_MAPPING[model_type]))
        text = config.get_text_config()
        for name in config.sub_configs:
            if getattr(config, name) is text:
                setattr(config, name, type(text)(**known_fields(type(text))))
        if model_without_weights(config).num_parameters() > MOST_PARAMETERS:
            raise NotTriedError("not small by these settings")
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    except NotTriedError:
        raise
    except Exception as error:  # architectures check their settings as they like
        raise NotTriedError("not built by these settings") from error
    # Sharp enough for a wrong rotation or a look at later tokens to show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def known_fields(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """Those of ``SMALL`` that configs of this kind have, under their own names."""
    try:
        known = config_class().to_dict()
    except Exception:  # a config without defaults knows all
        return SMALL
    names = getattr(config_class, "attribute_map", {})
    fields = {name: size for name, size in SMALL.items() if names.get(name, name) in known}
    if "kv_lora_rank" in fields:  # all heads read one latent, so that there are no groups of them
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if known.get("multi_query"):
        fields.pop("num_key_value_heads", None)
    return fields | SMALL_BY_TYPE.get(config_class.model_type, {})


@torch.no_grad()
def own_cache(model: PreTrainedModel) -> tuple[Tensor, Tensor, list[Any]]:
    """Two texts, their mask and the layers of the cache that ``model`` itself makes of them."""
    torch.manual_seed(1)
    input_ids = torch.randint(3, VOCABULARY, (2, 11))
    mask = torch.ones_like(input_ids)
    mask[1, 8:] = 0
    try:
        output = model(input_ids=input_ids, attention_mask=mask, use_cache=True)
    except Exception as error:  # as above
        raise NotTriedError("does not run by these settings") from error
    # A model without attention has a cache of another name or kind.
    return input_ids, mask, list(getattr(getattr(output, "past_key_values", None), "layers", ()))


def difference_from_own(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, cache: list[Any]) -> float | None:
    """What is captured beside what stands in ``cache``, where tokens are real; None without.

    The largest difference, over the largest number there.
    """
    kv = capture(model, input_ids, mask)
    if not cache:
        return None
    assert kv.geometry == kv_geometry(model.config)
    with torch.no_grad(), record_kv(model) as recorder:
        model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    real, largest, scale = mask.bool()[:, None, :, None], 0.0, 0.0
    modules = {layer: module for module, layer in attention_layers(model).items()}
    for layer, place in enumerate(kv_layers(model.config)):
        rotation = recorder.rotation(layer)
        keys = kv.keys[:, layer] if rotation is None else rotate(kv.keys[:, layer], *rotation)
        keys, values = cache_entry(modules[layer], keys, kv.values[:, layer])
        for ours, theirs in ((keys, cache[place].keys), (values, cache[place].values)):
            # A window's cache holds the last tokens only.
            kept = theirs.shape[2]
            largest = max(largest, float(((ours[:, :, -kept:] - theirs) * real[:, :, -kept:]).abs().max()))
            scale = max(scale, float((theirs * real[:, :, -kept:]).abs().max()))
    return largest / scale


def _reason(message: str) -> str:
    """What an error comes down to, without the model's name."""
    for part, reason in (
        ("do not pass keys and values", "its attention is not called through transformers' interface"),
        ("compressed or uneven", "keys and values of other widths than its config says"),
        ("does not hand cosines", "rotates keys without handing cosines and sines to its layers"),
        ("rotates in a way", "rotates keys in a way that is not covered"),
        ("depend on the tokens behind", "keys depend on what comes after them, or on other positions"),
        ("more than once", "attends more than once in a layer"),
        ("names no layer", "no attention"),
        ("its own holds", "its cache holds more than keys and values"),
        ("do so in one shape", "not all of its layers hold KV alike"),
        ("one list of modules", "its layers are not one list"),
        ("allows no such layers", "its config allows no such layers"),
        ("make something else", "its layers depend on how many there are, or on their place"),
        ("depend on their place", "its layers depend on how many there are, or on their place"),
    ):
        if part in message:
            return reason
    return message


if __name__ == "__main__":
    main()
