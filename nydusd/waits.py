"""Waits in the start of a daemon, which end when it is told to end (SIGTERM, SIGINT).

Runs in the supervisor. The signals write into a pipe, which the loop of the daemon reads once there is one. Before that a start
may have to wait: for a process that was killed and that a disk holds, for a fork server that hangs. Such a wait looks at the
pipe, too. Most are over in milliseconds: then the start goes on to its end, and the daemon stops as ever.

What holds after SIGKILL: nothing is kept here.
"""

from __future__ import annotations

import math
import os
import select
import signal
import time

_SOON = 0.5
"""Seconds after which a wait is one that a signal ends."""


class EndedError(BaseException):
    """Told to end in the middle of a start. No error, and nothing to be made good where it passes: as KeyboardInterrupt."""


class Told:
    """Whether the daemon of `serves` was told to end, for whoever waits in its start. Nothing is heard before `catch`."""

    def __init__(self, serves: str) -> None:
        self._serves = serves
        self.fd = -1
        """The pipe's end to read."""
        self._hears = self._told = False

    def catch(self) -> int:
        """From now on a signal does nothing but write into the pipe; gives its end to read."""
        if self.fd < 0:
            self.fd, end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            signal.set_wakeup_fd(end, warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)
            self._hears = True
        return self.fd

    def take(self) -> bool:
        """Read the pipe, in which there is something; whether it says to end."""
        told = bool(os.read(self.fd, 64).strip(bytes([signal.SIGCHLD])))
        self._told = self._told or told
        return told

    def end(self) -> None:
        """The start is over: a wait from now on is not ended."""
        self._hears = False

    def wait(self, since: float, seconds: float, fd: int = -1) -> bool:
        """Wait `seconds` at most, until `fd` is readable, if one is given; whether it is.

        `since`: when that began which this wait is a part of (`time.monotonic()`). Raises EndedError when told to end, once
        that has taken a moment.
        """
        until = time.monotonic() + seconds
        soon = min(until, since + _SOON) if self._hears else until
        if _readable([fd], soon - time.monotonic()):
            return True
        if not self._hears or soon >= until:
            return False
        found = _readable([fd, self.fd], 0 if self._told else until - time.monotonic())
        if fd in found:
            return True
        if self._told or found:
            raise EndedError(f"{self._serves}: told to end in the middle of its start")
        return False


def _readable(fds: list[int], seconds: float) -> list[int]:
    """Those of the fds, but for -1, that are readable within that time."""
    poll = select.poll()
    for fd in fds:
        if fd >= 0:
            poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(math.ceil(max(0.0, seconds) * 1000))]


DEAF = Told("")
"""Hears nothing: waits that no signal ends."""
