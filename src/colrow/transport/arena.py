"""Memory that several processes share, which goes away with the last of them.

Memory without a name (``memfd_create``) leaves nothing behind however a process dies, and ``/dev/shm`` may be
as small as it likes. The others open it through ``/proc``, for which they must see the creator's process.
Where they do not, as in one container per rank, a file in ``/dev/shm`` serves, unlinked once all have it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SLOTS = 4
"""Rounds that a rank may be ahead of the slowest one."""
LARGEST_CHUNK = 256 << 10
"""Bytes that a rank stages at once: with the slots that are in use it fits the second-level cache."""
SMALLEST_CHUNK = 16 << 10
RANKS_WITH_LARGEST_CHUNK = 16
SHARED_FILES = Path("/dev/shm")
PREFIX = "colrow-"
STALE_SECONDS = 60.0
"""Files that are so old and that no process holds were left by one that was killed between two lines."""


@dataclass(frozen=True)
class Arena:
    """An open file to map.

    Attributes:
        file: its descriptor.
        path: by which other processes can open it.
        chunk: bytes of one staging slot.
        slots: number of staging slots of a rank.
        bytes: size.
    """

    file: int
    path: str
    chunk: int
    slots: int
    bytes: int

    @property
    def has_name(self) -> bool:
        """Whether it has to be unlinked."""
        return not self.path.startswith("/proc/")


def create_memory(ranks: int) -> Arena:
    """Memory without a name.

    Raises:
        OSError: if the system has none.
    """
    from colrow.transport import _native

    chunk = chunk_for(ranks)
    size = _native.arena_bytes(ranks, chunk, SLOTS)
    file = os.memfd_create("colrow", os.MFD_CLOEXEC)
    try:
        os.ftruncate(file, size)
        hold(file, 0)
        _native.format_arena(file, ranks, chunk, SLOTS)
    except OSError:
        os.close(file)
        raise
    return Arena(file, f"/proc/{os.getpid()}/fd/{file}", chunk, SLOTS, size)


def create_file(ranks: int, folder: Path = SHARED_FILES) -> Arena:
    """A file in a folder of shared memory, with smaller buffers where there is little room.

    Raises:
        OSError: if there is no such folder, or no room for the smallest buffers.
    """
    from colrow.transport import _native

    remove_stale_files(folder)
    chunk = chunk_for(ranks)
    while True:
        path = folder / f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        size = _native.arena_bytes(ranks, chunk, SLOTS)
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            hold(file, 0)
            os.posix_fallocate(file, 0, size)  # else a write would end the process where there is no room
            _native.format_arena(file, ranks, chunk, SLOTS)
            return Arena(file, str(path), chunk, SLOTS, size)
        except OSError:
            path.unlink()
            os.close(file)
            if chunk == SMALLEST_CHUNK:
                raise
            chunk //= 2


def hold(file: int, rank: int) -> None:
    """Lock a rank's byte for as long as this process runs: by this the others see that it does.

    Held by all before any of them uses the memory, and so looks for the others.

    Raises:
        OSError: if another process holds it.
    """
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)


def chunk_for(ranks: int) -> int:
    """Bytes of a staging slot: smaller in large groups, whose memory would otherwise be that of a model."""
    chunk = LARGEST_CHUNK
    while ranks > RANKS_WITH_LARGEST_CHUNK:
        chunk //= 2
        ranks //= 2
    return chunk


def remove_stale_files(folder: Path = SHARED_FILES) -> None:
    """Remove files of this user that no process holds any more."""
    for path in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            status = path.stat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < STALE_SECONDS:
                continue
            with path.open("r+b") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # all of it: fails if any rank holds a byte
                path.unlink()


CREATORS: tuple[Callable[[int], Arena], ...] = (create_memory, create_file)
"""In the order in which they are tried."""
