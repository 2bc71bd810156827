"""Dropout that is a function of a seed and a place, and so the same however the work is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvgraft.processes import is_apples

# Tokens whose units are drawn by one generator; whoever cuts a text cuts it at a multiple.
TILE_TOKENS = 256
_STEPS = 1 << 16


def draw_seed() -> int:
    """A seed from torch's global generator, so that ``torch.manual_seed`` settles it."""
    return int(torch.randint(1 << 31, ()))


def num_tiles(num_tokens: int) -> int:
    """Tiles that cover a text."""
    return -(-num_tokens // TILE_TOKENS)


def draw_dropout(
    share_dropped: float,
    seed: int,
    places: Sequence[int],
    num_tokens: int,
    num_units: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What dropout multiplies the hidden units of some texts by: 0, or the reciprocal of the kept share.

    ``[places, num_tokens, num_units]`` in ``dtype``. Dropped are ``share_dropped`` of them, to the next 1/65536. A
    longer text begins with the same rows.

    Args:
        share_dropped: in [0, 1).
        seed: of the whole draw.
        places: number of each text's first tile; tiles of :data:`TILE_TOKENS` tokens count on from there, and no two
            may have the same number.
    """
    # Sixteen random bits a unit instead of `bernoulli_`: ten times as fast on a CPU, where dropout otherwise costs a
    # fifth of the matrix products around it. Compared into floats: torch is three to seven times slower at bools.
    weights = torch.empty(len(places), num_tokens, num_units, dtype=dtype, device=device)
    # Apple's accelerator draws no more than 32 bits.
    drawn_on = torch.device("cpu") if is_apples(weights.device) else weights.device
    threshold = min(round(share_dropped * _STEPS), _STEPS - 1)
    for place, text in zip(places, weights, strict=True):
        for number, tile in enumerate(torch.split(text, TILE_TOKENS)):
            generator = torch.Generator(drawn_on).manual_seed((seed + place + number) % (1 << 32))
            words = torch.empty(-(-tile.numel() // 4), dtype=torch.int64, device=drawn_on)
            bits = words.random_(-(1 << 63), None, generator=generator).view(torch.int16)[: tile.numel()]
            torch.ge(bits.view(tile.shape).to(tile.device), threshold - _STEPS // 2, out=tile)
    return weights.mul_(_STEPS / (_STEPS - threshold))
