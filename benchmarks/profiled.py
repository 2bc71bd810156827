"""What a piece of work spends its time in, by PyTorch's own profiler."""

from __future__ import annotations

from collections.abc import Callable

import torch

_ROWS = 8


def profile_table(work: Callable[[], object], title: str) -> str:
    """Shares of the operations that ``work`` spends most in, as a Markdown table; run once before, uncounted."""
    work()
    with torch.profiler.profile() as profiled:
        work()
    found = sorted(profiled.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
    whole = sum(entry.self_cpu_time_total for entry in found)
    rows = [f"| {entry.key} | {entry.self_cpu_time_total / whole:.1%} |" for entry in found[:_ROWS]]
    return "\n".join([f"| operation of {title} | share |\n| --- | ---: |", *rows, ""])
