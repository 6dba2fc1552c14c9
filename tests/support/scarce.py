"""Processes that have come to the end of their file descriptors, as a test likes."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def no_fd_left(pid: int) -> Iterator[None]:
    """A process that can open nothing more, unless it closes something."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(set(range(len(used) + 1)) - used), before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # the test has killed it
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
