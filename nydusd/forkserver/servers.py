"""The fork servers that a daemon has: each is started or copied from another, told what it is to know, and ended.

Runs in the supervisor, and is begun by the command line before all that the supervisor needs is loaded: the fork server loads
what children need meanwhile. Later it makes a copy of itself, which costs little and takes its place at once when it is gone.
Which of them is asked for a child, and how long it may be silent: `client.py`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from nydusd import priority
from nydusd.forkserver.line import END_SECONDS, PACKET_MAX, Server
from nydusd.forkserver.process import take_in_orphans
from nydusd.forkserver.start import start
from nydusd.version import GIT_COMMIT

log = logging.getLogger(__name__)

_INTERVAL = 0.1
"""Seconds between two that are started, so that one that cannot live costs little."""
_INTERVAL_NO_ROOM = 2.0
"""The same where there was no room for one."""


class Servers:
    """The one that is asked, a copy of it that takes its place at once when it is gone, and one that is loaded beside them.

    Raises OSError when there is no room for it.
    """

    def __init__(self, made: tuple[socket.socket, int, int] | None = None) -> None:
        """`made`: our end of the line to a fork server that is there already, its pid, and an fd with our environment."""
        self._servers: list[Server] = []
        """The one that is asked, and its copy; and one that is loaded beside them."""
        self._spare: Server | None = None
        """That one, which takes the place of all others when it is ready, and is not needed when one of them answers."""
        self._copying: socket.socket | None = None
        """Our end of the line to the copy that was asked for."""
        self.held: list[int] = []
        """What it holds for a supervisor to come, under our numbers."""
        self._released: list[int] = []
        """What was let go of while a copy was made, which may have it."""
        self._stderr: str | None = None
        self._stderr_inode = 0
        self._delay = 0.0
        self._interval = _INTERVAL
        """Seconds between two that are started now: more and more where none can load what it must."""
        self._unguarded = False
        """The one that is asked could not be told to guard us."""
        self._next_start = self._next_copy = self._next_try = 0.0
        """When the next one may be started, a copy asked for, or one told what is late, at the soonest."""
        self.waits = True
        """Whether a child may wait for one of them: else, while a daemon serves, the one that loads is in a hurry."""
        self.started: Callable[[], None] = lambda: None
        """Called when there is another one, before it holds anything: so that a successor ends it. And when it holds."""
        self._given = -1 if made is None else made[2]
        """What holds the environment that we were given, where /proc/self/environ does not."""
        if made is None:
            self._start()
        else:
            self._servers = [Server(made[0], made[1], GIT_COMMIT, ready=False)]

    @property
    def pid(self) -> int:
        """The process that is asked; 0: none."""
        return self._servers[0].process.pid if self._servers else 0

    @property
    def pids(self) -> list[int]:
        """All that there are now."""
        return [server.process.pid for server in self._servers]

    @property
    def holders(self) -> list[int]:
        """Those of them that hold what they are to hold."""
        return [server.process.pid for server in self._servers if server.holds]

    @property
    def commit(self) -> str:
        """Which build it has loaded: what was on disk when it started, or what we have loaded if it is a copy of us."""
        return self._servers[0].commit if self._servers else GIT_COMMIT

    @property
    def ready(self) -> bool:
        """Whether a child is made in milliseconds: else it is waited for."""
        return any(server.is_free for server in self._servers)

    def hold(self, fds: Sequence[int]) -> None:
        """Have it hold copies of these fds, under our numbers, for a supervisor to come; each one that takes its place, too."""
        self.held = list(dict.fromkeys([*self.held, *fds]))
        for server in self._servers:
            server.hold(fds)

    def release(self, fds: Sequence[int]) -> None:
        """Have it hold these no more, which are about to be closed here."""
        self.held = [fd for fd in self.held if fd not in fds]
        if self._copying is not None:
            self._released += fds
        for server in self._servers:
            server.release(fds)

    def stderr_to(self, path: str) -> None:
        """Have it write what it prints, such as its stacks, to the end of this file; and each one that takes its place."""
        self._stderr = path
        for server in self._servers:
            self._redirect(server)

    def follow_stderr(self) -> None:
        """If that file was rotated, have it write to the new one."""
        if self._stderr is not None:
            with contextlib.suppress(OSError):
                if os.stat(self._stderr).st_ino != self._stderr_inode:
                    self.stderr_to(self._stderr)

    def _redirect(self, server: Server) -> None:
        if self._stderr is not None:
            with contextlib.suppress(OSError), open(self._stderr, "ab", buffering=0) as file:
                self._stderr_inode = os.fstat(file.fileno()).st_ino
                server.tell({"stderr": True}, [file.fileno()])

    def guard(self, delay: float) -> None:
        """Have it start this command again if this process is killed, and nobody else does so for `delay` seconds."""
        self._delay = delay
        self._have_guarded()

    def trade_places(self, other: Servers) -> None:
        """Have the processes of this one be the other's, and the other's this one's."""
        self._servers, other._servers = other._servers, self._servers
        self._copying, other._copying = other._copying, self._copying
        self._spare, other._spare = other._spare, self._spare
        for server in self._servers:
            self._redirect(server)

    def close(self) -> None:
        """End it. Its children stay."""
        copying, self._copying = self._copying, None
        while self._servers:
            self._drop(self._servers[0])
        if copying is not None:
            # Whose pid was not told yet: it ends by itself, and with it the other end of its line.
            with copying, contextlib.suppress(OSError):
                copying.shutdown(socket.SHUT_WR)
                copying.settimeout(END_SECONDS)
                while copying.recv(PACKET_MAX):
                    pass

    def let_go(self) -> None:
        """It is not ours any more: it goes on to hold what it holds, for whoever takes over from us."""
        for server in self._servers:
            server.line.close()
            server.process.close()
        self._servers.clear()
        if self._copying is not None:
            self._copying.close()
            self._copying = None

    def _start(self) -> None:
        self._next_start = time.monotonic() + _INTERVAL
        server = start()
        if not self.waits:  # while a daemon serves: until it is ready, no front end that was killed is started again
            priority.hasten(server.process.pid)
        self._servers.append(server)
        self._redirect(server)
        self.started()
        server.hold(self.held)
        if server.holds:
            self.started()
        self._have_guarded()

    def _drop(self, server: Server, seconds: float = END_SECONDS) -> None:
        """Without it: its copy takes its place, if there is one. Its end is waited for so long."""
        first = server is self._servers[0]
        self._servers.remove(server)
        if server is self._spare:
            self._spare = None
        if not server.ready and (server.process.poll() or 0) > 0:  # it has failed, and was not killed
            self._interval = min(2 * self._interval, _INTERVAL_NO_ROOM)
            self._next_start = time.monotonic() + self._interval
        server.close(seconds)
        if first:
            if self._copying is not None:
                self._copying.close()
                self._copying = None
            self._have_guarded()

    @property
    def _tells_at(self) -> float:
        """When one is to be told what is late, to guard us, or to make a copy (`time.monotonic()`). There is one."""
        late = self._next_try if any(server.is_late for server in self._servers) else math.inf
        if not self._servers[0].ready:
            return late
        return min(late, self._next_copy if self._unguarded or self._wants_copy else math.inf)

    def _catch_up(self, now: float) -> None:
        """Hear what they have to say unasked, and tell them what is late."""
        for server in self._servers:
            self._hear(server)
            if server.is_late:
                self._next_try = now + _INTERVAL
                server.catch_up()
                if server.holds:
                    self.started()

    def _complete(self, now: float) -> None:
        """Have one guard us, or a copy made, where that is missing and due. Raises OSError when there is no room for it."""
        if now < self._next_copy:
            return
        if self._unguarded:
            self._have_guarded()
        elif self._wants_copy and self._servers[0].ready:
            self._ask_for_copy()

    @property
    def _wants_copy(self) -> bool:
        """Whether one is missing and can be asked for: that would have what its original is told before it is made."""
        return len(self._servers) == 1 and self._copying is None and not self._servers[0].is_late

    def _no_room(self, error: OSError) -> None:
        log.error("no fork server can be started, copied or made a guardian: %s; trying again", error.strerror)
        self._next_copy = time.monotonic() + _INTERVAL_NO_ROOM

    def _have_guarded(self) -> None:
        """By the one that is asked; where there is no room for what it needs, later.

        The environment that we were given stays in a memfd until it is needed: no process has it in its memory.
        """
        if not self._delay or not self._servers:
            return
        try:
            with open(os.memfd_create("nydusd-environment", os.MFD_CLOEXEC), "wb", buffering=0) as environ:
                # As it was: secrets were taken out of `os.environ`.
                with open("/proc/self/environ" if self._given < 0 else f"/proc/self/fd/{self._given}", "rb") as given:
                    environ.write(given.read())
                command = [sys.executable, "-P", "-m", "nydusd", *sys.argv[1:]]
                told = {"guard": {"delay": self._delay, "command": command, "nice": priority.usual()}}
                self._unguarded = not self._servers[0].tell(told, [environ.fileno()])
                if self._unguarded:
                    self._next_copy = time.monotonic() + _INTERVAL
        except OSError as e:
            self._unguarded = True
            self._no_room(e)

    def _ask_for_copy(self) -> None:
        take_in_orphans()
        self._next_copy = time.monotonic() + _INTERVAL
        self._released.clear()
        self._copying, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            if not self._servers[0].tell({"copy": True}, [theirs.fileno()]):
                self._copying.close()
                self._copying = None

    def _hear(self, server: Server) -> None:
        """Take what it has to say unasked."""
        with contextlib.suppress(OSError):  # nothing, or it is gone
            server.line.settimeout(0)
            while packet := server.line.recv(PACKET_MAX):
                self._takes(server, json.loads(packet))

    def _takes(self, server: Server, answer: dict[str, Any]) -> int:
        """The number of the request for a child that this is the answer to; 0: of none."""
        if "ready" in answer:
            server.ready = True
            priority.settle(server.process.pid)
            self._interval = _INTERVAL
        elif "copy" in answer:
            line, self._copying = self._copying, None
            if line is not None:
                try:
                    copy = Server(line, answer["copy"], server.commit, ready=True)
                except OSError:  # no room for one, or it is gone already
                    line.close()
                    self._next_copy = time.monotonic() + _INTERVAL_NO_ROOM
                else:
                    # It was made at the priority that its original had then, perhaps in the hurry of a start.
                    priority.settle(answer["copy"])
                    self._servers.append(copy)
                    copy.tell({})
                    copy.release(self._released)
                    copy.hold(self.held)
        else:
            return server.answered()
        return 0
