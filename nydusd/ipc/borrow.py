"""Copies of file descriptors that another process of ours has open, by its pid and their number (pidfd_getfd(2)).

The other process need not do anything for that: it may be busy, or stopped. Whoever gives out a number keeps it open as long as
anybody may come for it; a number that was used again would be another file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Iterator

_PIDFD_GETFD = 438
"""The system call's number, the same on all architectures but alpha."""
_libc = ctypes.CDLL(None, use_errno=True)


def copy_of(pidfd: int, number: int) -> int:
    """A copy of file descriptor `number` of the process held by `pidfd`; not inheritable. Raises OSError."""
    fd: int = _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def borrow(pid: int, number: int, is_it: Callable[[], bool]) -> int:
    """The same of the process with this pid. Raises OSError.

    `is_it` tells whether the pid is that of the process which is meant: asked when it cannot become another's any more.
    """
    pidfd = os.pidfd_open(pid)
    try:
        if not is_it():
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        return copy_of(pidfd, number)
    finally:
        os.close(pidfd)


def memories_of(pid: int, name: str = "") -> Iterator[os.stat_result]:
    """The memfds that a process has open whose name begins like this. Raises OSError when it has ended.

    Files on disks are not asked for anything: that may take as long as it likes.
    """
    for number in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{number}"
        with contextlib.suppress(OSError):  # that one was closed meanwhile, as a front end does at each event
            if os.readlink(path).startswith(f"/memfd:{name}"):
                yield os.stat(path)
