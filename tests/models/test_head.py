"""From hidden states to logits as the model itself does it, or a refusal."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    ElectraConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
)

from kvgraft.errors import ModelError
from kvgraft.models.capture import capture
from kvgraft.models.head import head_of, hidden_states, kv_and_hidden_states, record_hidden

SIZES = {
    "vocab_size": 90,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# RecurrentGemma attends in every third layer.
THREE_LAYERS = SIZES | {"num_hidden_layers": 3}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "gemma2, soft cap": Gemma2Config(**SIZES, final_logit_softcapping=0.05),
    "recurrent gemma, soft cap by another name": RecurrentGemmaConfig(**THREE_LAYERS, logits_soft_cap=0.05),
    "cohere, logit scale": CohereConfig(**SIZES, logit_scale=0.25),
    "granite, logits scaling": GraniteConfig(**SIZES, logits_scaling=6.0),
    "gpt2": GPT2Config(vocab_size=90, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
}


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_models_own(name: str) -> None:
    model = random_model(CONFIGS[name])
    input_ids = torch.arange(12).reshape(2, 6) * 7 % 90
    mask = torch.ones_like(input_ids)
    expected = model(input_ids=input_ids, attention_mask=mask).logits
    found = head_of(model).logits(hidden_states(model, input_ids, mask).flatten(0, 1))
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2, soft cap", "gpt2"])
def test_one_pass_gives_kv_and_hidden_states_as_two_do(name: str) -> None:
    model, fresh = random_model(CONFIGS[name]), random_model(CONFIGS[name])
    input_ids = torch.arange(12).reshape(2, 6) * 7 % 90
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    # The fresh model's head was never checked, and its check is a pass too.
    kv, hidden = kv_and_hidden_states(fresh, input_ids, mask, [1, 0])
    expected = capture(model, input_ids, mask, layers=[1, 0])
    assert torch.equal(hidden, hidden_states(model, input_ids, mask))
    assert torch.equal(kv.keys, expected.keys)
    assert torch.equal(kv.values, expected.values)
    assert torch.equal(kv.positions, expected.positions)
    assert kv.layers == (1, 0)


def test_hidden_states_keep_their_gradient() -> None:
    model = random_model(CONFIGS["llama"])
    with record_hidden(model) as recorded:
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert recorded.states.shape == (1, 3, 16)
    assert recorded.states.requires_grad
    with record_hidden(model) as nothing, pytest.raises(ModelError, match="was not run"):
        _ = nothing.states


def test_a_head_that_does_something_else_is_refused() -> None:
    model = random_model(CONFIGS["llama"])
    own = type(model).forward

    class Doubled(type(model)):
        def forward(self, *args, **kwargs):
            output = own(self, *args, **kwargs)
            output.logits = output.logits * 2
            return output

    model.__class__ = Doubled
    with pytest.raises(ModelError, match="Doubled makes its logits from hidden states in a way that is not covered"):
        head_of(model)


def test_a_head_behind_a_layer_of_another_width_is_refused() -> None:
    # ELECTRA's logits are made from embeddings, eight times as wide here as its hidden states.
    electra = ElectraConfig(
        vocab_size=90, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(ModelError, match="ElectraForCausalLM makes its logits from hidden states in a way"):
        head_of(random_model(electra))


def test_a_head_cannot_be_cut_to_more_than_it_has() -> None:
    head = head_of(random_model(CONFIGS["llama"]))
    assert head.cut(80).vocabulary == 80
    with pytest.raises(ModelError, match="head of 90 tokens cannot be cut to 91"):
        head.cut(91)
