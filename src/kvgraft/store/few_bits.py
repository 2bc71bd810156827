"""The dtypes that keep numbers in few bits, and the quantizer of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvgraft.store.compact import CompactQuantizer, compact_record_bytes
from kvgraft.store.quantize import QUANTIZED_FORMATS, Quantizer

COMPACT = "compact"
FEW_BITS_DTYPES = (*QUANTIZED_FORMATS, COMPACT)
# Tokens that scales and components come from: several times as many as numbers that are turned together, those of a
# head or of a layer.
_CALIBRATION_TOKENS, _COMPACT_CALIBRATION_TOKENS = 2048, 8192


class FewBitsQuantizer(Protocol):
    """One store's way from numbers ``[layers, 2, tokens, kv_dim]`` to records and back."""

    def to(self, device: torch.device) -> FewBitsQuantizer:
        """The same for tokens on ``device``, in :meth:`encode` and :meth:`halves`."""

    def encode(self, tokens: Tensor) -> Tensor:
        """Records ``[layers, 2, tokens, record_bytes]`` uint8."""

    def decode(self, records: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        """Float32 numbers of records of the entries ``layers`` of the layer axis; default all."""

    def halves(self, records: Tensor) -> Tensor:
        """What is in 16 bits, ``[layers, 1 or 2, tokens, any]``; infinite where a number was too large."""

    def to_bytes(self) -> bytes:
        """A safetensors file of this quantizer."""


def record_bytes(dtype: str, kv_dim: int) -> int:
    """Bytes of one token's keys (or values) in one layer."""
    return compact_record_bytes(kv_dim) if dtype == COMPACT else QUANTIZED_FORMATS[dtype].record_bytes(kv_dim)


def calibration_tokens(dtype: str) -> int:
    """How many of its first tokens a store of ``dtype`` learns its quantizer from."""
    return _COMPACT_CALIBRATION_TOKENS if dtype == COMPACT else _CALIBRATION_TOKENS


def calibrate(dtype: str, tokens: Tensor, head_dim: int) -> FewBitsQuantizer:
    """The quantizer of ``dtype`` that suits ``tokens [layers, 2, tokens, kv_dim]`` of any float dtype, at least one."""
    return CompactQuantizer.calibrate(tokens) if dtype == COMPACT else Quantizer.calibrate(dtype, tokens, head_dim)


def quantizer_from_bytes(dtype: str, content: bytes) -> FewBitsQuantizer:
    """The quantizer of ``dtype`` whose ``to_bytes`` gave ``content``."""
    return CompactQuantizer.from_bytes(content) if dtype == COMPACT else Quantizer.from_bytes(dtype, content)
