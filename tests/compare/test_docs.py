"""Every `kvgraft compare` in the documentation plans what it says, and docs/compare.md knows every arm."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvgraft.cli import app
from kvgraft.compare.arms import KNOWN_ARMS

PAGES = [Path("README.md"), Path("docs/compare.md"), Path("docs/results.md")]


def commands(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = re.findall(r"^kvgraft compare .*$", text, re.MULTILINE)
    return fenced + [" ".join(found.split()) for found in re.findall(r"`(kvgraft compare [^`]*--[^`]*)`", text)]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_in_the_documentation(page: Path) -> None:
    found = commands(page)
    assert found
    for command in found:
        words = shlex.split(command.partition(" >")[0], comments=True)[1:]
        result = CliRunner().invoke(app, [*words, "--print-commands"])
        assert result.exit_code == 0, (command, result.output, result.exception)
        assert "kvgraft train recipes/" in result.stdout


def test_every_known_arm_is_explained() -> None:
    text = Path("docs/compare.md").read_text(encoding="utf-8")
    assert [name for name in KNOWN_ARMS if f"`{name}`" not in text] == []
