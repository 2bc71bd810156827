"""Columns of data sets under the names that kvgraft knows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kvgraft.data.sources import Row
from kvgraft.errors import DataError

_NAMED = re.compile(r"\{([^{}]+)\}")
# Who speaks in ShareGPT's form, and what chat templates call them.
_ROLES = {"human": "user", "gpt": "assistant"}


def in_known_form(rows: Iterable[Row], columns: Mapping[str, str]) -> Iterator[Row]:
    """``rows`` without nulls, their columns named as :func:`kvgraft.data.datasets.load_examples` knows them.

    Args:
        columns: what stands for a name: another column, or text in which each ``{column}`` is its text, nothing for
            null. Without any, rows are as they are, with ShareGPT's ``conversations`` as ``messages``.

    Raises:
        DataError: a row lacks a column, or text is made of one that is neither text nor a number.
    """
    for where, row in rows:
        named = {name: _value(where, row, wanted) for name, wanted in columns.items()} if columns else row
        # Rows of a table have every column, and null in those that are not theirs.
        known = {name: value for name, value in named.items() if value is not None}
        messages = known.get("messages", known.get("conversations"))
        if isinstance(messages, list):
            known["messages"] = [_message(message) for message in messages]
        yield where, known


def _value(where: str, row: Mapping[str, Any], wanted: str) -> Any:
    needed = _NAMED.findall(wanted) or [wanted]
    missing = [column for column in needed if column not in row]
    if missing:
        raise DataError(f"{where}: data.columns takes `{missing[0]}`, which is not there; found {sorted(row)}")
    if needed == [wanted]:
        return row[wanted]
    for column in needed:
        if not isinstance(row[column], str | int | float | None):
            raise DataError(
                f"{where}: data.columns makes text of `{column}`, which holds a {type(row[column]).__name__}: "
                f"{str(row[column])[:60]!r}; name one of text or numbers"
            )
    return _NAMED.sub(lambda match: "" if row[match[1]] is None else str(row[match[1]]), wanted)


def _message(message: Any) -> Any:
    if not isinstance(message, Mapping) or not message.keys() >= {"from", "value"}:
        return message
    return {"role": _ROLES.get(str(message["from"]), message["from"]), "content": message["value"]}
