"""How likely a model finds each token of a text, without ever holding logits of all of them."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgraft.errors import ModelError
from kvgraft.models.capture import decoder_of
from kvgraft.models.placement import input_device

_PROBE_TOKENS, _PROBE_TOLERANCE = 8, 0.05
_checked_models: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def token_log_likelihood(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None, *, chunk_tokens: int = 256
) -> Tensor:
    """Natural logarithm of the probability of each token after those before it: float32 ``[batch, tokens]``.

    NaN for padding and for the first token of each text, which nothing predicts.

    Args:
        model: a causal language model of transformers.
        input_ids: ``[batch, tokens]``.
        attention_mask: ``[batch, tokens]``, 1 where a token is real; default all. Padding may stand on either side.
        chunk_tokens: tokens whose logits are held at a time.

    Raises:
        ModelError: the logits are more than the last layer's output through the head and a soft cap.
    """
    input_ids = input_ids.to(input_device(model))
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    _require_plain_head(model)
    states = _last_states(model, input_ids, mask)
    predicted = mask[:, 1:].bool() & mask[:, :-1].bool()
    rows, targets = states[:, :-1][predicted], input_ids[:, 1:][predicted]
    found = [
        _chosen_log_probability(_logits(model, part), target)
        for part, target in zip(torch.split(rows, chunk_tokens), torch.split(targets, chunk_tokens), strict=True)
    ]
    result = torch.full(input_ids.shape, float("nan"), device=input_ids.device)
    if found:
        result[:, 1:][predicted] = torch.cat(found)
    return result


def _last_states(model: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
    output = decoder_of(model)(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
    # The last layer of a model over several devices lies on another than the first.
    states: Tensor = output.last_hidden_state.to(input_ids.device)
    return states


def _logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    logits: Tensor = model.get_output_embeddings()(states).float().to(states.device)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _chosen_log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def _require_plain_head(model: PreTrainedModel) -> None:
    """Refuse a model whose own logits differ from head and soft cap, such as one that scales them."""
    if model in _checked_models:
        return
    vocabulary = model.get_input_embeddings().num_embeddings
    input_ids = (torch.arange(_PROBE_TOKENS, device=input_device(model)) * 37 % vocabulary)[None]
    own = model(input_ids=input_ids, use_cache=False).logits.float()
    ours = _logits(model, _last_states(model, input_ids, torch.ones_like(input_ids)))
    if float((own - ours).norm()) > _PROBE_TOLERANCE * float(own.norm()):
        raise ModelError(
            f"{type(model).__name__} does more to its logits than a head and a soft cap, so its token likelihoods are "
            "not covered; use another kv_loss.combine than confidence"
        )
    _checked_models[model] = True
