"""What the adapters of one teacher read: keys and values of the layers that each of them takes, joined."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvgraft.errors import ProjectorError
from kvgraft.kv import KV

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AdapterInputs:
    """Keys and values from which the input of every adapter's layer is joined.

    Attributes:
        keys, values: ``[batch, layers, tokens, width]``.
        read: for each output layer the layers that it reads, as many for all.
        both: whether keys and values are each made from keys and values.
    """

    keys: Tensor
    values: Tensor
    read: list[list[int]]
    both: bool

    @property
    def num_layers(self) -> int:
        """Output layers."""
        return len(self.read)

    def to(self, dtype: torch.dtype) -> AdapterInputs:
        """The same numbers in ``dtype``."""
        return replace(self, keys=self.keys.to(dtype), values=self.values.to(dtype))

    def of_layers(self, layers: range) -> tuple[Tensor, Tensor]:
        """``[batch, layers, tokens, in_dim]`` of some output layers, for the key adapter and for the value adapter."""
        chosen = self.read[layers.start : layers.stop]
        if self.both:
            joined = _joined([self.keys, self.values], chosen)
            return joined, joined
        return _joined([self.keys], chosen), _joined([self.values], chosen)


def _joined(parts: list[Tensor], read: list[list[int]]) -> Tensor:
    """The layers of ``parts`` that each of ``read`` names, side by side: a view where that is one run of one part."""
    if len(parts) == 1 and all(len(layers) == 1 for layers in read):
        first = read[0][0]
        if read == [[first + step] for step in range(len(read))]:
            return parts[0][:, first : first + len(read)]
    rows = [torch.cat([part[:, layer] for part in parts for layer in layers], -1) for layers in read]
    return rows[0][:, None] if len(rows) == 1 else torch.stack(rows, 1)


def with_previous_tokens(tensor: Tensor, count: int) -> Tensor:
    """``[..., layers, tokens, width]`` to ``[..., layers * (1 + count), tokens, width]``: first the tokens themselves,
    then those one before, two before and so on; a text's first token stands for those before it.
    """
    steps = [tensor]
    for _ in range(count):
        steps.append(torch.cat([steps[-1][..., :1, :], steps[-1][..., :-1, :]], -2))
    return steps[0] if count == 0 else torch.cat(steps, -3)


def as_pair(teacher: str, keys: Tensor | KV | Pair, values: Tensor | None) -> Pair:
    """Keys and values as two tensors, from any form that a projector takes them in; ``teacher`` is named in errors."""
    if isinstance(keys, KV) and values is None:
        return keys.flatten()
    if isinstance(keys, tuple | list) and len(keys) == 2 and values is None:
        keys, values = keys
    if isinstance(keys, Tensor) and isinstance(values, Tensor):
        return keys, values
    raise ProjectorError(
        f"KV for teacher {teacher!r} must be two tensors (keys, values) or one KV; got {type(keys).__name__} and "
        f"{type(values).__name__}"
    )
