"""Token likelihoods in chunks against the model's own logits, on every family."""

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM

from kvgraft.errors import ModelError
from kvgraft.models.likelihood import token_log_likelihood
from tests.models.test_capture import CONFIGS, GROUPED, model_of, padded_batch


@pytest.mark.parametrize("family", CONFIGS)
def test_equals_the_models_own_log_softmax(family: str) -> None:
    model = model_of(family)
    if family == "gemma3_text":
        model.config.final_logit_softcapping = 0.1  # low enough to matter at random weights
    input_ids, mask, positions = padded_batch()
    found = token_log_likelihood(model, input_ids, mask, chunk_tokens=3)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask, position_ids=positions).logits
    own = logits.float().log_softmax(-1)[:, :-1].gather(-1, input_ids[:, 1:, None])[..., 0]
    predicted = (mask[:, 1:] & mask[:, :-1]).bool()
    torch.testing.assert_close(found[:, 1:][predicted], own[predicted], atol=1e-5, rtol=0)
    assert found[:, 1:][~predicted].isnan().all()
    assert found[:, 0].isnan().all()


def test_logits_that_are_scaled_are_refused_by_name() -> None:
    torch.manual_seed(0)
    fields = {name: value for name, value in GROUPED.items() if name != "head_dim"}
    model = CohereForCausalLM(CohereConfig(**fields, logit_scale=0.5)).eval()
    with pytest.raises(ModelError, match="CohereForCausalLM does more to its logits"):
        token_log_likelihood(model, torch.randint(3, 90, (1, 5)))


def test_a_text_of_one_token_has_none() -> None:
    assert token_log_likelihood(model_of("llama"), torch.tensor([[5]])).isnan().all()
