"""The guide's three schemes by name (SPEC section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvgraft.projector.adapters import InitMethod


@dataclass(frozen=True)
class Preset:
    """Settings of a projector that go together."""

    mlp_ratio: float
    dropout: float
    init_method: InitMethod


PRESETS = {
    "fast": Preset(0.5, 0.1, "xavier"),  # teachers under 14B
    "standard": Preset(1.0, 0.1, "xavier"),  # 14B to 30B
    "enhanced": Preset(2.0, 0.15, "xavier"),  # 30B to 70B
}
