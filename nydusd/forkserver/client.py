"""The daemon's fork server: it is asked for children, and another in its place when it is silent for too long or gone.

Runs in the supervisor, whose loop waits for none while it serves. What there is to ask is begun and told in `servers.py`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

from nydusd.forkserver.line import PACKET_MAX, Server
from nydusd.forkserver.process import Process, let_begin, take_in_orphans
from nydusd.forkserver.servers import Servers
from nydusd.waits import DEAF

log = logging.getLogger(__name__)

_PATIENCE = 5.0
"""Seconds that a fork server may take to answer: it takes a few milliseconds."""
_PATIENCE_WITH_COPY = 1.0
"""The same when another can be asked at once."""
_PATIENCE_WITH_ALL = 0.5
"""The same of all that there are, before another is loaded beside them: whichever is there first makes the next child."""
_PATIENCE_STOPPED = 0.5
"""The same of one that is stopped, before another is started in its place."""
_MOMENT = 0.05
"""The same before the loop of a daemon that serves goes on without an answer; twice as long after each time in vain."""
_FIRST_PATIENCE = 20.0
"""The same for its first answer, before which it loads all that children need: 0.3 s, unless the machine is busy."""


class LoadingError(OSError):
    """There is a fork server, or will be, and it loads, or does not answer: ask again when one is `ready`."""


class ForkServer(Servers):
    """The daemon's fork server, and a copy of it that takes its place at once when it is gone: `tend` sees to both.

    Raises OSError when there is no room for it.
    """

    def __init__(self, made: tuple[socket.socket, int, int] | None = None, stub: int = 0) -> None:
        """`made`: our end of the line to a fork server that is there already, its pid, and an fd with our environment.

        `stub`: the pid of the command that had a nursery make us, and lives as long as we do.
        """
        super().__init__(made)
        self.stub = stub
        self._moment = _MOMENT
        """How long an answer is waited for now where a child may not wait (`waits`)."""
        self.told = DEAF
        """Whether we are told to end while a child waits for one: EndedError is raised then, and there is no child."""

    @contextlib.contextmanager
    def waited_for(self) -> Iterator[None]:
        """For as long as the block runs a child may wait for a fork server, also while a daemon serves."""
        waits, self.waits = self.waits, True
        try:
            yield
        finally:
            self.waits = waits

    def spawn(self, module: str, fds: Sequence[int], load: Sequence[str] = ()) -> Process:
        """Have a child run `module`, the first of `fds` being its spec's; it has these fds under the numbers that we have them.

        `load`: modules that the fork server is to have loaded before. Raises OSError when none does it, LoadingError when
        none does it now and that is not waited for.
        """
        take_in_orphans()
        request = json.dumps({"module": module, "fds": list(fds), "load": list(load)}).encode()
        if not self.waits:
            return self._spawn_soon(request, fds)
        for tries_left in (2, 1, 0):  # a fork server, its copy, and another
            server = next(
                (server for server in self._servers if server.is_free), self._servers[0] if self._servers else None
            )
            if server is not None and (child := self._child_of(server, request, fds)) is not None:
                return child
            if tries_left and (server is None or server.owes_since < math.inf):
                self._renew(server)
        raise OSError(errno.ETIMEDOUT, "the fork server does not answer")

    def _spawn_soon(self, request: bytes, fds: Sequence[int]) -> Process:
        """By whoever answers in a moment. Who does not is asked nothing more until it has, however long it takes: see `tend`.

        The child that it makes then does not begin.
        """
        free = [server for server in self._servers if server.is_free]
        for server in free:
            since = time.monotonic()
            if (child := self._child_of(server, request, fds)) is not None:
                self._moment = max(_MOMENT, min(self._moment, 4 * (time.monotonic() - since)))
                return child
        if free:  # on a machine that is so slow it must become long enough
            self._moment = min(2 * self._moment, _PATIENCE)
        raise LoadingError(errno.EAGAIN, "no fork server answers now")

    def _child_of(self, server: Server, request: bytes, fds: Sequence[int]) -> Process | None:
        """A child that it makes; None if it does not say so in time. Raises OSError when it cannot make one."""
        gate, key = os.pipe2(os.O_CLOEXEC)
        try:
            answer = self._ask(server, request, [*fds, gate])
            if answer is None or answer.get("errno") == errno.EINTR:
                # Hung, or killed before it could tell, it or who made the child. That may be there, and ends with its gate.
                return None
            if "pid" in answer:
                return let_begin(answer["pid"], key)
            raise OSError(answer["errno"], answer["error"])
        finally:
            os.close(gate)
            os.close(key)

    def _ask(self, server: Server, request: bytes, fds: Sequence[int]) -> dict[str, Any] | None:
        """Its answer; None if there is none in time."""
        since = time.monotonic()
        try:
            number = server.ask(request, fds, self._patience(server) if self.waits else 0)
            while self._has_said(server, since):
                packet = server.line.recv(PACKET_MAX)
                if not packet:
                    return None
                answer: dict[str, Any] = json.loads(packet)
                if self._takes(server, answer) == number:
                    return answer
            return None
        except OSError:  # a time-out is one, too
            return None

    def _has_said(self, server: Server, since: float) -> bool:
        """Whether there is anything to hear in time. A child that may wait does not wait for one that somebody has stopped."""
        if not self.waits:
            return DEAF.wait(since, self._moment, server.line.fileno())
        until = time.monotonic() + self._patience(server)
        while not self.told.wait(since, min(_PATIENCE_STOPPED, until - time.monotonic()), server.line.fileno()):
            if time.monotonic() >= until or server.process.is_stopped():
                return False
        return True

    def _renew(self, server: Server | None) -> None:
        """Without the one that was asked: another is, or is started."""
        if server is not None:
            log.warning("the fork server (pid %d) is gone or hangs", server.process.pid)
            self._drop(server)
        if not self._servers:
            self._start()

    def fds(self) -> list[int]:
        """Those that become readable when `tend` has something to do."""
        return [fd for server in self._servers for fd in (server.process.pidfd, server.line.fileno())]

    def due(self) -> float:
        """When `tend` has something to do in any case (`time.monotonic()`)."""
        if not self._servers:
            return self._next_start
        return min(self._tells_at, self._silent_until, *map(self._hangs_at, self._servers))

    def tend(self) -> bool:
        """Replace those that have ended, or are silent for too long, have a copy made; whether there are others now.

        Does not wait for anybody. What there is no room for is tried again.
        """
        before = self.pids
        try:
            self._replace()
        except OSError as e:
            self._no_room(e)
        return self.pids != before

    def _replace(self) -> None:
        """What `tend` does. Raises OSError when there is no room for it."""
        for server in [server for server in self._servers if server.process.poll() is not None]:
            log.warning("the fork server (pid %d) is gone", server.process.pid)
            self._drop(server)
        now = time.monotonic()
        self._catch_up(now)
        self._choose()
        for server in list(self._servers):
            if now > self._hangs_at(server):
                log.warning("the fork server (pid %d) hangs", server.process.pid)
                self._drop(server, _MOMENT)
        if not self._servers:
            if now >= self._next_start:
                self._start()
        elif now >= self._silent_until:
            log.warning("no fork server answers; loading another")
            self._start()
            self._spare = self._servers[-1]
        else:
            self._complete(now)

    def _choose(self) -> None:
        """Between the one that was loaded because all others were silent, and those."""
        spare = self._spare
        if spare is None:
            return
        others = [server for server in self._servers if server is not spare]
        if any(server.is_free for server in others):
            self._drop(spare, _MOMENT)
        elif spare.ready or not others:
            self._spare = None
            for server in others:
                log.warning("the fork server (pid %d) hangs", server.process.pid)
                self._drop(server, _MOMENT)

    def _patience(self, server: Server) -> float:
        """Seconds that it may take for an answer."""
        if not server.ready:
            return _FIRST_PATIENCE
        others = any(other.ready for other in self._servers if other is not server)
        return _PATIENCE_WITH_COPY if others else _PATIENCE

    def _hangs_at(self, server: Server) -> float:
        """When it has been silent for too long (`time.monotonic()`)."""
        return server.owes_since + self._patience(server) if server.ready else server.since + _FIRST_PATIENCE

    @property
    def _silent_until(self) -> float:
        """When another is loaded beside those that there are (`time.monotonic()`): none of them answers."""
        if not all(server.ready for server in self._servers):
            return math.inf
        return max(max(server.owes_since for server in self._servers) + _PATIENCE_WITH_ALL, self._next_start)
