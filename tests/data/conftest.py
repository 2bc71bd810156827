import pytest

from kvgraft.data import sources


@pytest.fixture(autouse=True)
def nothing_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's hub said is forgotten before the next."""
    monkeypatch.setattr(sources, "_known_parts", {})
    monkeypatch.setattr(sources, "_streamed", {})
