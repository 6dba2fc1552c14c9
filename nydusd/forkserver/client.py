"""The daemon's side of its fork server: start it, have it make children, have another when it is gone.

Runs in the supervisor, and is begun by the command line before all that the supervisor needs is loaded: the fork server loads
what children need meanwhile. Later it makes a copy of itself, which costs little and takes its place at once when it is gone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nydusd import priority
from nydusd.forkserver.line import END_SECONDS, PACKET_MAX, Server
from nydusd.forkserver.process import Process, let_begin, take_in_orphans
from nydusd.forkserver.start import start
from nydusd.version import GIT_COMMIT
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
_INTERVAL = 0.1
"""Seconds between two that are started, so that one that cannot live costs little."""
_INTERVAL_NO_ROOM = 2.0
"""The same where there was no room for one."""


class LoadingError(OSError):
    """There is a fork server, or will be, and it loads, or does not answer: ask again when one is `ready`."""


class ForkServer:
    """The daemon's fork server, and a copy of it that takes its place at once when it is gone: `tend` sees to both.

    Raises OSError when there is no room for it.
    """

    def __init__(self, made: tuple[socket.socket, int, int] | None = None, stub: int = 0) -> None:
        """`made`: our end of the line to a fork server that is there already, its pid, and an fd with our environment.

        `stub`: the pid of the command that had a nursery make us, and lives as long as we do.
        """
        self.stub = stub
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
        """Whether `spawn` may wait for a fork server: else it raises LoadingError where none answers in a moment."""
        self._moment = _MOMENT
        """How long that is now."""
        self.told = DEAF
        """Whether we are told to end while a child waits for one: EndedError is raised then, and there is no child."""
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

    def _patience(self, server: Server) -> float:
        """Seconds that it may take for an answer."""
        if not server.ready:
            return _FIRST_PATIENCE
        others = any(other.ready for other in self._servers if other is not server)
        return _PATIENCE_WITH_COPY if others else _PATIENCE

    @property
    def _silent_until(self) -> float:
        """When another is loaded beside those that there are (`time.monotonic()`): none of them answers."""
        if not all(server.ready for server in self._servers):
            return math.inf
        return max(max(server.owes_since for server in self._servers) + _PATIENCE_WITH_ALL, self._next_start)

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

    def fds(self) -> list[int]:
        """Those that become readable when `tend` has something to do."""
        return [fd for server in self._servers for fd in (server.process.pidfd, server.line.fileno())]

    def due(self) -> float:
        """When `tend` has something to do in any case (`time.monotonic()`)."""
        if not self._servers:
            return self._next_start
        late = self._next_try if any(server.is_late for server in self._servers) else math.inf
        late = min(late, self._silent_until, *map(self._hangs_at, self._servers))
        if not self._servers[0].ready:
            return late
        return min(late, self._next_copy if self._unguarded or self._wants_copy else math.inf)

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
        for server in self._servers:
            self._hear(server)
            if server.is_late:
                self._next_try = now + _INTERVAL
                server.catch_up()
                if server.holds:
                    self.started()
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
        elif now >= self._next_copy and self._unguarded:
            self._have_guarded()
        elif now >= self._next_copy and self._wants_copy and self._servers[0].ready:
            self._ask_for_copy()

    def _hangs_at(self, server: Server) -> float:
        """When it has been silent for too long (`time.monotonic()`)."""
        return server.owes_since + self._patience(server) if server.ready else server.since + _FIRST_PATIENCE

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

    @property
    def _wants_copy(self) -> bool:
        """Whether one is missing and can be asked for: that would have what its original is told before it is made."""
        return len(self._servers) == 1 and self._copying is None and not self._servers[0].is_late

    def _no_room(self, error: OSError) -> None:
        log.error("no fork server can be started, copied or made a guardian: %s; trying again", error.strerror)
        self._next_copy = time.monotonic() + _INTERVAL_NO_ROOM

    def trade_places(self, other: ForkServer) -> None:
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
                copying.settimeout(_PATIENCE)
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

    def _renew(self, server: Server | None) -> None:
        """Without the one that was asked: another is, or is started."""
        if server is not None:
            log.warning("the fork server (pid %d) is gone or hangs", server.process.pid)
            self._drop(server)
        if not self._servers:
            self._start()

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
