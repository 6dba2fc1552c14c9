"""One fork server, as the supervisor knows it: its process, our end of the line to it, and what it is still to be told.

Runs in the supervisor, which waits for no fork server: one that is loading, or stopped, takes nothing from its line, and when
that is full the rest is late. Of the fds that it is to hold or to hold no more it is told when there is room again; nothing is
lost by that, for the supervisor has them all.

What holds after SIGKILL of the supervisor: the fork server holds what was in its line. What was late is lost where nobody else
has it.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import socket
import time
from collections.abc import Sequence
from typing import Any

from nydusd.forkserver.process import Process

PACKET_MAX = 64 * 1024
FDS_MAX = 253
END_SECONDS = 5.0
"""How long a killed process may take to vanish."""


class Server:
    """One process, and our end of the line to it. Raises OSError when it cannot be held."""

    def __init__(self, line: socket.socket, pid: int, commit: str, ready: bool) -> None:
        self.line = line
        self.process = Process(pid)
        self.commit = commit
        self.ready = ready
        self.since = time.monotonic()
        self._asked = self._answered = 0
        """Requests for a child that are in its line, and answers that have come: it gives one to each, in their order."""
        self._is_stuck = False
        """The last one did not go into its line: that is full, or it is gone."""
        self._owes_since = 0.0
        self._holds_any = False
        self._late: dict[int, bool] = {}
        """By number, whether it is still to be told to hold what we have there, or to hold that no more.

        Only the last word on a number counts: what it holds under that gives way to what comes.
        """

    @property
    def holds(self) -> bool:
        """Whether all that is to be held is in its line at least, from where it takes it whatever becomes of us."""
        return self._holds_any and True not in self._late.values()

    @property
    def is_late(self) -> bool:
        """Whether `catch_up` has something to tell."""
        return bool(self._late)

    @property
    def owes_since(self) -> float:
        """Since when it has not answered a request, or taken one (`time.monotonic()`); infinite: there is none."""
        return self._owes_since if self._is_stuck or self._answered < self._asked else math.inf

    @property
    def is_free(self) -> bool:
        """Whether a child that is asked for is made in milliseconds: it has loaded, and has done what it was asked."""
        return self.ready and self.owes_since == math.inf

    def ask(self, request: bytes, fds: Sequence[int], seconds: float) -> int:
        """Send a request, waiting so long for room in its line; gives its number. Raises OSError when it is not sent."""
        if self.owes_since == math.inf:
            self._owes_since = time.monotonic()
        self._is_stuck = True
        self.line.settimeout(seconds)
        socket.send_fds(self.line, [request], list(fds))
        self._is_stuck = False
        self._asked += 1
        return self._asked

    def answered(self) -> int:
        """An answer has come: the number of the request that it is for, which may have been given up long ago; 0: for none."""
        if self._answered == self._asked:
            return 0
        self._answered += 1
        self._owes_since = time.monotonic()
        return self._answered

    def hold(self, fds: Sequence[int]) -> None:
        """Have it hold copies of these, under our numbers; they stay open until `release`."""
        self._holds_any = self._holds_any or bool(fds)
        self._late |= dict.fromkeys(fds, True)
        self.catch_up()

    def release(self, fds: Sequence[int]) -> None:
        """Have it hold these no more."""
        self._late |= dict.fromkeys(fds, False)
        self.catch_up()

    def catch_up(self) -> None:
        """Tell it what it was not told yet, as far as there is room."""
        for what, holds in (("release", False), ("hold", True)):
            numbers = [number for number, wanted in self._late.items() if wanted is holds]
            for start in range(0, len(numbers), FDS_MAX):
                part = numbers[start : start + FDS_MAX]
                if not self.tell({what: part}, part if holds else ()):
                    return
                for number in part:
                    del self._late[number]

    def tell(self, request: dict[str, Any], fds: Sequence[int] = ()) -> bool:
        """Without waiting for it, nor for an answer; whether it went. That it is gone is noticed elsewhere."""
        with contextlib.suppress(OSError):
            self.line.settimeout(0)
            socket.send_fds(self.line, [json.dumps(request).encode()], list(fds))
            self._is_stuck = False
            return True
        return False

    def close(self, seconds: float = END_SECONDS) -> None:
        """End it, waiting so long until it has vanished. Its children stay."""
        self.line.close()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(seconds)
        self.process.close()
