"""Students whose attention is sharp enough that a wrong rotation or mask shows, and plain decoding to compare with."""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvgraft.projector.projector import KVDimensionProjector
from tests.models.test_capture import VOCABULARY, config_of


def student_of(family: str, attention: str = "sdpa", **fields: object) -> PreTrainedModel:
    """The tiny random model of ``family``, its weights five times as large."""
    torch.manual_seed(0)
    config = config_of(family)
    for name, value in fields.items():
        setattr(config, name, value)
    return sharpened(AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval())


@torch.no_grad()
def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with weights five times as large."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(5)
    return model


def ragged_batch() -> tuple[Tensor, Tensor]:
    """Texts of 8, 5 and 11 tokens and their mask: padded on the left, on the right, and not."""
    torch.manual_seed(1)
    input_ids = torch.randint(3, VOCABULARY, (3, 11))
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    mask[1, 5:] = 0
    return input_ids, mask


def plain_logits(model: PreTrainedModel, text: Tensor, following: Tensor) -> Tensor:
    """Logits ``[tokens of following, vocabulary]`` of one row that the model reads itself, without padding."""
    whole = torch.cat([text, following])[None]
    with torch.no_grad():
        return model(input_ids=whole).logits[0, len(text) :]


def plain_answer(model: PreTrainedModel, text: Tensor, following: Tensor, tokens: int) -> Tensor:
    whole = torch.cat([text, following])[None]
    mask = torch.ones_like(whole)
    answer = model.generate(input_ids=whole, attention_mask=mask, max_new_tokens=tokens, **GREEDY)
    return answer[0, whole.shape[1] :]


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def identity_projector(width: int, layers: int, name: str = "self") -> KVDimensionProjector:
    """A projector that changes nothing."""
    projector = KVDimensionProjector({name: {"d_model": width, "num_layers": layers}}, width, "linear", 0.0)
    for adapter in projector.adapters(name):
        adapter.load_linear(torch.eye(width)[None], torch.zeros(1, width))
    return projector
