"""What the README and the pages of docs/ hold: shell commands, YAML, Python and names in code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PAGES = [Path("README.md"), Path("README.zh.md"), *sorted(Path("docs").glob("*.md"))]
# What a command may start with; anything else in a block without a language fails.
PROGRAMS = ("kvgraft", "make", "python", "accelerate", "torchrun", "pip", "tensorboard")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`]+)`")
_ASSIGNMENT = re.compile(r"^[A-Z_]+=")


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the fenced blocks of ``language``; the empty one is the shell's."""
    return [body for found, body in _FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def code_spans(page: Path) -> list[str]:
    """Code inside sentences and tables."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in _CODE.findall(text)]


def fenced_commands(page: Path) -> list[str]:
    """Every line of the blocks without a language, continued lines joined."""
    lines = [line for body in blocks(page, "") for line in body.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if line.strip()]


def inline_commands(page: Path) -> list[str]:
    """Commands in sentences that have an argument; those that leave some out (``...``) are no commands yet."""
    spans = [span for span in code_spans(page) if span.split()[0] in PROGRAMS]
    return [span for span in spans if len(span.split()) > 2 and "..." not in span]


def named_commands(page: Path) -> list[str]:
    """The ``train`` of every ``kvgraft train`` in a sentence."""
    return [span.split()[1] for span in code_spans(page) if span.startswith("kvgraft ")]


def words_of(command: str) -> list[str]:
    """What the shell would run: without comment, output file, timing and settings of the environment."""
    words = shlex.split(command, comments=True)
    if ">" in words:
        words = words[: words.index(">")]
    while words[0] == "time" or _ASSIGNMENT.match(words[0]):
        words = words[1:]
    return words
