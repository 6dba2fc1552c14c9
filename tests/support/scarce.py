"""Processes that have come to the end of their file descriptors, as a test likes."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator


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
