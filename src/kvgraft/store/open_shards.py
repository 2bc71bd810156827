"""The shard files that a store has open for reading, in every process that reads it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

# By process: a forked worker opens its own files and leaves its parent's alone.
OpenShards = dict[int, dict[str, "OpenShard"]]


class OpenShard:
    """A shard file, whose tensors are only mapped, each once: that costs less than asking the file for every sample.

    The file itself is not kept open: a large store has more shards than a process may have files open.

    Args:
        path: the file.
        small: places and lengths, in bytes, of all but its largest tensor. The system fetches these at once.
    """

    def __init__(self, path: Path, small: Sequence[tuple[int, int]] = ()) -> None:
        self._path = path
        for start, length in small:
            self.ask_ahead(start, length)
        self._mapped: Any = safe_open(path, framework="pt")
        self._tensors: dict[str, Tensor] = {}

    def get_tensor(self, name: str) -> Tensor:
        """The tensor ``name`` of the file, which nobody may write into."""
        if name not in self._tensors:
            self._tensors[name] = self._mapped.get_tensor(name)
        return self._tensors[name]

    def ask_ahead(self, start: int, length: int) -> None:
        """Let the system fetch these bytes and no others; left to itself it reads far on from each page it misses."""
        # No length stands for all that follows.
        if length and hasattr(os, "posix_fadvise"):
            # It is advice: what was mapped can be read even when its file is gone.
            with suppress(OSError), open(self._path, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def is_cached(self, place: int) -> bool:
        """Whether the system holds the byte at ``place`` in memory; false where it cannot say."""
        try:
            with open(self._path, "rb", buffering=0) as file:
                return os.preadv(file.fileno(), [bytearray(1)], place, os.RWF_NOWAIT) == 1
        except (AttributeError, OSError):
            return False


def open_shard(opened: OpenShards, folder: Path, name: str, small: Sequence[tuple[int, int]] = ()) -> OpenShard:
    """Shard ``name`` of ``folder``, from what this process has ``opened`` or new; ``small`` as it takes them."""
    shards = opened.setdefault(os.getpid(), {})
    if name not in shards:
        shards[name] = OpenShard(folder / name, small)
    return shards[name]
