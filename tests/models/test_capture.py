"""Captured KV against the model's own cache, on tiny random models of every family that SPEC names."""

import sys
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kvgraft.errors import ModelError
from kvgraft.kv import KVGeometry
from kvgraft.models.capture import capture, record_kv, turnings_of
from kvgraft.models.decoder import decoder_of
from kvgraft.models.geometry import kv_geometry, kv_layers, relative_depths
from kvgraft.models.head import head_of
from kvgraft.models.interception import attention_layers
from kvgraft.models.latent import cache_entry
from kvgraft.models.rope import Rotation, Turning, find_turning, read_rotation, rotate, unrotate

VOCABULARY = 97
GROUPED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MULTI_HEAD = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 4},
    "gemma3_text": {
        **GROUPED,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": GROUPED,
    "gpt2": MULTI_HEAD,
    "gpt_neox": {**MULTI_HEAD, "intermediate_size": 48},
    "deepseek_v3": {
        **MULTI_HEAD,
        "intermediate_size": 48,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 8,
        "first_k_dense_replace": 3,
    },
}


LLAMA_4 = GROUPED | {"intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 2}
# How each layer turns its keys; one_half in GPT-OSS, whose layers are handed half the cosines.
TURNINGS = {
    "cohere": ({}, ["neighbours"] * 3),
    "cohere2": ({"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}, ["neighbours", "neighbours", "not"]),
    "ernie4_5": ({}, ["neighbours_of_halves"] * 3),
    "glm": ({"partial_rotary_factor": 0.5}, ["neighbours_of_halves"] * 3),
    # Norms behind the rotation leave it what it is.
    "llama4_text": (LLAMA_4 | {"no_rope_layers": [1, 1, 0]}, ["neighbours", "neighbours", "not"]),
    "nanochat": ({}, ["halves_back"] * 3),
    "gpt_oss": ({"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}, ["one_half"] * 3),
    "smollm3": ({"no_rope_layers": [1, 1, 0]}, ["halves", "halves", "not"]),
}


def config_of(family: str) -> PretrainedConfig:
    fields = CONFIGS[family] if family in CONFIGS else GROUPED | TURNINGS[family][0]
    return AutoConfig.for_model(family, **fields)


def model_of(family: str, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family), attn_implementation=attention).eval()


def padded_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Two texts, the first padded on the left and the second on the right, and their positions."""
    torch.manual_seed(1)
    input_ids = torch.randint(3, VOCABULARY, (2, 11))
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    mask[1, 8:] = 0
    return input_ids, mask, (mask.cumsum(-1) - 1).clamp_min(0)


def own_cache(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    input_ids, mask, positions = padded_batch()
    with torch.no_grad():
        output = model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=True)
    if not hasattr(output.past_key_values, "layers"):
        pytest.skip("this transformers has a cache of another kind for it")
    return [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in output.past_key_values.layers]


@torch.no_grad()
def cached(model: PreTrainedModel, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Captured KV, rotated, as transformers' cache holds it."""
    (module,) = (module for module, number in attention_layers(model).items() if number == layer)
    return cache_entry(module, keys, values)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_rerotated_keys_and_values_equal_the_models_own_cache(family: str, attention: str) -> None:
    model = model_of(family, attention)
    input_ids, mask, positions = padded_batch()
    kv = capture(model, input_ids, mask)
    with torch.no_grad(), record_kv(model) as recorder:
        model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
    assert kv.geometry == kv_geometry(model.config)
    assert torch.equal(kv.positions, positions)
    assert torch.equal(kv.mask, mask.bool())
    for layer, (keys, values) in enumerate(own_cache(model)):
        rotation = recorder.rotation(layer)
        rerotated = kv.keys[:, layer] if rotation is None else rotate(kv.keys[:, layer], *rotation)
        own_keys, own_values = cached(model, layer, rerotated, kv.values[:, layer])
        # A sliding layer's cache holds the last tokens only.
        kept = keys.shape[2]
        torch.testing.assert_close(own_keys[:, :, -kept:], keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(own_values[:, :, -kept:], values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_rotated_keys_on_request(family: str) -> None:
    model = model_of(family)
    input_ids, mask, _ = padded_batch()
    kv = capture(model, input_ids, mask, rotated=True)
    assert kv.rotated
    for layer, (keys, _) in enumerate(own_cache(model)):
        own_keys, _ = cached(model, layer, kv.keys[:, layer], kv.values[:, layer])
        torch.testing.assert_close(own_keys[:, :, -keys.shape[2] :], keys, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"gpt2"}))
def test_keys_before_rotation_do_not_depend_on_padding(family: str) -> None:
    model = model_of(family)
    input_ids, mask, _ = padded_batch()
    padded = capture(model, input_ids, mask)
    for row in range(2):
        real = mask[row].bool()
        alone = capture(model, input_ids[row][real][None])
        torch.testing.assert_close(padded.keys[row][:, :, real], alone.keys[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(padded.values[row][:, :, real], alone.values[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_bit_identical_while_recording(family: str, attention: str) -> None:
    model = model_of(family, attention)
    input_ids, mask, _ = padded_batch()
    with torch.no_grad():
        plain = model(input_ids=input_ids, attention_mask=mask).logits
        with record_kv(model) as recorder:
            recorded = model(input_ids=input_ids, attention_mask=mask).logits
        after = model(input_ids=input_ids, attention_mask=mask).logits
    assert torch.equal(plain, recorded)
    assert torch.equal(plain, after)
    assert recorder.kv(mask).geometry == kv_geometry(model.config)


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_under_checkpointing_equal_those_without(family: str) -> None:
    input_ids, mask, _ = padded_batch()
    gradients = []
    for checkpointing in (False, True):
        model = model_of(family).train()
        if family == "gpt2":
            model.eval()
            for module in model.modules():
                module.training = not isinstance(module, torch.nn.Dropout)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        kv = capture(model, input_ids, mask, gradients=True)
        weights = torch.linspace(-1, 1, kv.keys.numel()).reshape(kv.keys.shape)
        ((kv.keys * weights).sum() + (kv.values * weights.flip(-1)).sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_reentrant_checkpointing_is_refused() -> None:
    model = model_of("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    input_ids, mask, _ = padded_batch()
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*use_reentrant"):
        capture(model, input_ids, mask, gradients=True)


def test_chosen_layers_come_in_order_and_nothing_after_them_runs() -> None:
    model = model_of("llama")
    input_ids, mask, _ = padded_batch()
    whole = capture(model, input_ids, mask)
    ran: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, *_, index=layer.self_attn.layer_idx: ran.append(index))
    chosen = capture(model, input_ids, mask, layers=[1, 0])
    assert chosen.layers == (1, 0)
    assert torch.equal(chosen.keys, whole.keys[:, [1, 0]])
    # Layer 1 stops at its attention, so only layer 0 gets as far as its feed-forward.
    assert ran == [0]


def test_no_logits_are_computed() -> None:
    model = model_of("llama")
    input_ids, mask, _ = padded_batch()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the language-model head ran"))
    capture(model, input_ids, mask, gradients=True)


def test_another_model_may_run_inside_the_block() -> None:
    model, other = model_of("llama"), model_of("qwen3")
    input_ids, mask, _ = padded_batch()
    expected = capture(model, input_ids, mask)
    with torch.no_grad(), record_kv(model) as recorder:
        model(input_ids=input_ids, attention_mask=mask)
        other(input_ids=input_ids, attention_mask=mask)
        nested = capture(other, input_ids, mask)
    torch.testing.assert_close(recorder.kv(mask).keys[1, :, :, :8], expected.keys[1, :, :, :8])
    torch.testing.assert_close(nested.keys, capture(other, input_ids, mask).keys)


REFUSED = {
    "bloom": (MULTI_HEAD | {"n_head": 4, "n_layer": 3}, "BloomForCausalLM cannot be captured"),
    "gptj": (
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": 3, "rotary_dim": 4, "n_positions": 64},
        "GPTJForCausalLM cannot be captured",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_captured_is_refused_by_name(family: str) -> None:
    fields, message = REFUSED[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).eval()
    input_ids, mask, _ = padded_batch()
    with pytest.raises(ModelError, match=message):
        capture(model, input_ids, mask)


@pytest.mark.parametrize("family", TURNINGS)
def test_keys_that_turn_otherwise_than_by_halves(family: str) -> None:
    model = model_of(family, "eager")
    input_ids, mask, positions = padded_batch()
    kv = capture(model, input_ids, mask)
    assert list(turnings_of(model, range(3)).values()) == TURNINGS[family][1]
    with torch.no_grad(), record_kv(model) as recorder:
        model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
    for layer, (keys, _) in enumerate(own_cache(model)):
        rotation = recorder.rotation(layer)
        rerotated = kv.keys[:, layer] if rotation is None else rotate(kv.keys[:, layer], *rotation)
        torch.testing.assert_close(rerotated[:, :, -keys.shape[2] :], keys, atol=1e-5, rtol=0)
    real = mask[0].bool()
    torch.testing.assert_close(kv.keys[0][:, :, real], capture(model, input_ids[:1, real]).keys[0], atol=1e-5, rtol=0)


def test_the_one_chosen_layer_may_be_one_that_does_not_turn() -> None:
    model = tiny("smollm3", **GROUPED | {"no_rope_layers": [0, 1, 1]})
    input_ids, mask, _ = padded_batch()
    kv = capture(model, input_ids, mask, layers=[0])
    assert torch.equal(kv.keys, capture(model, input_ids, mask, layers=[0], rotated=True).keys)


def test_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ModelError, match=r"0\.\.2; asked for \[3\]"):
        capture(model_of("llama"), padded_batch()[0], layers=[1, 3])


def test_training_mode_and_random_state_are_left_alone() -> None:
    model = model_of("llama").train()
    input_ids, _, _ = padded_batch()
    state = torch.get_rng_state()
    capture(model, input_ids)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_geometry_comes_from_the_config_alone() -> None:
    assert kv_geometry(config_of("llama")) == KVGeometry(3, 2, 8)
    assert kv_geometry(config_of("gpt2")) == KVGeometry(3, 4, 8)
    assert kv_geometry(config_of("llama")).kv_dim == 16
    assert kv_geometry(config_of("llama")).bytes_per_token(2) == 2 * 3 * 16 * 2
    with pytest.raises(ModelError, match=r"model\.config; got LlamaForCausalLM"):
        kv_geometry(model_of("llama"))


@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_unrotate_undoes_rotate_also_with_a_scale(rotary_dim: int) -> None:
    torch.manual_seed(0)
    keys = torch.randn(2, 3, 5, 8)
    angle = torch.randn(2, 5, rotary_dim // 2).repeat(1, 1, 2)
    cos, sin = 1.3 * angle.cos(), 1.3 * angle.sin()
    rotated = rotate(keys, cos, sin)
    assert not torch.allclose(rotated, keys)
    assert torch.equal(rotated[..., rotary_dim:], keys[..., rotary_dim:])
    torch.testing.assert_close(unrotate(rotated, cos, sin), keys)


@pytest.mark.parametrize("turning", ["halves", "neighbours_of_halves"])
def test_the_nearest_way_of_turning_is_found_where_few_channels_turn(turning: Turning) -> None:
    torch.manual_seed(0)
    keys = torch.cat([torch.randn(1, 2, 5, 4), 100 + torch.randn(1, 2, 5, 12)], -1)
    sides = []
    for shift in (0, 7):
        angle = ((torch.arange(5.0) + shift)[None, :, None] * torch.tensor([1.0, 0.1])).repeat(1, 1, 2)
        handed = Rotation(angle.cos(), angle.sin())
        sides.append((rotate(keys, *read_rotation(turning, handed.cos, handed.sin)), handed))
    assert find_turning(*sides, tolerance=0.05) == turning


def tiny(family: str, **fields: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).eval()


@pytest.mark.parametrize("rotated", [False, True])
def test_a_layer_that_attends_twice_is_refused(rotated: bool) -> None:
    # DiffLlama hands over one half of its values, then the other.
    model = tiny("diffllama", **GROUPED)
    if not hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("this transformers' DiffLlama does not attend through its interface")
    input_ids, mask, _ = padded_batch()
    with pytest.raises(ModelError, match="layer 0 attends more than once"):
        capture(model, input_ids, mask, rotated=rotated)


def turned_by_half_the_angle(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    half = ((1 + cos) / 2).sqrt(), ((1 - cos) / 2).sqrt() * sin.sign()
    return rotate(query, *half), rotate(key, *half)


def test_keys_that_turn_in_a_way_of_their_own_are_refused_before_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", turned_by_half_the_angle)
    model = model_of("llama")
    input_ids, mask, _ = padded_batch()
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be captured before rotation.*\[0, 1, 2\]"):
        capture(model, input_ids, mask)
    kv = capture(model, input_ids, mask, rotated=True)
    for layer, (keys, values) in enumerate(own_cache(model)):
        torch.testing.assert_close(kv.keys[:, layer], keys)
        torch.testing.assert_close(kv.values[:, layer], values)


@pytest.mark.parametrize(
    ("family", "fields"),
    [("llama4_text", LLAMA_4), ("modernbert-decoder", MULTI_HEAD | {"intermediate_size": 48, "pad_token_id": 0})],
)
def test_the_decoder_is_neither_the_whole_model_nor_its_head(family: str, fields: dict) -> None:
    model = tiny(family, **fields)
    assert decoder_of(model) is model.model
    assert capture(model, padded_batch()[0], rotated=True).geometry == kv_geometry(model.config)


def test_the_head_of_llama_4_gives_its_own_logits() -> None:
    assert head_of(tiny("llama4_text", **LLAMA_4)).vocabulary == VOCABULARY


# Models whose layers do not all hold KV alike, and the places of those that count.
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
OF_A_WINDOW = {"sliding_window": 4, "hidden_size_per_layer_input": 0}
MIXED = {
    "qwen3_5_text": ({"layer_types": ["linear_attention", "linear_attention", "full_attention"]} | DELTA_NET, [2]),
    "lfm2": ({"layer_types": ["conv", "full_attention", "full_attention"]}, [1, 2]),
    "bamba": ({"attn_layer_indices": [1]} | MAMBA, [1]),
    "falcon_h1": ({"mamba_d_ssm": 64} | MAMBA, [0, 1, 2]),
    # Its name ends as those of attention layers do.
    "minimax": ({"num_local_experts": 2, "num_experts_per_tok": 1}, [0, 2]),
    # Full layers have wider heads than those of a window, which are more.
    "gemma4_text": ({"num_hidden_layers": 6, "global_head_dim": 16} | OF_A_WINDOW, [0, 1, 2, 3, 4]),
    # The last four read what the layers before them keep.
    "gemma3n_text": (
        {
            "num_hidden_layers": 10,
            "num_kv_shared_layers": 4,
            "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
            "intermediate_size": [48] * 10,
            "activation_sparsity_pattern": [0.0] * 10,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "sliding_window": 4,
        },
        [0, 1, 2, 3, 4, 5],
    ),
}


def mixed(family: str) -> PreTrainedModel:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    return tiny(family, **GROUPED | MIXED[family][0])


@pytest.mark.parametrize("family", MIXED)
def test_layers_are_counted_among_those_that_hold_kv_alike(family: str) -> None:
    model, places = mixed(family), MIXED[family][1]
    assert list(kv_layers(model.config)) == places
    input_ids, mask, positions = padded_batch()
    kv = capture(model, input_ids, mask)
    assert kv.layers == tuple(range(len(places)))
    assert kv.geometry == kv_geometry(model.config) == KVGeometry(len(places), 2, 8)
    cache, real = own_cache(model), mask.bool()[:, None, :, None]
    with torch.no_grad(), record_kv(model) as recorder:
        model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
    for layer, place in enumerate(places):
        rotation, (keys, values) = recorder.rotation(layer), cache[place]
        rerotated = kv.keys[:, layer] if rotation is None else rotate(kv.keys[:, layer], *rotation)
        for ours, theirs in ((rerotated, keys), (kv.values[:, layer], values)):
            kept = theirs.shape[2]
            ours, theirs = (tensor[:, :, -kept:] * real[:, :, -kept:] for tensor in (ours, theirs))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    alone = capture(model, input_ids[:1, 3:], layers=[len(places) - 1])
    torch.testing.assert_close(alone.keys[:, 0], kv.keys[:1, -1, :, 3:], atol=1e-5, rtol=0)


def test_depths_are_among_all_layers() -> None:
    depths = relative_depths(mixed("gemma4_text").config)
    assert depths == [Fraction(place, 5) for place in range(5)]
    assert relative_depths(AutoConfig.for_model("llama", num_hidden_layers=1)) == [1]


def test_a_model_without_attention_is_refused_by_its_config() -> None:
    with pytest.raises(ModelError, match="the config of mamba names no layer with num_attention_heads"):
        kv_geometry(AutoConfig.for_model("mamba", num_hidden_layers=2))


@pytest.mark.parametrize("fields", [{}, {"multi_query": False}, {"new_decoder_architecture": True, "num_kv_heads": 2}])
def test_geometry_of_falcon_is_that_of_its_cache(fields: dict) -> None:
    model = tiny("falcon", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **fields)
    keys, _ = own_cache(model)[0]
    geometry = kv_geometry(model.config)
    assert (geometry.num_kv_heads, geometry.head_dim) == (keys.shape[1], keys.shape[3])


BERT = MULTI_HEAD | {"intermediate_size": 48, "max_position_embeddings": 66, "initializer_range": 0.15}


@pytest.mark.parametrize(
    ("family", "fields", "layers"),
    [("bert", {}, r"\[1, 2\]"), ("roberta", {"is_decoder": True, "pad_token_id": 1}, r"\[0, 1, 2\]")],
)
def test_keys_that_follow_the_whole_text_or_other_positions_are_refused(family: str, fields: dict, layers: str) -> None:
    # RoBERTa's first token is at position 2, one behind its padding token's id.
    with pytest.raises(ModelError, match=rf"cannot be captured: in layers {layers} its keys depend on.*is_decoder"):
        capture(tiny(family, **BERT | fields), padded_batch()[0])


def test_bert_as_a_decoder_is_captured() -> None:
    model = tiny("bert", **BERT | {"is_decoder": True})
    input_ids, mask, _ = padded_batch()
    kv = capture(model, input_ids, mask)
    for layer, (keys, values) in enumerate(own_cache(model)):
        torch.testing.assert_close(kv.keys[:, layer], keys)
        torch.testing.assert_close(kv.values[:, layer], values)


# Takes no position_ids.
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
}


def test_padding_on_the_left_is_refused_where_positions_count_it() -> None:
    model = tiny("bart", **BART)
    input_ids, mask, _ = padded_batch()
    with pytest.raises(ModelError, match="BartForCausalLM takes no position_ids"):
        capture(model, input_ids, mask)
    alone = capture(model, input_ids[1:, :8])
    torch.testing.assert_close(capture(model, input_ids[1:], mask[1:]).values[:, :, :, :8], alone.values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, mask: (ids[0], None), r"input_ids must be a tensor \[batch, tokens\].*got \[11\]"),
        (lambda ids, mask: (ids.tolist(), None), "input_ids must be a tensor.*got list"),
        (lambda ids, mask: (ids[:, :0], None), r"at least one token; got \[2, 0\]"),
        (lambda ids, mask: (ids + VOCABULARY, None), "LlamaForCausalLM must be whole numbers in 0..96"),
        (lambda ids, mask: (ids.float(), None), "whole numbers in 0..96; got torch.float32"),
        (lambda ids, mask: (ids, mask[:, :5]), r"attention_mask must be \[2, 11\], as input_ids; got \[2, 5\]"),
        (lambda ids, mask: (ids, mask.tolist()), "attention_mask must be .* got list"),
    ],
)
def test_ids_and_masks_that_do_not_fit_are_refused(change: Callable[..., tuple], message: str) -> None:
    input_ids, mask, _ = padded_batch()
    with pytest.raises(ModelError, match=message):
        capture(model_of("llama"), *change(input_ids, mask))


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ModelError, match="got str"):
        capture("llama", padded_batch()[0])


def test_a_pass_without_gradients_may_run_in_a_block_that_has_them() -> None:
    model = model_of("llama")
    input_ids = padded_batch()[0]
    with record_kv(model) as recorder, torch.no_grad():
        model(input_ids)
    assert torch.equal(recorder.kv(torch.ones_like(input_ids)).keys, capture(model, input_ids).keys)


def test_a_pass_that_goes_on_from_a_cache_is_refused_before_rotation() -> None:
    model = model_of("llama")
    input_ids = padded_batch()[0]
    with record_kv(model) as recorder:
        answered = model.generate(input_ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    read = torch.ones_like(answered[:, :-1])
    with pytest.raises(ModelError, match="went on from a cache: 1 of the 13 tokens"):
        recorder.kv(read)
    with record_kv(model, rotated=True) as recorder:
        model.generate(input_ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    torch.testing.assert_close(recorder.kv(read).values, capture(model, answered[:, :-1]).values)
    with pytest.raises(ModelError, match=r"attention_mask must be \[2, 13\].*got \[2, 5\]"):
        recorder.kv(read[:, :5])
