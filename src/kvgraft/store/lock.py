"""One writer for a store folder: an advisory lock that the system gives back however its holder ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from kvgraft.errors import StoreError

LOCK_NAME = ".lock"


def lock_folder(folder: Path) -> int:
    """Hold ``folder`` for this process; give what comes back to :func:`unlock_folder`.

    Raises:
        StoreError: another process has it, or its file system cannot lock.
    """
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 32).decode(errors="replace").strip()
        os.close(descriptor)
        who = f"process {holder}" if holder else "another process"
        raise StoreError(
            f"{who} is writing the KV store in {folder}. Wait until it ends or stop it, then run this again; "
            "what it has written will be used."
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise StoreError(
            f"{folder} is on a file system that cannot lock files ({error}). Put the KV store on a local disk."
        ) from error
    with contextlib.suppress(OSError):  # The number is a courtesy to whoever waits; the lock holds without it.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def unlock_folder(descriptor: int) -> None:
    """Give the lock back."""
    # Unlocking by name also frees it for processes forked meanwhile, which share the open file.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
