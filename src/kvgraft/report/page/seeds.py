"""What was measured with one seed, whether one run holds it or every arm has a run of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvgraft.report.results import ArmResult
from kvgraft.report.run_folder import RunFolder


@dataclass(frozen=True)
class SeedMeasurements:
    """All arms with one seed: their results, and the events that training logged of them (``arm``, ``step``, ...)."""

    seed: int
    arms: Sequence[ArmResult]
    events: Sequence[dict[str, Any]]

    def arm(self, name: str) -> ArmResult | None:
        """The result of arm ``name``, or None if there is none."""
        return next((arm for arm in self.arms if arm.arm == name), None)


def measurements_of(run: RunFolder) -> SeedMeasurements:
    """What ``run`` holds."""
    return SeedMeasurements(run.seed, run.result.arms, run.metrics)
