"""Shards of a KV store on their way to the disk, while the next samples are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvgraft.store.buffers import Buffers
from kvgraft.store.format import SHARD_PATTERN, Manifest, write_manifest
from kvgraft.store.shard import GrowingShard, PendingSample
from kvgraft.store.shares import next_shard_name

# Written bytes after which the disk is set to work, and not only when a shard is whole.
_SYNC_BYTES = 16_000_000
_PROCESSOR = torch.device("cpu")


@dataclass(frozen=True)
class _Task:
    """Something that a thread does for a shard; ``waiting_bytes`` are held until then."""

    shard: GrowingShard
    future: Future[object]
    waiting_bytes: int = 0
    is_last: bool = False


class ShardQueue:
    """Shards on their way to the disk.

    One thread writes samples as they come. Another keeps the disk at work on what is written, and gives each shard its
    name and its place in the manifest once it is whole. What goes wrong there is raised by a later call; the shard that
    it happened to is gone then, and its samples are held no more.

    Args:
        folder: the store's folder, whose lock the caller holds.
        manifest: of what is on disk.
        shard_bytes: KV bytes after which a shard ends, with the sample that reaches them. While more than these wait to
            be written, no sample is taken.
    """

    def __init__(self, folder: Path, manifest: Manifest, shard_bytes: int) -> None:
        self.manifest = manifest
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv-store-writer")
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="kv-store-syncer")
        self._shards: list[GrowingShard] = []
        self._open: GrowingShard | None = None
        self._unsynced_bytes = 0
        self._buffers = Buffers()
        # In the order in which they were given to the threads.
        self._tasks: deque[_Task] = deque()

    def __contains__(self, key: object) -> bool:
        return key in self.manifest.samples or any(key in shard.samples for shard in self._shards)

    def room(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device = _PROCESSOR) -> Tensor:
        """Memory for a sample's numbers. Once :meth:`append` has had them written, other samples' go there.

        That is so on the processor, and where numbers are written as they are; other memory is new.
        """
        if device != _PROCESSOR or self._is_quantized:
            return torch.empty(shape, dtype=dtype, device=device)
        return self._buffers.take(shape, dtype)

    def append(self, sample: PendingSample) -> None:
        """Have ``sample`` written. Returns at once unless the disk has fallen behind.

        Raises:
            StoreError: the disk was full.
        """
        self._settle(most_waiting=self._shard_bytes)
        shard = self._open = self._open or self._new_shard()
        shard.place(sample)
        written = self._submit(self._writer, shard, lambda: self._write(shard, sample), waiting_bytes=sample.kv.nbytes)
        self._unsynced_bytes += sample.kv.nbytes
        if shard.kv_bytes >= self._shard_bytes:
            self._end_shard()
        elif self._unsynced_bytes >= _SYNC_BYTES:
            self._submit(self._syncer, shard, lambda: _sync(shard, written))
            self._unsynced_bytes = 0

    def flush(self) -> None:
        """Return once all samples are on disk and the manifest names them.

        Raises:
            StoreError: the disk was full.
        """
        self._end_shard()
        self._settle(most_waiting=-1)

    def close(self) -> None:
        """Wait for the threads, and remove what is not whole."""
        self._writer.shutdown()
        self._syncer.shutdown()
        for shard in self._shards:
            shard.discard()

    def _new_shard(self) -> GrowingShard:
        names = [*self.manifest.shards, *(shard.name for shard in self._shards)]
        path = self._folder / next_shard_name(names, SHARD_PATTERN)
        shard = GrowingShard(path, self.manifest.identity, self._shard_bytes)
        self._shards.append(shard)
        self._unsynced_bytes = 0
        return shard

    def _write(self, shard: GrowingShard, sample: PendingSample) -> None:
        shard.write(sample)
        if not self._is_quantized:
            self._buffers.give_back(sample.kv)

    @property
    def _is_quantized(self) -> bool:
        """Then what is written is not what was asked room for."""
        return self.manifest.identity.quantized

    def _end_shard(self) -> None:
        if self._open is None:
            return
        shard, self._open = self._open, None
        before = [task.future for task in self._tasks if task.shard is shard]
        self._submit(self._syncer, shard, lambda: self._finish(shard, before), is_last=True)

    def _finish(self, shard: GrowingShard, before: list[Future[object]]) -> None:
        for future in before:
            future.result()
        manifest = self.manifest.with_shard(shard.name, shard.finish(), shard.samples)
        try:
            write_manifest(self._folder, manifest)
        except BaseException:
            (self._folder / shard.name).unlink(missing_ok=True)
            raise
        self.manifest = manifest

    def _submit(
        self,
        thread: ThreadPoolExecutor,
        shard: GrowingShard,
        work: Callable[[], object],
        *,
        waiting_bytes: int = 0,
        is_last: bool = False,
    ) -> Future[object]:
        future = thread.submit(work)
        self._tasks.append(_Task(shard, future, waiting_bytes, is_last))
        return future

    def _settle(self, most_waiting: int) -> None:
        """Look at what is done, and wait while more bytes than ``most_waiting`` wait; raise what went wrong."""
        while self._tasks and (self._tasks[0].future.done() or self._waiting_bytes > most_waiting):
            task = self._tasks[0]
            error = task.future.exception()
            self._tasks.popleft()
            if error is not None:
                self._drop(task.shard)
                raise error
            if task.is_last:
                self._shards.remove(task.shard)

    @property
    def _waiting_bytes(self) -> int:
        return sum(task.waiting_bytes for task in self._tasks if not task.future.done())

    def _drop(self, shard: GrowingShard) -> None:
        for task in self._tasks:
            if task.shard is shard:
                task.future.exception()
        self._tasks = deque(task for task in self._tasks if task.shard is not shard)
        self._shards.remove(shard)
        if self._open is shard:
            self._open = None
        shard.discard()


def _sync(shard: GrowingShard, written: Future[object]) -> None:
    written.result()
    shard.sync()
