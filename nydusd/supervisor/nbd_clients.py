"""The clients of a block export: let in and held by the supervisor, served by a front end that may be replaced behind them.

Part of the supervisor. Of each client it holds the socket, a pipe through which replies go, and memory
(`frontends/nbd/kept.py`); a front end is given copies of all that, and the fork server holds them, too.

What holds after SIGKILL of the front end: everything is here, for the next one. Of the supervisor: front end and fork server
have it, and the next supervisor takes it from there (`nbd_left.py`). Only who was let in and not yet given to either is
disconnected: no byte was sent to it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import mmap
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from nydusd import points
from nydusd.frontends.nbd.kept import CLIENTS_MOST, NUMBER, SERVING, SIZE, Kept

if TYPE_CHECKING:
    from nydusd.ipc.messages import Json
    from nydusd.supervisor.listener import Listener
    from nydusd.supervisor.nbd_left import Left

log = logging.getLogger(__name__)

MEMORY = "nydusd-clients"
"""The name of the memory."""
_WAITING_MOST = 64
"""Clients that wait until another, which has said nothing useful, is gone."""
_PIPE_SIZE = 1 << 18
_NO_ROOM_SECONDS = 1.0
"""How long nobody is let in where there is no room for another: who knocks stays at the door, and would wake us for ever."""
_NOBODY = (errno.EAGAIN, errno.EINTR, errno.ECONNABORTED)
"""accept(2): there was nobody, or nobody any more."""


class Around(Protocol):
    """What the daemon does for its clients."""

    def watch(self, fd: int, take: Callable[[], None]) -> None:
        """Call `take` when there is something to read."""

    def forget(self, fd: int) -> None:
        """End of `watch`."""

    def hold(self, fds: Sequence[int]) -> None:
        """Have the fork server hold these, too."""

    def release(self, fds: Sequence[int]) -> None:
        """End of `hold`: they are about to be closed."""

    def renew(self) -> None:
        """End the front end, which does not take a client: the next one is given all."""


class Clients:
    """`left`: those of a supervisor that was killed."""

    def __init__(self, listener: Listener, around: Around, left: Left | None = None) -> None:
        self._listener = listener
        self._around = around
        self._closed_until: float | None = None
        """Until when nobody is let in (`time.monotonic()`)."""
        if left is None:
            self._memory = os.memfd_create(MEMORY, os.MFD_CLOEXEC)
            os.ftruncate(self._memory, CLIENTS_MOST * SIZE)
        else:
            self._memory = left.memory
        self._view = memoryview(mmap.mmap(self._memory, 0))
        self._free = list(range(CLIENTS_MOST - 1, -1, -1))
        self._held: dict[int, tuple[socket.socket, int, int]] = {}
        """By number: socket, and the pipe's end to read and to write."""
        self._leaving: set[int] = set()
        """Those who were told to make room."""
        self._waiting: deque[socket.socket] = deque()
        self._line: socket.socket | None = None
        """To the front end, and its end of it until it has that."""
        self._theirs: socket.socket | None = None
        if left is not None:
            self._held |= left.clients
            self._free = [number for number in self._free if number not in left.clients]
        # The memory comes first: for as long as it lives they are held.
        held = [fd for sock, *pipe in self._held.values() for fd in (sock.fileno(), *pipe)]
        around.hold([self._memory, listener.fileno(), *held])
        around.watch(listener.fileno(), self._accept)

    @property
    def inode(self) -> int:
        """That of the memory."""
        return os.fstat(self._memory).st_ino

    def spec(self) -> tuple[list[int], Json]:
        """What a new front end is given: fds, and how they are called."""
        self._drop_line()
        self._sweep()
        self._line, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line.setblocking(False)
        self._around.watch(self._line.fileno(), self._take_ended)
        clients = [[number, sock.fileno(), *pipe] for number, (sock, *pipe) in self._held.items()]
        fds = [self._memory, self._listener.fileno(), self._theirs.fileno(), *(fd for c in clients for fd in c[1:])]
        return fds, {"known": self._memory, "line": self._theirs.fileno(), "clients": clients}

    def started(self) -> None:
        """The front end has its end of the line."""
        if self._theirs is not None:
            self._theirs.close()
            self._theirs = None

    def shut(self) -> None:
        """Let nobody in."""
        if self._closed_until is None:
            self._around.forget(self._listener.fileno())
        self._closed_until = math.inf

    def due(self) -> float:
        """When `tick` has something to do (`time.monotonic()`)."""
        return math.inf if self._closed_until is None else self._closed_until

    def tick(self, now: float) -> None:
        """Let clients in again when it is time."""
        if now >= self.due():
            self._closed_until = None
            self._around.watch(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Disconnect everybody."""
        self._drop_line()
        for sock in self._waiting:
            sock.close()
        self._waiting.clear()
        for number in list(self._held):
            self._let_go(number)
        self._view.release()
        os.close(self._memory)

    def _accept(self) -> None:
        try:
            sock = self._listener.accept()
        except OSError as e:
            if e.errno not in _NOBODY:
                log.warning("clients cannot be let in: %s; trying again in %g s", e.strerror, _NO_ROOM_SECONDS)
                self.shut()
                self._closed_until = time.monotonic() + _NO_ROOM_SECONDS
            return
        sock.setblocking(False)
        if self._free:
            self._admit(sock)
            return
        # Who has said nothing useful yet makes room: a client that is stuck in the negotiation keeps nobody out.
        idle = next((n for n in self._held if n not in self._leaving and self._known(n).phase != SERVING), None)
        if idle is None or len(self._waiting) >= _WAITING_MOST:
            log.warning("a client was refused: %d are connected", len(self._held))
            sock.close()
            return
        self._leaving.add(idle)
        with contextlib.suppress(OSError):
            self._held[idle][0].shutdown(socket.SHUT_RDWR)
        self._waiting.append(sock)

    def _known(self, number: int) -> Kept:
        return Kept(self._view[number * SIZE : (number + 1) * SIZE])

    def _admit(self, sock: socket.socket) -> None:
        try:
            pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as e:
            log.warning("a client was refused: %s", e.strerror)
            sock.close()
            return
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        number = self._free.pop()
        self._view[number * SIZE : (number + 1) * SIZE] = bytes(SIZE)
        self._known(number).inodes = os.fstat(sock.fileno()).st_ino, os.fstat(pipe[0]).st_ino
        self._held[number] = (sock, *pipe)
        points.reach("clients: one is known")
        if self._line is not None:
            try:
                socket.send_fds(self._line, [NUMBER.pack(number)], [sock.fileno(), *pipe])
            except OSError as e:  # the front end is gone, or does not take them: the next one is given all
                log.warning("the front end does not take a client: %s; another is started", e.strerror)
                self._drop_line()
                self._around.renew()
        points.reach("clients: one is served")
        self._around.hold([sock.fileno(), *pipe])

    def _take_ended(self) -> None:
        """The front end says who is gone; or is gone itself."""
        assert self._line is not None
        try:
            while self._line.recv(NUMBER.size):
                pass
        except BlockingIOError:
            pass
        except OSError:
            self._drop_line()
        else:
            self._drop_line()
        self._sweep()

    def _sweep(self) -> None:
        """Let go of those who are gone."""
        for number in [number for number in self._held if self._known(number).inodes == (0, 0)]:
            self._let_go(number)

    def _let_go(self, number: int) -> None:
        held = self._held.pop(number, None)
        if held is None:
            return
        sock, *pipe = held
        self._around.release([sock.fileno(), *pipe])
        sock.close()
        for fd in pipe:
            os.close(fd)
        self._leaving.discard(number)
        self._free.append(number)
        if self._waiting:
            self._admit(self._waiting.popleft())

    def _drop_line(self) -> None:
        if self._line is not None:
            self._around.forget(self._line.fileno())
            self._line.close()
            self._line = None
        self.started()
