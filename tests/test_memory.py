"""Peak memory of this process."""

from pathlib import Path

import pytest
import torch

from kvgraft.memory import PeakMemory, peak_memory


def test_the_peak_stays_when_memory_is_given_back() -> None:
    before = peak_memory().host_bytes
    # More than the process ever held, so that it must show.
    taken = torch.ones(before + 50_000_000, dtype=torch.uint8)
    size = taken.numel()
    del taken
    assert size < peak_memory().host_bytes < size + 2 * before


@pytest.mark.parametrize("status", [None, "Name:\tpython\nVmRSS:\t1 kB\n"])
def test_a_system_that_does_not_tell_of_peaks(
    status: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if status is not None:
        (tmp_path / "status").write_text(status)
    monkeypatch.setattr("kvgraft.memory._STATUS", tmp_path / "status")
    assert peak_memory().host_bytes > 1024


def test_the_larger_of_both_sides() -> None:
    one, other = PeakMemory(host_bytes=3, device_bytes=1), PeakMemory(host_bytes=2, device_bytes=5)
    assert one.at_least(other) == other.at_least(one) == PeakMemory(host_bytes=3, device_bytes=5)
