"""How much memory this process took at its most, and how much there is."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from pydantic import BaseModel, ConfigDict

_STATUS = Path("/proc/self/status")


class PeakMemory(BaseModel):
    """The most memory that a process held at once, in bytes.

    Attributes:
        host_bytes: resident memory; pages of files that the process maps count where they were read.
        device_bytes: what tensors took on its accelerator; 0 without one.
    """

    model_config = ConfigDict(extra="forbid")

    host_bytes: int
    device_bytes: int = 0

    def at_least(self, other: PeakMemory) -> PeakMemory:
        """The larger of both, host and device each."""
        return PeakMemory(
            host_bytes=max(self.host_bytes, other.host_bytes), device_bytes=max(self.device_bytes, other.device_bytes)
        )


def peak_memory() -> PeakMemory:
    """Peak of this process since it started."""
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return PeakMemory(host_bytes=_host_peak(), device_bytes=device)


def free_memory() -> int:
    """Bytes that are free, on the host or on its accelerator, whichever has more."""
    device = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return max(int(psutil.virtual_memory().available), device)


def _host_peak() -> int:
    if _STATUS.is_file():
        # Not getrusage: on Linux its peak comes down from the process that started this one. gVisor has no such line.
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):
        return int(memory.peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
