"""The shard files that a store has open for reading, in every process that reads it."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from torch import Tensor

# By process: a forked worker opens its own files and leaves its parent's alone.
OpenShards = dict[int, dict[str, "OpenShard"]]


class OpenShard:
    """A shard file, whose tensors are only mapped, each once: that costs less than asking the file for every sample."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mapped: Any = safe_open(path, framework="pt")
        self._tensors: dict[str, Tensor] = {}

    def get_tensor(self, name: str) -> Tensor:
        """The tensor ``name`` of the file, which nobody may write into."""
        if name not in self._tensors:
            self._tensors[name] = self._mapped.get_tensor(name)
        return self._tensors[name]

    @cached_property
    def file(self) -> BinaryIO:
        """The file itself, open as long as the shard is."""
        return open(self._path, "rb")


def open_shard(opened: OpenShards, folder: Path, name: str) -> OpenShard:
    """Shard ``name`` of ``folder``, from what this process has ``opened`` or new."""
    shards = opened.setdefault(os.getpid(), {})
    if name not in shards:
        shards[name] = OpenShard(folder / name)
    return shards[name]
