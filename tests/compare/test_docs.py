"""docs/compare.md knows every arm."""

from pathlib import Path

from kvgraft.compare.arms import KNOWN_ARMS


def test_every_known_arm_is_explained() -> None:
    text = Path("docs/compare.md").read_text(encoding="utf-8")
    assert [name for name in KNOWN_ARMS if f"`{name}`" not in text] == []
