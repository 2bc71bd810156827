"""The one data type that flows through every room: the keys and values of a batch of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvgraft.errors import KVGraftError


@dataclass(frozen=True)
class KVGeometry:
    """Shape of what one model stores for a token: layers that hold KV, key/value heads and the width of a head."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    @property
    def kv_dim(self) -> int:
        """Width of one token's keys (or values) in one layer: ``num_kv_heads * head_dim``."""
        return self.num_kv_heads * self.head_dim

    def bytes_per_token(self, bytes_per_number: int) -> int:
        """Bytes that keys and values of one token take over all layers."""
        return 2 * self.num_layers * self.kv_dim * bytes_per_number


@dataclass(frozen=True)
class KV:
    """Keys and values of a batch of texts in chosen layers of one model.

    Attributes:
        keys: ``[batch, layers, heads, tokens, head_dim]``.
        values: the same shape as ``keys``.
        positions: ``[batch, tokens]`` int64, the position that rotates each token's key.
        mask: ``[batch, tokens]`` bool, true where a token is real and not padding.
        layers: which layer each entry of the layer axis is, counted among those of the model that hold KV.
        rotated: whether the keys carry their rotary rotation (post-RoPE).
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    mask: Tensor
    layers: tuple[int, ...]
    rotated: bool = False

    def __post_init__(self) -> None:
        if self.keys.dim() != 5 or self.keys.shape != self.values.shape:
            raise KVGraftError(
                f"keys and values must share one shape [batch, layers, heads, tokens, head_dim]; "
                f"got keys {tuple(self.keys.shape)} and values {tuple(self.values.shape)}"
            )
        batch, num_layers, _, tokens, _ = self.keys.shape
        if len(self.layers) != num_layers:
            raise KVGraftError(f"KV has {num_layers} layers but names {len(self.layers)}: {list(self.layers)}")
        for name, tensor in (("positions", self.positions), ("mask", self.mask)):
            if tuple(tensor.shape) != (batch, tokens):
                raise KVGraftError(f"{name} must be [{batch}, {tokens}] to go with the keys; got {list(tensor.shape)}")

    @property
    def geometry(self) -> KVGeometry:
        """Layers, heads and head width of what is held here."""
        _, num_layers, heads, _, head_dim = self.keys.shape
        return KVGeometry(num_layers, heads, head_dim)

    def flatten(self) -> tuple[Tensor, Tensor]:
        """Keys and values with the heads joined: two tensors ``[batch, layers, tokens, kv_dim]``."""
        return _join_heads(self.keys), _join_heads(self.values)

    def unflatten(self, keys: Tensor, values: Tensor, geometry: KVGeometry, layers: Sequence[int] | None = None) -> KV:
        """This KV's tokens with other contents: ``[batch, layers, tokens, kv_dim]`` split into ``geometry``'s heads.

        ``layers`` names them, default as in this KV.
        """
        heads = (geometry.num_kv_heads, geometry.head_dim)
        return replace(
            self,
            keys=keys.reshape(*keys.shape[:-1], *heads).transpose(2, 3),
            values=values.reshape(*values.shape[:-1], *heads).transpose(2, 3),
            layers=self.layers if layers is None else tuple(layers),
        )

    def select_layers(self, layers: Sequence[int]) -> KV:
        """The KV of ``layers`` (indices in the model, repeats allowed), in that order."""
        missing = [layer for layer in layers if layer not in self.layers]
        if missing:
            raise KVGraftError(f"layers {missing} are not in this KV, which holds layers {list(self.layers)}")
        index = [self.layers.index(layer) for layer in layers]
        return replace(self, keys=self.keys[:, index], values=self.values[:, index], layers=tuple(layers))

    def to(self, *args: object, **kwargs: object) -> KV:
        """Keys and values moved or cast as ``torch.Tensor.to`` does; positions and mask only change device."""
        keys = self.keys.to(*args, **kwargs)  # type: ignore[call-overload]
        values = self.values.to(*args, **kwargs)  # type: ignore[call-overload]
        return replace(
            self, keys=keys, values=values, positions=self.positions.to(keys.device), mask=self.mask.to(keys.device)
        )

    def pin_memory(self) -> KV:
        """The same numbers in page-locked memory, which a GPU copies from faster; torch's data loader asks for it."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("keys", "values", "positions", "mask")}
        return replace(self, **pinned)

    def detach(self) -> KV:
        """The same numbers without their gradient history."""
        return replace(self, keys=self.keys.detach(), values=self.values.detach())

    def require_finite(self, source: str) -> KV:
        """This KV, or an error naming ``source``, the layer and the sample where a real token has NaN or Inf."""
        for kind, tensor in (("keys", self.keys), ("values", self.values)):
            if all_finite(tensor):
                continue
            bad = ~torch.isfinite(tensor) & self.mask[:, None, None, :, None]
            if bad.any():
                sample, layer, _, token, _ = (int(index) for index in bad.nonzero()[0])
                raise KVGraftError(
                    f"{kind} of {source} are not finite at sample {sample}, layer {self.layers[layer]}, token {token}. "
                    "Load the model in float32 or bfloat16, or leave this sample out."
                )
        return self


def all_finite(tensor: Tensor) -> bool:
    """Whether no number of ``tensor`` is NaN or Inf."""
    # A sum is many times cheaper than a look at each number, and finite only where all of them are.
    total = tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return math.isfinite(float(total)) or bool(torch.isfinite(tensor).all())


def real_tokens(part: Tensor, mask: Tensor) -> Tensor:
    """``[layers, real tokens, kv_dim]`` of keys or values ``part [batch, layers, tokens, kv_dim]``, text after text."""
    return part.transpose(0, 1)[:, mask]


def stack_kv(samples: Sequence[KV], dtype: torch.dtype | None = None) -> KV:
    """One batch from samples of the same layers and heads, right-padded with zeros to the longest.

    ``dtype`` is that of the batch's keys and values; default the first sample's. One sample alone is given back as it
    is, or cast.
    """
    first = samples[0]
    if len(samples) == 1:
        return first if dtype is None else first.to(dtype)
    length = max(sample.keys.shape[3] for sample in samples)
    batch = sum(sample.keys.shape[0] for sample in samples)
    shape = (batch, *first.keys.shape[1:3], length, first.keys.shape[4])
    keys, values = (part.new_zeros(shape, dtype=dtype) for part in (first.keys, first.values))
    positions = first.positions.new_zeros(batch, length)
    mask = first.mask.new_zeros(batch, length)
    row = 0
    for sample in samples:
        if sample.layers != first.layers or sample.rotated != first.rotated:
            raise KVGraftError(f"cannot stack KV of layers {first.layers} with KV of layers {sample.layers}")
        rows, tokens = slice(row, row + sample.keys.shape[0]), sample.keys.shape[3]
        keys[rows, :, :, :tokens] = sample.keys
        values[rows, :, :, :tokens] = sample.values
        positions[rows, :tokens] = sample.positions
        mask[rows, :tokens] = sample.mask
        row = rows.stop
    return KV(keys, values, positions, mask, first.layers, first.rotated)


def _join_heads(tensor: Tensor) -> Tensor:
    return tensor.transpose(2, 3).flatten(3)
