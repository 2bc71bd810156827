"""Files that are never there in part: each is written beside its place, and gets its name once it is safe on disk."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kvgraft.errors import StoreError
from kvgraft.store.checksum import checksum

TEMPORARY_SUFFIX = ".tmp"


class AtomicFile:
    """A file on its way to ``path``, under a temporary name beside it until :meth:`commit`.

    Args:
        path: its place; what stands there is untouched until then.
        needed_bytes: how large it gets, for the error when the disk is full.

    Raises:
        StoreError: the disk is full, here and in every method that writes.
    """

    def __init__(self, path: Path, needed_bytes: int) -> None:
        self.path = path
        self._needed_bytes = needed_bytes
        # Its own name: another process may be writing the same file, as where two runs find the same layer map.
        self._temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        with self._room():
            self._file = open(self._temporary, "wb")  # noqa: SIM115 - open until it is whole, or discarded

    def write(self, chunk: memoryview) -> None:
        """Write bytes behind the last ones."""
        with self._room():
            self._file.write(chunk)

    def seek(self, place: int) -> None:
        """Go on writing at byte ``place``."""
        with self._room():
            self._file.seek(place)

    def sync(self) -> None:
        """Bring to the disk what is there by now; another thread may go on writing meanwhile."""
        with self._room():
            os.fsync(self._file.fileno())

    def commit(self) -> None:
        """Give the file its name, once it is safe on disk."""
        with self._room():
            self._file.flush()
            self.sync()
            self._file.close()
            os.replace(self._temporary, self.path)
        _sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove what has not got its name."""
        # Closing writes what is left in a buffer, for which there may be no room.
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._disk_full() from error
            raise

    def _disk_full(self) -> StoreError:
        folder = self.path.parent
        free = shutil.disk_usage(folder).free
        return StoreError(
            f"the disk is full: writing {self.path.name} into {folder} needs {self._needed_bytes} bytes and {free} are "
            "free there. The shards already written stay usable: free some space and run the same command again to go "
            "on from them."
        )


def write_text_atomically(path: Path, text: str) -> None:
    """:func:`write_atomically` of ``text`` in UTF-8."""
    write_atomically(path, [memoryview(text.encode())])


def write_atomically(path: Path, chunks: Sequence[memoryview]) -> str:
    """Write ``chunks`` (of bytes) to ``path`` as an :class:`AtomicFile`.

    Returns:
        Their checksum, one after another.

    Raises:
        StoreError: the disk is full; the temporary file is gone and what stood at ``path`` is untouched.
    """
    file = AtomicFile(path, sum(chunk.nbytes for chunk in chunks))
    try:
        for chunk in chunks:
            file.write(chunk)
        file.commit()
    except BaseException:
        file.discard()
        raise
    return checksum(chunks)


def _sync_folder(folder: Path) -> None:
    # A rename lasts through a power cut only once the folder itself is on disk.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot be asked for a folder, as those that a virtual machine shares with its host.
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
