"""A front end that outlived its supervisor: held by its pidfd, and asked for copies of its file descriptors.

Used by the supervisor that takes over. The process need not do anything for that: it may be blocked, or stopped.
"""

from __future__ import annotations

from nydusd.forkserver.process import Process
from nydusd.ipc.borrow import copy_of
from nydusd.storage.state.lock import start_time


class Orphan(Process):
    """The process with this pid and start time. Raises OSError when it is gone or cannot be held."""

    def __init__(self, pid: int, start: int) -> None:
        super().__init__(pid)
        self.start = start
        """As it was noted: once it has ended, its pid may be another's, which none but its parent keeps from that."""
        if start_time(pid) != start:  # from now on the number cannot become another's
            self.close()
            raise ProcessLookupError(f"process {pid} is another one")

    def get_fd(self, number: int) -> int:
        """A copy of one of its file descriptors, not inheritable. Raises OSError."""
        try:
            return copy_of(self.pidfd, number)
        except OSError as e:
            raise OSError(e.errno, f"file descriptor {number} of process {self.pid}: {e.strerror}") from None
