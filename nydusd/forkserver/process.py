"""A process that was started by somebody: known by its pid, held by a pidfd, so that the pid cannot become another's.

Its end is noticed by whoever holds this. The exit status is known to the process's parent alone.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import signal

_SET_CHILD_SUBREAPER = 36


class Process:
    """Raises OSError when the process cannot be held (none of this pid, or no fd is left)."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.status: int | None = None
        """Exit status once it has ended; negative: the signal that ended it. Of one that is not our child: -SIGKILL."""

    def poll(self) -> int | None:
        """`status`, after a look whether it has ended: one system call for a child of ours."""
        if self.status is None:
            try:
                result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                self.status = -signal.SIGKILL if self._ends(0) else None
            else:
                if result is not None:
                    self.status = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        return self.status

    def wait(self, seconds: float) -> int | None:
        """`status`, after waiting for its end that long."""
        if self.status is None:
            self._ends(seconds)
        return self.poll()

    def is_stopped(self) -> bool:
        """Whether somebody has stopped it (SIGSTOP, a debugger). False if it has ended."""
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/stat", "rb") as stat:
            return self.poll() is None and stat.read().rpartition(b") ")[2][:1] in (b"T", b"t")
        return False

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing happens if it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile, and will be noticed
                signal.pidfd_send_signal(self.pidfd, number)

    def _ends(self, seconds: float) -> bool:
        """Whether it has ended, or does within that time."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def close(self) -> None:
        """Let go of it; only `pid` and `status` are known from then on."""
        os.close(self.pidfd)


def let_begin(pid: int, key: int) -> Process:
    """The child that was made, which begins now; `key` is that of its gate. Raises OSError when it has died there."""
    process = Process(pid)
    try:
        os.write(key, b"g")
    except BrokenPipeError:
        process.close()
        raise OSError(errno.EPIPE, "a child has died before it began") from None
    return process


@functools.cache
def take_in_orphans() -> None:
    """Become a subreaper: a child whose parent ends, as the fork server has it, becomes ours. Raises OSError."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
