"""transformers' own cache, filled from outside, and what to pass along with it to go on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvgraft.errors import GraftError
from kvgraft.kv import KV
from kvgraft.models.capture import are_counted, takes_positions
from kvgraft.models.geometry import context_of, kv_layers
from kvgraft.models.interception import attention_layers
from kvgraft.models.latent import cache_entry, keeps_latents
from kvgraft.models.rope import rotate
from kvgraft.models.rotary import rotations_at

# Newer transformers call the argument ``cache``, and ``past_key_values`` only with a warning.
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
# Before 5.2 generate repeats given position_ids at every step instead of counting on.
_GENERATE_COUNTS_POSITIONS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 2)

_CACHE_LAYERS = {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
# Stands for a layer that reads the KV of one before it.
_PLACEHOLDER = "DummyLayer"
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


class GraftedCache(DynamicCache):
    """A cache of transformers with tokens in it that the model has not read, ready to be gone on from.

    It grows as the model reads on. ``copy.deepcopy`` keeps a fresh one for the next question.

    Attributes:
        attention_mask: ``[batch, slots]`` int64, 1 where a slot holds a grafted token. Rows end together: padding
            stands on the left, and gaps (positions that nothing was given for) keep their slots.
        next_positions: ``[batch]`` int64, the position of the token after the grafted part.
        token_ids: ``[batch, slots]`` int64, what :meth:`generate_inputs` shows in place of the grafted tokens.
        context: positions that the model has.
    """

    def __init__(
        self, model: PreTrainedModel, attention_mask: Tensor, next_positions: Tensor, token_ids: Tensor
    ) -> None:
        super().__init__(config=model.config)
        self.attention_mask = attention_mask
        self.next_positions = next_positions
        self.token_ids = token_ids
        self.context = context_length(model)
        # The name of a model that counts its positions itself; such a one reads on only where it counts right.
        self._counting_model = None if takes_positions(model) else type(model).__name__

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers has it.

        Raises:
            GraftError: the model reads another number of rows than the cache holds, as beam search makes it.
        """
        held = self.layers[layer_idx].keys
        if held is not None and held.shape[0] != key_states.shape[0]:
            raise GraftError(
                f"the cache holds {held.shape[0]} rows and the model reads {key_states.shape[0]}: generate reads each "
                "text num_beams or num_return_sequences times, but repeats no cache; call "
                "cache.batch_repeat_interleave(TIMES), with the larger of the two, before generate"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def forward_inputs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments for ``model(**...)``: tokens not read yet, full mask, their positions, this cache.

        Args:
            input_ids: ``[batch, tokens]``, all that follows the grafted part; what the cache has read since comes
                first and is not read again.
            attention_mask: ``[batch, tokens]``, 0 where ``input_ids`` is padding, on either side; default all 1.
                Sliding-window layers count padding as tokens of their window.

        Raises:
            GraftError: another batch size, nothing new to read, more tokens than the model's context, or padding in
                front of tokens of a model that takes no positions.
        """
        mask, positions = self._extended(input_ids, attention_mask)
        read = self.get_seq_length()
        return {
            "input_ids": input_ids[:, read - self.attention_mask.shape[1] :].to(mask.device),
            "attention_mask": mask,
            "position_ids": positions[:, read:],
            CACHE_ARGUMENT: self,
        }

    def generate_inputs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments for ``model.generate(**...)``; arguments and errors as :meth:`forward_inputs`.

        ``input_ids`` in them starts with ``token_ids`` for the grafted part, because transformers before 5.3 takes
        nothing else; so does what generate gives back. Padding has to stand on the left, as for every generate.

        Raises:
            GraftError: gaps or a start above position 0 under transformers 5.1, which cannot count on from them.
        """
        mask, positions = self._extended(input_ids, attention_mask)
        inputs = {
            "input_ids": torch.cat([self.token_ids, input_ids.to(mask.device)], 1),
            "attention_mask": mask,
            "position_ids": positions,
            CACHE_ARGUMENT: self,
        }
        if not _GENERATE_COUNTS_POSITIONS:
            counted = (mask.cumsum(1) - 1) * mask
            if not torch.equal(counted, positions * mask):
                raise GraftError(
                    "this transformers' generate finds positions by counting the mask, but the grafted tokens have "
                    "gaps or do not start at position 0; install transformers 5.2 or later, or fill the gaps with the "
                    "student's own KV"
                )
            del inputs["position_ids"]
        return inputs

    def _extended(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mask and positions ``[batch, slots + tokens]`` of the grafted part and ``input_ids`` after it."""
        grafted = self.attention_mask
        batch, slots = grafted.shape
        if input_ids.dim() != 2 or input_ids.shape[0] != batch:
            raise GraftError(
                f"input_ids after a cache of {batch} texts must be [{batch}, tokens]; got {list(input_ids.shape)}"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise GraftError(
                f"attention_mask must be {list(input_ids.shape)} as input_ids, without the grafted part; "
                f"got {list(attention_mask.shape)}"
            )
        read = self.get_seq_length() - slots
        if not 0 <= read < input_ids.shape[1]:
            raise GraftError(
                f"the cache has read {read} tokens after its grafted part and input_ids holds {input_ids.shape[1]}: "
                "give all tokens after the grafted part, at least one of them new; copy.deepcopy keeps a fresh cache"
            )
        new = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        new = new.to(grafted.device, torch.int64)
        new_positions = (self.next_positions[:, None] + new.cumsum(1) - 1).clamp_min(0)
        if int(new_positions.max()) >= self.context:
            raise GraftError(
                f"grafted part and input_ids reach position {int(new_positions.max())}, but the student's context is "
                f"{self.context} tokens; graft less text or take a student with a longer context"
            )
        slot_positions = torch.arange(-slots, 0, device=grafted.device) + self.next_positions[:, None]
        mask = torch.cat([grafted, new], 1)
        positions = torch.cat([slot_positions.clamp_min(0), new_positions], 1)
        if self._counting_model and not are_counted(positions, mask):
            raise GraftError(
                f"{self._counting_model} takes no position_ids and counts padding in front of a token as text; graft "
                "texts of one length that start at position 0, and pad input_ids on the right"
            )
        return mask, positions


def context_length(model: PreTrainedModel) -> int:
    """Positions that ``model`` has: ``max_position_embeddings``, or without bound where its config names none."""
    context = context_of(model.config)
    return 2**62 if context is None else context


def require_cache_support(model: PreTrainedModel) -> None:
    """Refuse a model whose cache is not one of keys and values for every layer that does not read another's.

    Raises:
        GraftError: an encoder-decoder, a recurrent or hybrid model, heads of unlike width, or no cache at all.
    """
    name = type(model).__name__
    advice = (
        "use a causal language model with an attention in every layer, such as Llama, Qwen, Mistral, Gemma or GPT-2"
    )
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
        raise GraftError(
            f"{name} cannot take a grafted cache: it is no causal language model of transformers; {advice}"
        )
    made = DynamicCache(config=model.config).layers
    layers = [layer for layer in made if type(layer).__name__ != _PLACEHOLDER]
    # transformers 5.1 makes ordinary cache layers also for recurrent ones; the config tells.
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    others = sorted({type(layer).__name__ for layer in layers} - _CACHE_LAYERS) + sorted(set(types) - _LAYER_TYPES)
    if others or not layers:
        raise GraftError(
            f"{name} cannot take a grafted cache: its own holds {', '.join(others) or 'nothing'}; {advice}"
        )
    alike = len(kv_layers(model.config))
    if len(layers) != alike:
        raise GraftError(
            f"{name} cannot take a grafted cache: {alike} of the {len(layers)} layers that hold KV do so in one shape; "
            f"{advice}"
        )


def fill_cache(model: PreTrainedModel, kv: KV, token_ids: Tensor) -> GraftedCache:
    """A cache of ``kv``, its keys rotated as ``model`` rotates them; gradients flow through.

    Args:
        model: passes :func:`require_cache_support`.
        kv: the model's own geometry, every layer, keys before rotation; slots in the order of positions, one apart
            from slot to slot, every row ending with its text.
        token_ids: ``[batch, tokens]``, see :class:`GraftedCache`.
    """
    kv = kv.to(model.device)
    cache = GraftedCache(model, kv.mask.long(), kv.positions[:, -1] + 1, token_ids.to(model.device))
    # Bart's kin have two attentions a layer, of one kind.
    modules = {layer: module for module, layer in attention_layers(model).items()}
    places = kv_layers(model.config)
    for layer, rotation in enumerate(rotations_at(model, kv.positions)):
        module, keys, values = modules[layer], kv.keys[:, layer], kv.values[:, layer]
        if keeps_latents(module):
            # One vector stands for both, and each tells of it.
            keys = (keys + values) / 2
        if rotation is not None:
            # In float32 also for a half-precision student: the product is rounded once, at the end.
            keys = rotate(keys.to(torch.promote_types(keys.dtype, torch.float32)), *rotation)
        cache.update(*cache_entry(module, keys.to(model.dtype), values.to(model.dtype)), places[layer])
    return cache
