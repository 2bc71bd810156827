"""What `make test-oldest` installs is what the package says it works with."""

from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


def test_constraints_are_the_floors_of_the_package() -> None:
    needed = [Requirement(text) for text in requires("kvgraft") or []]
    floors = {
        need.name.lower(): _version(need, ">=")
        for need in needed
        if need.marker is None or need.marker.evaluate({"extra": "gguf"})
    }
    pinned = [Requirement(line) for line in Path("constraints-oldest.txt").read_text().splitlines() if line[0] != "#"]
    constraints = {pin.name: _version(pin, "==") for pin in pinned}
    # torch is that of constraints.txt: others bring gigabytes.
    assert constraints | {"torch": floors["torch"]} == floors


def _version(requirement: Requirement, operator: str) -> Version:
    (version,) = (Version(part.version) for part in requirement.specifier if part.operator == operator)
    return version
