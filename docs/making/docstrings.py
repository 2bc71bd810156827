"""Read for the site what docstrings say their own way: cross-references, and parameters described together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([^`]+)`")
_SECTION = re.compile(r"^(Args|Attributes):$")
_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.*)$")


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """``:func:`name``` becomes a code span, and ``a, b: text`` one entry for ``a`` and one for ``b``."""
        if obj.docstring:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = "\n".join(_one_entry_for_each_name(text.split("\n")))


def _one_entry_for_each_name(lines: list[str]) -> Iterator[str]:
    names: list[str] = []
    entry: list[str] = []
    in_section = False
    for line in [*lines, ""]:
        goes_on = bool(names) and line.startswith(" " * 8)
        if not goes_on:
            for name in names:
                yield f"    {name}: {entry[0]}"
                yield from entry[1:]
            names, entry = [], []
        if line and not line.startswith(" "):
            in_section = _SECTION.match(line) is not None
        found = _ENTRY.match(line) if in_section else None
        if goes_on:
            entry.append(line)
        elif found:
            names, entry = found[1].split(", "), [found[2]]
        else:
            yield line
