import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from kvgraft.errors import ModelError
from kvgraft.kv import KV
from kvgraft.models import attention
from kvgraft.models.attention import attention_output_cosine, read_attention
from kvgraft.models.capture import capture, record_kv
from kvgraft.models.geometry import kv_geometry
from kvgraft.models.interception import intercepted_attention
from kvgraft.models.latent import meeting_vectors
from kvgraft.models.rope import rotate

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LATENTS = {
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
}
IDS = torch.arange(1, 13)[None] * 5 % 59


def models() -> dict:
    torch.manual_seed(0)
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval(),
        "gemma3": Gemma3ForCausalLM(
            Gemma3TextConfig(**SIZES, **HEADS, sliding_window=4, sliding_window_pattern=2)
        ).eval(),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4)).eval(),
        "deepseek_v3": DeepseekV3ForCausalLM(
            DeepseekV3Config(**SIZES | LATENTS, num_attention_heads=4, num_key_value_heads=4, first_k_dense_replace=3)
        ).eval(),
    }


@pytest.mark.parametrize("name", list(models()))
def test_own_kv_gives_the_same_output_and_other_kv_another(name: str) -> None:
    model = models()[name]
    own = capture(model, IDS)
    other = KV(own.keys, own.values.roll(1, 3), own.positions, own.mask, own.layers)
    cosines = attention_output_cosine(model, IDS, {"own": own, "other": other})
    torch.testing.assert_close(cosines["own"], torch.ones(3, 12))
    assert cosines["other"].mean() < 0.9


def test_what_the_mask_leaves_out_stays_the_models_own() -> None:
    model = models()["llama"]
    own = capture(model, IDS)
    mask = torch.zeros_like(own.mask)
    kv = KV(own.keys * 3, -own.values, own.positions, mask, own.layers)
    torch.testing.assert_close(attention_output_cosine(model, IDS, {"x": kv})["x"], torch.ones(3, 12))
    only_last = KV(own.keys[:, 2:], -own.values[:, 2:], own.positions, own.mask, (2,))
    assert attention_output_cosine(model, IDS, {"x": only_last})["x"].shape == (1, 12)
    torch.testing.assert_close(attention_output_cosine(model, IDS, {"x": only_last})["x"], -torch.ones(1, 12))


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_received_attention_is_the_models_own(name: str) -> None:
    model = models()[name]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(IDS, output_attentions=True).attentions
    expected = torch.stack([layer[0].sum(1).mean(0) for layer in attentions])
    torch.testing.assert_close(read_attention(model, IDS).received, expected)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("places", [100, 5])
def test_query_moments_tell_how_far_an_error_of_a_key_moves_scores(
    places: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_KEY_PLACES", places)
    model = models()[name]
    kv_heads, width = (kv_geometry(model.config).num_kv_heads, kv_geometry(model.config).head_dim)
    seen = {}

    def note(layer, attend, module, query, key, *rest, **options):
        seen[layer] = meeting_vectors(module, query)
        return attend(module, query, key, *rest, **options)

    with torch.no_grad(), intercepted_attention(model, note) as rotations:
        model(IDS)
    moments = read_attention(model, IDS).query_moments
    assert moments.shape == (3, kv_heads, width, width)
    error = torch.randn(kv_heads, width, generator=torch.Generator().manual_seed(0))
    keys = range(0, 12, 1 if places == 100 else 3)
    for layer in range(3):
        squares = []
        for place in keys:
            cos, sin = (part[:, place : place + 1] for part in rotations[layer][:2])
            moved = rotate(error[None, :, None], cos, sin)[0].repeat_interleave(4 // kv_heads, 0)
            scores = (seen[layer][0, :, place:] * moved).sum(-1)
            squares.append(scores.square().reshape(kv_heads, -1).mean(1))
        found = torch.einsum("hd,hde,he->h", error, moments[layer], error)
        torch.testing.assert_close(found, torch.stack(squares).mean(0))


def test_kv_of_other_heads_is_refused() -> None:
    model = models()["llama"]
    with torch.no_grad(), record_kv(model, rotated=True) as recorder:
        model(IDS)
    with pytest.raises(ModelError, match="pre-RoPE keys of 2 heads of 8"):
        attention_output_cosine(model, IDS, {"rotated": recorder.kv(torch.ones_like(IDS))})
