"""The names of segments and their semaphores in shared memory: which there are, whose they are, how they are removed.

A segment is made under a temporary name, with the pid of its maker at the end, and renamed when it is complete. Its semaphore
(see `lock.py`) has its name and its inode. What holds after SIGKILL in between: who makes the next segment of that name
removes what was left (`remove_left`), and a daemon that begins or ends whatever bears its prefix (`names`).
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import posix_ipc

from nydusd.errors import cache_error
from nydusd.storage.state.lock import start_time

SHM = Path("/dev/shm")
"""Where glibc keeps POSIX shared memory: the only way to rename an object."""

_UNFINISHED = re.compile(r"/nydusd\.[^.]+\.[0-9a-f]{16}\.[0-9]+")


def inode_of(name: str) -> int:
    """The inode of the segment that has this name now, 0 if there is none."""
    try:
        return (SHM / name[1:]).stat().st_ino
    except FileNotFoundError:
        return 0


def is_unfinished(name: str) -> bool:
    """Whether this is what the segment of a blob is called until it is published. (A semaphore may be called so, too.)"""
    return _UNFINISHED.fullmatch(name) is not None


def remove_unfinished(name: str, *, ended: bool = False) -> None:
    """Remove a segment that was not published if whoever made it has `ended`, by its pid if that is not known otherwise."""
    pid = name.rpartition(".")[2]
    if ended or (pid.isdecimal() and (int(pid) == os.getpid() or not start_time(int(pid)))):
        (SHM / name[1:]).unlink(missing_ok=True)


def remove_left(name: str) -> None:
    """Remove what was left of a segment of this name by workers that were killed over it; others may be at one just now."""
    for path in SHM.glob(f"{name[1:]}.*"):
        remove_unfinished(f"/{path.name}")


def unlink(name: str) -> None:
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory(name)


def unlink_lock(name: str) -> None:
    """Remove the semaphore of the segment that has this name now."""
    with contextlib.suppress(FileNotFoundError, posix_ipc.ExistentialError):
        posix_ipc.unlink_semaphore(f"{name}.{(SHM / name[1:]).stat().st_ino}")


def remove(name: str) -> None:
    """Remove a segment's name and its semaphore, or a semaphore by its own name; no error if there is none."""
    unlink_lock(name)
    unlink(name)
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_semaphore(name)


def names(prefix: str) -> list[str]:
    """Names of all segments and semaphores that start with `/prefix`, finished or not: what an earlier run left.

    Raises CacheError when they cannot be listed.
    """
    found = set()
    try:
        entries = os.listdir(SHM)
    except OSError as e:
        raise cache_error(str(SHM), e) from e
    for entry in entries:
        name = entry.removeprefix("sem.")
        if name.startswith(prefix):
            found.add("/" + name)
    return sorted(found)
