"""The last step of a language model: from hidden states to logits, and the hidden states that it starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvgraft.errors import ModelError
from kvgraft.kv import KV
from kvgraft.models.capture import record_kv
from kvgraft.models.decoder import decoder_of
from kvgraft.models.evaluation_mode import evaluation_mode
from kvgraft.models.placement import input_device
from kvgraft.models.tensor_parallel import whole_parameter

# Tokens and relative error of the check that a head gives the model's own logits.
_PROBE_TOKENS, _PROBE_TOLERANCE = 8, 0.02
# What architectures call the bound of their logits: Gemma, RecurrentGemma, xLSTM.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_checked_models: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: ``cap(scale * (hidden @ weight.T + bias))``.

    Attributes:
        weight: ``[vocabulary, hidden_size]``.
        bias: ``[vocabulary]`` or None.
        scale: factor on the logits (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
        softcap: bound that logits approach through a tanh (Gemma's ``final_logit_softcapping``); None for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        """Tokens that the head gives a logit."""
        return self.weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``[tokens, vocabulary]`` of ``hidden [tokens, hidden_size]``, in the dtype of ``hidden``."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def log_likelihood(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Log-probability ``[tokens]`` of ``token_ids [tokens]`` after ``hidden [tokens, hidden_size]``."""
        logits = self.logits(hidden)
        return logits.gather(-1, token_ids[:, None])[:, 0] - logits.logsumexp(-1)

    def log_likelihood_in_chunks(self, hidden: Tensor, token_ids: Tensor, chunk_tokens: int) -> Tensor:
        """:meth:`log_likelihood`, ``chunk_tokens`` tokens at a time; a gradient through it holds all logits."""
        # Cast once, and not for every chunk.
        head = replace(self, weight=self.weight.to(hidden.dtype))
        found = [
            head.log_likelihood(hidden[first : first + chunk_tokens], token_ids[first : first + chunk_tokens])
            for first in range(0, hidden.shape[0], chunk_tokens)
        ]
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)

    def cut(self, vocabulary: int) -> Head:
        """The head of the first ``vocabulary`` tokens: without the rows that pad an embedding matrix.

        Raises:
            ModelError: the head has fewer.
        """
        if vocabulary > self.vocabulary:
            raise ModelError(f"a head of {self.vocabulary} tokens cannot be cut to {vocabulary}")
        if vocabulary == self.vocabulary:
            return self
        bias = None if self.bias is None else self.bias[:vocabulary]
        return replace(self, weight=self.weight[:vocabulary], bias=bias)


def as_the_head_reads(hidden: Tensor) -> Tensor:
    """``hidden`` in the dtype in which a model's own head would take its product: autocast's, inside of autocast."""
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


def head_of(model: PreTrainedModel) -> Head:
    """The head of ``model``, sharing its parameters; checked once against the model's own logits.

    Raises:
        ModelError: the model has no linear head, or does something between hidden states and logits that is not
            covered; its logits would silently be others.
    """
    output = model.get_output_embeddings()
    weight, bias = whole_parameter(output, "weight"), whole_parameter(output, "bias")
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ModelError(f"{type(model).__name__} has no linear language-model head; logits cannot be distilled")
    if weight.is_meta:
        raise ModelError(
            f"the head of {type(model).__name__} is offloaded, and its weights are needed for every token's logits; "
            "put lm_head on a device in device_map"
        )
    text = model.config.get_text_config()
    scale = getattr(text, "logit_scale", None)
    divisor = getattr(text, "logits_scaling", None)
    head = Head(
        weight,
        bias,
        scale=float(scale if scale is not None else 1.0) / float(divisor if divisor is not None else 1.0),
        softcap=next((cap for name in _SOFTCAPS if (cap := getattr(text, name, None)) is not None), None),
    )
    if model not in _checked_models:
        _require_own_logits(model, head)
        _checked_models[model] = True
    return head


class RecordedHidden:
    """The hidden states that a model's last forward pass handed to its head; see :func:`record_hidden`."""

    def __init__(self) -> None:
        self._states: Tensor | None = None

    def note(self, states: Tensor) -> None:
        """``[batch, tokens, hidden_size]`` of a pass."""
        self._states = states

    @property
    def states(self) -> Tensor:
        """``[batch, tokens, hidden_size]``, behind the last norm."""
        if self._states is None:
            raise ModelError("the model was not run while its hidden states were recorded")
        return self._states


@contextmanager
def record_hidden(model: PreTrainedModel) -> Iterator[RecordedHidden]:
    """Record the last hidden states of a forward pass of ``model`` made inside the block, with their gradient."""
    recorded = RecordedHidden()

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        recorded.note(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    handle = decoder_of(model).register_forward_hook(note)
    try:
        yield recorded
    finally:
        handle.remove()


@torch.no_grad()
def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states ``[batch, tokens, hidden_size]`` where the head is, without gradient and without any logit."""
    input_ids, attention_mask, position_ids = _inputs(model, input_ids, attention_mask)
    # Asked first: a head that is not checked yet is, by a pass of its own.
    device = head_of(model).weight.device
    with record_hidden(model) as recorded:
        decoder_of(model)(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
    # The last layer of a model over several devices may lie on another than its head.
    return recorded.states.to(device)


@torch.no_grad()
def kv_and_hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]
) -> tuple[KV, Tensor]:
    """What :func:`~kvgraft.models.capture.capture` and :func:`hidden_states` give, bit for bit, from one pass.

    Raises:
        ModelError: as :func:`~kvgraft.models.capture.record_kv` and :func:`head_of`.
    """
    head_of(model)
    with record_kv(model, layers) as recorder:
        hidden = hidden_states(model, input_ids, attention_mask)
    _, attention_mask, position_ids = _inputs(model, input_ids, attention_mask)
    return recorder.kv(attention_mask, position_ids), hidden


def _inputs(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and positions where ``model`` takes them; positions count real tokens."""
    device = input_device(model)
    attention_mask = attention_mask.to(device)
    return input_ids.to(device), attention_mask, (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def _require_own_logits(model: PreTrainedModel, head: Head) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    input_ids = (torch.arange(_PROBE_TOKENS, device=input_device(model)) * 37 % vocabulary)[None]
    with evaluation_mode(model), record_hidden(model) as recorded:
        expected = model(input_ids=input_ids, use_cache=False).logits[0].float()
    hidden, error = recorded.states[0].to(head.weight.device), float("inf")
    if (len(hidden), hidden.shape[-1], head.vocabulary) == (len(expected), head.weight.shape[1], expected.shape[-1]):
        logits = head.logits(hidden).to(expected.device)
        error = float((logits - expected).norm() / expected.norm().clamp_min(1e-30))
    if not error < _PROBE_TOLERANCE:
        raise ModelError(
            f"{type(model).__name__} makes its logits from hidden states in a way that is not covered (relative "
            f"difference {error:.1e} from its own); use a model whose head is linear, with a scale or soft cap at most"
        )
