"""Rows of files, folders, and data sets of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from kvgraft.errors import DataError

Split = Literal["train", "held_out"]
Row = tuple[str, Mapping[str, Any]]  # where the row stands (for errors), and its columns

KNOWN_FORMS = "`messages` or `conversations`, `prompt` + `completion`, `question` + `answer`, or `text`"
KNOWN_SOURCES = (
    "word_problems, a JSONL, JSON, CSV or Parquet file, a folder, or a hub data set as owner/name or "
    "owner/name:config, with [part] behind it for one part"
)
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "held_out": ("held_out", "test", "validation", "valid", "eval", "dev"),
}
# Ends of names of files with a JSON object a line, and of those that `datasets` reads.
_JSON_LINES = (".jsonl", ".json", ".txt")
_OF_DATASETS = (".csv", ".tsv", ".parquet", ".arrow")
HUB_ALIASES = {"gsm8k": "openai/gsm8k:main", "openai/gsm8k": "openai/gsm8k:main"}


def read_rows(source: str, split: Split, streaming: bool) -> Iterator[Row]:
    """The rows of ``split`` of ``source``, in its own order; of one without parts all, whatever ``split`` says.

    A data set with ``[part]`` behind it is that part alone.

    Raises DataError where there is no such source or part, and while its rows are read.
    """
    path = Path(source).expanduser()
    if _is_file(source):
        return _read_table(path, streaming) if _is_table(path) else _read_jsonl(path)
    if _is_saved_part(path):
        return _read_saved_part(path)
    if path.is_dir():
        part = _jsonl_part(path, split)
        if part is not None:
            return _read_jsonl(part)
        found = sorted(file.name for file in path.glob("*.jsonl"))
        if found:
            raise DataError(
                f"{path} holds {', '.join(found)} but no {split} part; expected "
                f"{' or '.join(f'{name}.jsonl' for name in SPLIT_NAMES[split])}, or name the file itself"
            )
        return _read_hub(source, split, streaming)
    return _streamed_once(source, split) if streaming else _read_hub(source, split, streaming=False)


def has_parts(source: str) -> bool:
    """Whether ``source`` has a held-out part beside that to train on, which no file and no saved ``Dataset`` has."""
    path = Path(source).expanduser()
    if _is_file(source) or _is_saved_part(path):
        return False
    if path.is_dir() and any(path.glob("*.jsonl")):
        return _jsonl_part(path, "held_out") is not None
    name, config, part = _data_set(source)
    return part is None and not {*SPLIT_NAMES["held_out"]}.isdisjoint(_parts(name, config))


def _jsonl_part(folder: Path, split: Split) -> Path | None:
    files = (folder / f"{name}.jsonl" for name in SPLIT_NAMES[split])
    return next((file for file in files if file.is_file()), None)


def _is_file(source: str) -> bool:
    path = Path(source).expanduser()
    looks_local = path.suffix in (*_JSON_LINES, *_OF_DATASETS) or source.startswith((".", "/", "~"))
    if looks_local and not path.exists():
        raise DataError(f"no file or folder at {path} (looked in {Path.cwd()}); give {KNOWN_SOURCES}")
    return path.is_file()


def _is_table(path: Path) -> bool:
    """Whether a file is one that ``datasets`` reads: JSON that is one list, too, as Alpaca's is."""
    with path.open("rb") as file:
        return path.suffix in _OF_DATASETS or (path.suffix == ".json" and file.read(64).lstrip()[:1] == b"[")


def _read_table(path: Path, streaming: bool) -> Iterator[Row]:
    import datasets  # slow to import, and only needed here and below

    place, name = str(path.parent), path.name
    return _loaded(str(path), lambda: datasets.load_dataset(place, data_files=name, split="train", streaming=streaming))


def _is_saved_part(path: Path) -> bool:
    """Whether ``path`` is what ``datasets.Dataset.save_to_disk`` wrote; a DatasetDict has a folder so for each part."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _read_saved_part(path: Path) -> Iterator[Row]:
    import datasets

    return _loaded(str(path), lambda: datasets.load_from_disk(str(path)))


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # both bad JSON and bytes that are no UTF-8
                raise DataError(f"{where}: not readable as JSON ({error}); expected one JSON object a line") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: holds a {type(row).__name__}; expected a JSON object with {KNOWN_FORMS}")
            yield where, row


def _read_hub(source: str, split: Split, streaming: bool) -> Iterator[Row]:
    import datasets

    name, config, asked = _data_set(source)
    parts, names = _parts(name, config), (asked,) if asked else SPLIT_NAMES[split]
    part = next((part for part in names if part in parts), None)
    if part is None:
        would_be = "" if asked else f", and {split} would be {' or '.join(names)}"
        raise DataError(
            f"data set {source} has no {asked or split} part: it has {', '.join(parts)}{would_be}; name one of these "
            "as owner/name[part], or another source"
        )
    return _loaded(
        source, lambda: datasets.load_dataset(name, config, split=part, streaming=streaming), f"{source} ({part})"
    )


def _loaded(source: str, load: Callable[[], Iterable[Mapping[str, Any]]], place: str | None = None) -> Iterator[Row]:
    """What ``load`` has of ``source``; ``place`` is what rows are said to be of, default ``source``."""
    try:
        rows = load()
    except Exception as error:  # datasets, the hub, the network and readers of files raise whatever they like
        raise _cannot_load(source, error) from error
    return _filled(numbered(place or source, _read_on(source, rows)))


def _data_set(source: str) -> tuple[str, str | None, str | None]:
    """Name, config and part of a data set as ``name:config[part]``, or of a folder, which has no more than a name."""
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path), None, None  # `datasets` does not know ~
    match = re.fullmatch(r"([^:\[]*)(?::([^\[]*))?(?:\[(.*)\])?", HUB_ALIASES.get(source, source))
    if match is None:
        raise DataError(f"{source} is no data set; give {KNOWN_SOURCES}")
    return match[1], match[2] or None, match[3] or None


# A recipe is checked before it is run, and every seed and arm of a comparison reads its text anew: the hub is asked
# once for the parts of a data set, and for the rows that are streamed. None ends a part.
_known_parts: dict[tuple[str, str | None], list[str]] = {}
_streamed: dict[tuple[str, Split], list[Row | None]] = {}


def _parts(name: str, config: str | None) -> list[str]:
    import datasets

    if (name, config) not in _known_parts or Path(name).is_dir():
        try:
            _known_parts[name, config] = datasets.get_dataset_split_names(name, config)
        except Exception as error:  # as while rows are loaded
            raise _cannot_load(f"{name}:{config}" if config else name, error) from error
    return _known_parts[name, config]


def _streamed_once(source: str, split: Split) -> Iterator[Row]:
    """The rows that were fetched before, and only behind them those that the hub sends."""
    kept = _streamed.setdefault((source, split), [])
    for row in kept:
        if row is None:
            return
        yield row
    for row in islice(chain(_read_hub(source, split, streaming=True), [None]), len(kept), None):
        kept.append(row)
        if row is not None:
            yield row


def _filled(rows: Iterable[Row]) -> Iterator[Row]:
    """Those that hold anything: a text corpus has its blank lines as rows, as JSONL may have blank lines."""
    for where, row in rows:
        if any(value.strip() if isinstance(value, str) else value is not None for value in row.values()):
            yield where, row


def _read_on(source: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    try:
        yield from rows
    except Exception as error:  # what is streamed can fail in every row, as it can where it is loaded
        raise _cannot_load(source, error) from error


def _cannot_load(source: str, error: Exception) -> DataError:
    # datasets says what it was doing, and leaves what went wrong to the cause.
    told = [" ".join(str(one).split()).rstrip(".") for one in (error, error.__cause__) if one is not None]
    reason = ": ".join(filter(None, told)) or type(error).__name__
    return DataError(
        f"cannot load data set {source}: {reason}. Give {KNOWN_SOURCES}; "
        "a private or gated one after `hf auth login`; without a network, one that is in the cache"
    )


def numbered(source: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """Rows with their place in ``source``."""
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))
