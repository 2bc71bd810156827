"""Teachers' KV in one byte or half a byte a number.

Every channel is centred and scaled by its mean and deviation over the first tokens of a store, one pair for each layer,
keys or values, and channel. Of each token, a group of channels shares one step, so that nothing is clipped whatever a
later text brings, and the first tokens of a text, whose norms are unlike the rest, cost the others nothing. With one
byte, the channels with the heaviest tails stay in float16: they would set the step of their group. (Scales by channel:
KIVI, arXiv 2402.02750; outliers kept: LLM.int8, arXiv 2208.07339; steps of small groups, themselves in 8 bits: QLoRA,
arXiv 2305.14314.)

The channels of a head go together, and much of what can be predicted lies in directions of little spread, which an
error of half a step in every channel would drown. Formats whose codes are coarse therefore code the principal
components of each head, each on a scale of its own.

A token's record in one layer's keys or values is ``record_bytes`` long: a float16 unit, the float16 numbers of the kept
channels, for each group its step as a share of the unit, then the codes. All records of a store are equally long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from safetensors.torch import load, save
from torch import Tensor

from kvgraft.store.layer_runs import layer_runs

_HALF_BYTES = 2
_LEAST_LOADING = 1e-6
_LEAST_UNIT = torch.finfo(torch.half).smallest_normal
# A group's step is a signed byte: its size counts eighths of an octave below the unit, from 1 on.
_SHARES_PER_OCTAVE, _SMALLEST_SHARE = 8, 127
_STEPS_TRIED = 3
_SIZES = torch.tensor([0.0, *(2 ** (-power / _SHARES_PER_OCTAVE) for power in range(_SMALLEST_SHARE))])
_FLOAT8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
# Numbers that are worked on at once.
_MOST = 1 << 18
_SHARES = torch.cat([_SIZES, _SIZES[:1], -_SIZES[1:].flip(0)])


@dataclass(frozen=True)
class QuantizedFormat:
    """How numbers become codes.

    Attributes:
        bits: bits of a code, 8 or 4.
        lowest, highest: the range of codes. The largest number of a group has the code ``lowest``, its sign being that
            of the step; with 4 bits it may be clipped a little.
        group: most channels that share a step.
        least_deviation: what spreads less than this share of its layer is coded as if it spread so much: constant
            channels exist, and one that wakes up must not set the step of its group alone.
        channels_per_exact: one channel in so many stays in float16; None for none.
        components: the principal components of each head are coded and not its channels.
        floating: codes are float8 (e4m3) and not whole numbers.
    """

    bits: int
    lowest: int
    highest: int
    group: int
    least_deviation: float
    channels_per_exact: int | None = None
    components: bool = False
    floating: bool = False

    def groups(self, kv_dim: int) -> int:
        """Groups of ``kv_dim`` channels, all of one size."""
        size = next(size for size in range(min(self.group, kv_dim), 0, -1) if kv_dim % size == 0)
        return kv_dim // size

    def exact_channels(self, kv_dim: int) -> int:
        """Channels of ``kv_dim`` that stay in float16."""
        return kv_dim // self.channels_per_exact if self.channels_per_exact else 0

    def code_bytes(self, kv_dim: int) -> int:
        """Bytes of the codes of ``kv_dim`` channels."""
        return kv_dim * self.bits // 8

    def record_bytes(self, kv_dim: int) -> int:
        """Bytes of one token's keys (or values) in one layer."""
        return _HALF_BYTES * (1 + self.exact_channels(kv_dim)) + self.groups(kv_dim) + self.code_bytes(kv_dim)


QUANTIZED_FORMATS: dict[str, QuantizedFormat] = {
    "int8": QuantizedFormat(bits=8, lowest=-128, highest=127, group=128, least_deviation=0.01, channels_per_exact=128),
    "float8": QuantizedFormat(
        bits=8, lowest=-448, highest=448, group=128, least_deviation=1e-4, components=True, floating=True
    ),
    "int4": QuantizedFormat(bits=4, lowest=-8, highest=7, group=16, least_deviation=1e-4, components=True),
}


@dataclass(frozen=True)
class Quantizer:
    """One store's way from numbers to records and back.

    Attributes:
        dtype: a name of :data:`QUANTIZED_FORMATS`.
        center: ``[layers, 2, kv_dim]`` float32, subtracted from each channel.
        deviation: likewise, divides each channel, or each component.
        exact: ``[layers, 2, kept]`` int64, the channels that stay in float16.
        components: ``[layers, 2, heads, head_dim, head_dim]`` float32, orthonormal columns; no heads where channels
            are coded as they are.
    """

    dtype: str
    center: Tensor
    deviation: Tensor
    exact: Tensor
    components: Tensor

    @classmethod
    def calibrate(cls, dtype: str, tokens: Tensor, head_dim: int) -> Quantizer:
        """The quantizer that suits ``tokens [layers, 2, tokens, kv_dim]`` of any float dtype, at least one."""
        scheme = QUANTIZED_FORMATS[dtype]
        numbers = tokens.double()
        center = numbers.mean(2)
        numbers = numbers - center[:, :, None]
        components = numbers.new_zeros(*center.shape[:2], 0, head_dim, head_dim)
        if scheme.components:
            heads = _split(numbers, tokens.shape[-1] // head_dim)
            _, components = torch.linalg.eigh(torch.einsum("lkthi,lkthj->lkhij", heads, heads))
            # Without what rounding leaves there, a channel that is constant comes back constant.
            components = components.where(components.abs() > _LEAST_LOADING, 0.0)
            numbers = torch.einsum("lkthi,lkhij->lkthj", heads, components).flatten(-2)
        deviation = numbers.square().mean(2).sqrt()
        floor = scheme.least_deviation * deviation.square().mean(-1, keepdim=True).sqrt()
        # One token, or equal ones, have no spread at all; any will do.
        deviation = torch.where(floor > 0, deviation.maximum(floor), torch.ones_like(deviation))
        tails = (numbers / deviation[:, :, None]).abs().amax(2)
        # Sorted: the same channels give the same bytes.
        exact = tails.topk(scheme.exact_channels(tokens.shape[-1]), dim=-1).indices.sort(-1).values
        return cls(dtype, center.float(), deviation.float(), exact, components.float().contiguous())

    def to(self, device: torch.device) -> Quantizer:
        """The same for tokens on ``device``."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _tensor_names()})

    def encode(self, tokens: Tensor) -> Tensor:
        """Records ``[layers, 2, tokens, record_bytes]`` uint8 of ``tokens [layers, 2, tokens, kv_dim]``.

        What is too large becomes infinite in :meth:`halves`; the caller looks for it.
        """
        return torch.cat([self._encode_layers(tokens[layers], layers) for layers in layer_runs(tokens.shape, _MOST)])

    def _encode_layers(self, tokens: Tensor, layers: slice) -> Tensor:
        scheme, kv_dim = QUANTIZED_FORMATS[self.dtype], tokens.shape[-1]
        numbers = tokens.float()
        index = _for_each_token(self.exact[layers], tokens.shape[2])
        exact = numbers.gather(-1, index).half()
        standard = numbers - self.center[layers, :, None]
        if scheme.components:
            _turn(standard, self.components[layers])
        standard = standard.div_(self.deviation[layers, :, None]).scatter_(-1, index, 0.0)
        grouped = _split(standard, scheme.groups(kv_dim))
        unit, share = _steps(grouped, scheme)
        codes = grouped.div_(_step_sizes(share, unit)).flatten(-2)
        return torch.cat([_bytes(unit), _bytes(exact), share, _pack(codes, scheme)], -1)

    def decode(self, records: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        """Float32 numbers ``[layers, 2, tokens, kv_dim]`` of ``records [layers, 2, tokens, record_bytes]``.

        ``layers`` are the entries of the quantizer's layer axis that the records belong to; default all.
        """
        chosen = list(range(len(records))) if layers is None else list(layers)
        numbers = torch.empty(*records.shape[:-1], self.center.shape[-1])
        # Without components nothing is made on the way that would leave the caches.
        components = QUANTIZED_FORMATS[self.dtype].components
        runs = layer_runs(numbers.shape, _MOST) if components else [slice(len(records))]
        for run in runs:
            self._decode_layers(records[run], chosen[run], numbers[run])
        return numbers

    def _decode_layers(self, records: Tensor, chosen: list[int], numbers: Tensor) -> None:
        """Write into ``numbers`` what is in ``records``."""
        scheme, kv_dim = QUANTIZED_FORMATS[self.dtype], numbers.shape[-1]
        groups, kept = scheme.groups(kv_dim), scheme.exact_channels(kv_dim)
        widths = [_HALF_BYTES * (1 + kept), groups, scheme.code_bytes(kv_dim)]
        _, share, codes = torch.split(records, widths, -1)
        half = self.halves(records).float()
        _unpack(codes, scheme, numbers)
        _split(numbers, groups).mul_(_step_sizes(share, half[..., :1]))
        numbers.mul_(self.deviation[chosen][:, :, None])
        if scheme.components:
            _turn(numbers, self.components[chosen].transpose(-1, -2))
        numbers.add_(self.center[chosen][:, :, None])
        numbers.scatter_(-1, _for_each_token(self.exact[chosen], records.shape[2]), half[..., 1:])

    def halves(self, records: Tensor) -> Tensor:
        """The float16 part of ``records``, ``[layers, 2, tokens, 1 + kept]``; infinite where a number was too large."""
        count = 1 + self.exact.shape[-1]
        return records[..., : _HALF_BYTES * count].contiguous().view(torch.half)

    def to_bytes(self) -> bytes:
        """A safetensors file of this quantizer."""
        return save({name: getattr(self, name) for name in _tensor_names()})

    @classmethod
    def from_bytes(cls, dtype: str, content: bytes) -> Quantizer:
        """The inverse of :meth:`to_bytes`."""
        tensors = load(content)
        return cls(dtype, *(tensors[name] for name in _tensor_names()))


def _tensor_names() -> list[str]:
    return [field.name for field in fields(Quantizer) if field.name != "dtype"]


def _split(numbers: Tensor, parts: int) -> Tensor:
    """A view ``[..., parts, width / parts]`` of ``numbers [..., width]``."""
    return numbers.view(*numbers.shape[:-1], parts, numbers.shape[-1] // parts)


def _turn(numbers: Tensor, matrices: Tensor) -> None:
    """In place, ``numbers [layers, 2, tokens, kv_dim]`` times ``matrices [layers, 2, heads, head_dim, head_dim]``."""
    heads = _split(numbers, matrices.shape[2]).transpose(2, 3)
    heads.copy_(heads @ matrices)


def _for_each_token(channels: Tensor, tokens: int) -> Tensor:
    """``channels [layers, 2, kept]`` as ``[layers, 2, tokens, kept]``."""
    return channels[:, :, None].expand(-1, -1, tokens, -1)


def _steps(grouped: Tensor, scheme: QuantizedFormat) -> tuple[Tensor, Tensor]:
    """Unit ``[..., 1]`` float16 and each group's share ``[..., groups]`` uint8 of ``grouped [..., groups, size]``."""
    highest, lowest = grouped.amax(-1), grouped.amin(-1)
    peak = torch.where(highest >= -lowest, highest, lowest)
    step = peak / scheme.lowest
    unit = step.abs().amax(-1, keepdim=True).half().clamp_min_(_LEAST_UNIT)
    below = (unit.float() / step.abs()).log2_().mul_(_SHARES_PER_OCTAVE)
    size = below.floor_().clamp_(0, _SMALLEST_SHARE - 1).add_(1)
    shares = torch.where(step < 0, -size, size).to(torch.int8)
    if scheme.bits == 4:
        shares = _closest(grouped, unit, shares, scheme)
    return unit, shares.view(torch.uint8)


def _closest(grouped: Tensor, unit: Tensor, shares: Tensor, scheme: QuantizedFormat) -> Tensor:
    """Of ``shares``, which clip nothing, and the next smaller steps, those that leave each group the least error.

    With 16 codes, clipping the largest number a little may cost less than a larger step costs all the others.
    """
    least = grouped.new_full(shares.shape, torch.inf)
    best = shares
    for smaller in range(_STEPS_TRIED):
        tried = (shares.abs().clamp_(max=_SMALLEST_SHARE - smaller) + smaller) * shares.sign()
        step = _step_sizes(tried.view(torch.uint8), unit)
        error = _rounded(grouped / step, scheme).mul_(step).sub_(grouped).square_().sum(-1)
        best = torch.where(error < least, tried, best)
        least = torch.minimum(error, least)
    return best


def _step_sizes(share: Tensor, unit: Tensor) -> Tensor:
    """The steps ``[..., groups, 1]`` that ``share [..., groups]`` uint8 of ``unit [..., 1]`` are."""
    return (_SHARES.to(share.device)[share.long()] * unit.float())[..., None]


def _rounded(codes: Tensor, scheme: QuantizedFormat) -> Tensor:
    """``codes`` as whole numbers in range, in place."""
    return codes.round_().clamp_(scheme.lowest, scheme.highest)


def _bytes(halves: Tensor) -> Tensor:
    return halves.contiguous().view(torch.uint8)


def _pack(codes: Tensor, scheme: QuantizedFormat) -> Tensor:
    if scheme.floating:
        return codes.clamp_(scheme.lowest, scheme.highest).to(torch.float8_e4m3fn).view(torch.uint8)
    whole = _rounded(codes, scheme).to(torch.int8)
    if scheme.bits == 8:
        return whole.view(torch.uint8)
    first, second = (whole - scheme.lowest).view(torch.uint8).chunk(2, -1)
    return first | second << 4


def _unpack(codes: Tensor, scheme: QuantizedFormat, into: Tensor) -> None:
    if scheme.floating:
        # Looked up: torch converts float8 number by number.
        into.copy_(_FLOAT8.index_select(0, codes.flatten().int()).view(codes.shape))
    elif scheme.bits == 8:
        into.copy_(codes.view(torch.int8))
    else:
        first, second = into.chunk(2, -1)
        first.copy_(codes & 15)
        second.copy_(codes >> 4)
        into.add_(scheme.lowest)
