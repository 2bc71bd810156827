"""Teachers' KV in less than one bit a number: a layer's principal components, each in as many bits as it earns.

A layer's keys and values come from one hidden state, and so do all its heads: they are turned together to their
principal components over the first tokens of a store, keys and values each over their own spread. The bits of a record
are dealt out one by one, each to the component whose error it lowers most; those of least spread get none and are lost.
(Transform coding: Huang and Schultheiss 1963. Bits dealt out by gain: Shoham and Gersho 1988. Levels of a normal
variable for each number of bits: Max 1960.)

A token has a unit, the size of its components over what they usually are, those that vary more counting more, so that a
token which is large as a whole is not clipped.

A layer's record of a token is a bfloat16 unit and the codes end to end, lowest bit first. Its first half lies where a
store keeps keys, its second where it keeps values. All records of a store are equally long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache

import torch
from safetensors.torch import load, save
from torch import Tensor

# 8/9 of a bit a number: 36 layers of 8 heads of 128 then take 8,136 bytes a token.
_CHANNELS_PER_BYTE = 9
_UNIT_BYTES = 2
# What spreads less than this share of a layer's channels is coded as if it spread so much: few tokens leave components
# that do not vary at all, and the next text must not set its unit by them.
_LEAST_DEVIATION = 0.05
_LEAST_UNIT = torch.finfo(torch.bfloat16).smallest_normal
_MOST_BITS = 8
_LLOYD_ROUNDS = 300


def compact_record_bytes(kv_dim: int) -> int:
    """Bytes of one token's keys (or values) in one layer: half of the record that they share."""
    return max(kv_dim // _CHANNELS_PER_BYTE, _UNIT_BYTES)


@dataclass(frozen=True)
class CompactQuantizer:
    """One store's way from numbers to records and back.

    Attributes:
        center: ``[layers, 2, kv_dim]`` float32, subtracted from each channel.
        spread: ``[layers, 2]`` float32, divides keys and values: root of their channels' mean variance.
        components: ``[layers, kept, 2 * kv_dim]`` float32 of float16 precision, orthonormal rows.
        deviation: ``[layers, kept]`` float32, divides each component.
        bits: ``[layers, kept]`` int64 from 0 to 8, of each component's code; equally many in every layer.
    """

    center: Tensor
    spread: Tensor
    components: Tensor
    deviation: Tensor
    bits: Tensor

    @classmethod
    def calibrate(cls, tokens: Tensor, record_bytes: int | None = None) -> CompactQuantizer:
        """The quantizer that suits ``tokens [layers, 2, tokens, kv_dim]`` of any float dtype, at least one.

        ``record_bytes`` are those of keys (or values); default :func:`compact_record_bytes`.
        """
        kv_dim = tokens.shape[-1]
        code_bits = 8 * (2 * (record_bytes or compact_record_bytes(kv_dim)) - _UNIT_BYTES)
        center = tokens.new_empty(len(tokens), 2, kv_dim, dtype=torch.float64)
        spread = center.new_empty(len(tokens), 2)
        variance = center.new_empty(len(tokens), 2 * kv_dim)
        components = center.new_empty(len(tokens), 2 * kv_dim, 2 * kv_dim, dtype=torch.float16)
        for layer, numbers in enumerate(tokens):
            # A layer at a time: all of them in float64 would be twice what waits in memory.
            center[layer] = numbers.double().mean(1)
            centered = numbers - center[layer, :, None]
            spread[layer] = centered.square().mean((1, 2)).sqrt()
            spread[layer].masked_fill_(spread[layer] == 0, 1.0)
            joint = _joined((centered / spread[layer, :, None, None])[None])[0]
            variance[layer], columns = torch.linalg.eigh(joint.T @ joint / len(joint))
            components[layer] = columns.T
        variance.clamp_min_(_LEAST_DEVIATION**2)
        bits = _deal(variance, code_bits)
        kept = (bits > 0).any(0)
        return cls(
            center.float(),
            spread.float(),
            components[:, kept].float(),
            variance[:, kept].sqrt().float(),
            bits[:, kept],
        )

    def to(self, device: torch.device) -> CompactQuantizer:
        """The same for tokens on ``device``."""
        return CompactQuantizer(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def encode(self, tokens: Tensor) -> Tensor:
        """Records ``[layers, 2, tokens, record_bytes]`` uint8 of ``tokens [layers, 2, tokens, kv_dim]``.

        What is too large becomes infinite in :meth:`halves`; the caller looks for it.
        """
        numbers = (tokens.float() - self.center[:, :, None]) / self.spread[:, :, None, None]
        standard = _joined(numbers) @ self.components.transpose(-1, -2) / self.deviation[:, None]
        weights = self.deviation * (self.bits > 0)
        unit = (standard.square() @ (weights / weights.sum(-1, keepdim=True))[..., None]).sqrt()
        unit = unit.clamp_min_(_LEAST_UNIT).bfloat16()
        levels = _levels().to(tokens.device)
        boundaries = ((levels[:, 1:] + levels[:, :-1]) / 2)[self.bits]
        codes = torch.searchsorted(boundaries, (standard / unit.float()).transpose(-1, -2).contiguous())
        records = torch.cat([unit.view(torch.uint8), self._packed(codes.transpose(-1, -2))], -1)
        return _parted(records).contiguous()

    def decode(self, records: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        """Float32 numbers ``[layers, 2, tokens, kv_dim]`` of ``records [layers, 2, tokens, record_bytes]``.

        ``layers`` are the entries of the quantizer's layer axis that the records belong to; default all.
        """
        chosen = slice(None) if layers is None else list(layers)
        bits = self.bits[chosen]
        whole = _joined(records)
        standard = _levels()[bits[:, None], _unpacked(whole[..., _UNIT_BYTES:], bits)]
        standard = standard * self.halves(records)[:, 0].float() * self.deviation[chosen][:, None]
        numbers = _parted(standard @ self.components[chosen])
        return numbers * self.spread[chosen][:, :, None, None] + self.center[chosen][:, :, None]

    def halves(self, records: Tensor) -> Tensor:
        """The units of ``records``, ``[layers, 1, tokens, 1]`` bfloat16; infinite where a number was too large."""
        return _joined(records)[:, None, :, :_UNIT_BYTES].contiguous().view(torch.bfloat16)

    def to_bytes(self) -> bytes:
        """A safetensors file of this quantizer."""
        return save(
            {
                "center": self.center,
                "spread": self.spread,
                "components": self.components.half(),
                "deviation": self.deviation,
                "bits": self.bits.to(torch.uint8),
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> CompactQuantizer:
        """The inverse of :meth:`to_bytes`."""
        tensors = load(content)
        tensors["components"] = tensors["components"].float()
        tensors["bits"] = tensors["bits"].long()
        return cls(**tensors)

    def _packed(self, codes: Tensor) -> Tensor:
        """Bytes ``[layers, tokens, code bytes]`` of ``codes [layers, tokens, kept]``."""
        first, shift = _places(self.bits)
        # A code of at most 8 bits lies in one byte or two. No two codes share a bit: adding them joins them.
        shifted = (codes << shift[:, None]).int()
        code_bytes = int(self.bits[0].sum()) // 8
        found = shifted.new_zeros(*codes.shape[:2], code_bytes + 1)
        place = first[:, None].expand_as(codes)
        found.scatter_add_(-1, place, shifted & 255).scatter_add_(-1, (place + 1).clamp_max(code_bytes), shifted >> 8)
        return found[..., :code_bytes].to(torch.uint8)


def _unpacked(data: Tensor, bits: Tensor) -> Tensor:
    """Codes ``[layers, tokens, kept]`` of ``data [layers, tokens, code bytes]``; ``bits [layers, kept]`` of each."""
    first, shift = _places(bits)
    place, last = first[:, None].expand(-1, data.shape[1], -1), data.shape[-1] - 1
    low, high = (data.gather(-1, place.clamp_max(last)), data.gather(-1, (place + 1).clamp_max(last)))
    return (low.long() | high.long() << 8) >> shift[:, None] & ((1 << bits) - 1)[:, None]


def _places(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The byte in which each code of ``bits [layers, kept]`` begins, and at which bit of it."""
    start = bits.cumsum(-1) - bits
    return start // 8, start % 8


def _parted(joined: Tensor) -> Tensor:
    """``[layers, tokens, 2 * width]`` to ``[layers, 2, tokens, width]``, keys first."""
    return joined.reshape(*joined.shape[:-1], 2, -1).transpose(1, 2)


def _joined(tokens: Tensor) -> Tensor:
    """``[layers, 2, tokens, width]`` as ``[layers, tokens, 2 * width]``."""
    return tokens.transpose(1, 2).flatten(-2)


def _deal(variance: Tensor, code_bits: int) -> Tensor:
    """Bits ``[layers, components]`` of each component, ``code_bits`` in every layer.

    A bit more lowers a component's error by less than the bit before, so the best bits of all are the best choice.
    """
    gain = variance[..., None] * -_normal_errors().diff()
    best = gain.flatten(-2).topk(code_bits, -1).indices // _MOST_BITS
    return torch.zeros_like(variance, dtype=torch.long).scatter_add_(-1, best, torch.ones_like(best))


@cache
def _levels() -> Tensor:
    """The levels of 0 to 8 bits, ``[9, 256]`` float32, infinite where there are fewer."""
    return torch.stack([_best_levels(bits) for bits in range(_MOST_BITS + 1)]).float()


@cache
def _normal_errors() -> Tensor:
    """Mean squared error that each number of bits leaves of a normal variable of variance one, ``[9]`` float64."""
    return torch.stack([_error(_best_levels(bits)[: 2**bits]) for bits in range(_MOST_BITS + 1)])


@cache
def _best_levels(bits: int) -> Tensor:
    """The ``2**bits`` levels nearest to a normal variable, rising, then infinity up to 256 (Lloyd's method)."""
    count = 2**bits
    # The levels that many bits tend to, from which few rounds are left to go.
    levels = math.sqrt(3) * torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(_LLOYD_ROUNDS):
        mass, first_moment = _cells(levels)
        levels = first_moment / mass
    return torch.nn.functional.pad(levels, (0, 2**_MOST_BITS - count), value=math.inf)


def _error(levels: Tensor) -> Tensor:
    mass, first_moment = _cells(levels)
    return 1 - 2 * (levels * first_moment).sum() + (levels.square() * mass).sum()


def _cells(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Mass and first moment of a normal variable where each of ``levels`` is the nearest."""
    infinity = levels.new_tensor([math.inf])
    edges = torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(edges).diff(), -density.diff()
