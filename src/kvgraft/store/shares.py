"""Shares: where processes that fill one store together write, each in a folder of its own, until it is taken over."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from kvgraft.store.format import Manifest
    from kvgraft.store.logits import LogitManifest

SHARE_PATTERN = "share-*"
_Manifest = TypeVar("_Manifest", "Manifest", "LogitManifest")


def share_folder(folder: Path, process: int) -> Path:
    """Where process number ``process`` writes while several fill the store in ``folder``."""
    return folder / SHARE_PATTERN.replace("*", f"{process:05d}")


def next_shard_name(shards: Iterable[str], pattern: str) -> str:
    """A name of ``pattern``, with a number in place of its ``*``, that no shard of ``shards`` has."""
    before, after = pattern.split("*")
    # One past the highest and not the first gap: a dropped shard then seldom lends its name to other contents.
    last = max((int(name.removeprefix(before).removesuffix(after)) for name in shards), default=-1)
    return pattern.replace("*", f"{last + 1:05d}")


def with_shards_of(manifest: _Manifest, folder: Path, other: _Manifest, share: Path, pattern: str) -> _Manifest:
    """``manifest`` of ``folder`` and the shards of ``other``, which are moved there from ``share``."""
    shards, samples = dict(manifest.shards), dict(manifest.samples)
    # A shard with a sample that is here already would count it twice; what else it holds is done again.
    repeated = {sample.shard for key, sample in other.samples.items() if key in samples}
    names = {}
    for name, entry in other.shards.items():
        if name not in repeated:
            names[name] = next_shard_name(shards, pattern)
            os.replace(share / name, folder / names[name])
            shards[names[name]] = entry
    for key, sample in other.samples.items():
        if sample.shard in names:
            samples[key] = sample.model_copy(update={"shard": names[sample.shard]})
    complete = manifest.complete and not names
    return manifest.model_copy(update={"complete": complete, "shards": shards, "samples": samples})
