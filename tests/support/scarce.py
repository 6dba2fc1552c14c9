"""Processes that have come to the end of their file descriptors, or of shared memory, as a test likes."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator

from tests.support.discipline import parent


@contextlib.contextmanager
def no_fd_left(pid: int, spare: int = 0) -> Iterator[None]:
    """A process that can open nothing more than `spare`, unless it closes something."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    listed = os.listdir(f"/proc/{pid}/fd")
    # Not by what they were listed themselves.
    used = {int(name) for name in listed if os.path.lexists(f"/proc/{pid}/fd/{name}")}
    free = sorted(set(range(len(used) + spare + 1)) - used)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[spare], before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # the test has killed it
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def shared_memory_left(size: int) -> Iterator[None]:
    """So many bytes are left in /dev/shm, which must be this run's own (`scripts/run-tests` sees to that)."""
    assert _has_mounts_of_its_own(), "/dev/shm is not ours alone"

    def bound(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", "/dev/shm"], check=True)

    now = os.statvfs("/dev/shm")
    bound((now.f_blocks - now.f_bfree) * now.f_frsize + size)
    try:
        yield
    finally:
        bound(now.f_blocks * now.f_frsize)


def _has_mounts_of_its_own() -> bool:
    """Whether a process that led to this one has another mount namespace."""
    ours, pid = os.readlink("/proc/self/ns/mnt"), os.getppid()
    while pid:
        try:
            if os.readlink(f"/proc/{pid}/ns/mnt") != ours:
                return True
        except PermissionError:
            return False
        pid = parent(pid)
    return False
