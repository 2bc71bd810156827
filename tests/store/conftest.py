"""Fixtures of the stores' tests."""

import pytest

from kvgraft.store import writer as writer_module


@pytest.fixture
def early_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store in few bits learns its scales from the first 8 tokens."""
    monkeypatch.setattr(writer_module, "calibration_tokens", lambda dtype: 8)
