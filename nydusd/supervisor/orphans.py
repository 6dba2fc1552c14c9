"""A front end that outlived its supervisor: held by its pidfd, and asked for copies of its file descriptors.

Used by the supervisor that takes over. The process need not do anything for that: it may be blocked, or stopped.
"""

from __future__ import annotations

import ctypes
import os

from nydusd.forkserver.process import Process
from nydusd.storage.state.lock import start_time

_PIDFD_GETFD = 438
"""The system call's number, the same on all architectures but alpha."""
_libc = ctypes.CDLL(None, use_errno=True)


class Orphan(Process):
    """The process with this pid and start time. Raises OSError when it is gone or cannot be held."""

    def __init__(self, pid: int, start: int) -> None:
        super().__init__(pid)
        if start_time(pid) != start:  # from now on the number cannot become another's
            self.close()
            raise ProcessLookupError(f"process {pid} is another one")

    def get_fd(self, number: int) -> int:
        """A copy of one of its file descriptors, not inheritable. Raises OSError."""
        fd = int(_libc.syscall(_PIDFD_GETFD, self.pidfd, number, 0))
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"file descriptor {number} of process {self.pid}: {os.strerror(code)}")
        return fd
