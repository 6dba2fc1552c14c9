"""The clients of a block export: let in and held by the supervisor, served by a front end that may be replaced behind them.

Part of the supervisor. Of each client it holds the socket, a pipe through which replies go, and memory
(`frontends/nbd/kept.py`); a front end is given copies of all that. What holds after SIGKILL of the front end: everything is
here, for the next one. Of the supervisor: clients are disconnected.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from nydusd.frontends.nbd.kept import NUMBER, SERVING, SIZE, Kept

if TYPE_CHECKING:
    from nydusd.ipc.messages import Json
    from nydusd.supervisor.listener import Listener

log = logging.getLogger(__name__)

CLIENTS_MOST = 64
_WAITING_MOST = 64
"""Clients that wait until another, which has said nothing useful, is gone."""
_PIPE_SIZE = 1 << 18


class Clients:
    """`watch(fd, take)` has `take` called when there is something to read, `forget(fd)` ends that."""

    def __init__(
        self, listener: Listener, watch: Callable[[int, Callable[[], None]], None], forget: Callable[[int], None]
    ) -> None:
        self._listener = listener
        self._watch = watch
        self._forget = forget
        self._memory = os.memfd_create("nydusd-clients", os.MFD_CLOEXEC)
        os.ftruncate(self._memory, CLIENTS_MOST * SIZE)
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
        watch(listener.fileno(), self._accept)

    def spec(self) -> tuple[list[int], Json]:
        """What a new front end is given: fds, and how they are called."""
        self._drop_line()
        self._line, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line.setblocking(False)
        self._watch(self._line.fileno(), self._take_ended)
        clients = [[number, sock.fileno(), *pipe] for number, (sock, *pipe) in self._held.items()]
        fds = [self._memory, self._theirs.fileno(), *(fd for client in clients for fd in client[1:])]
        return fds, {"known": self._memory, "line": self._theirs.fileno(), "clients": clients}

    def started(self) -> None:
        """The front end has its end of the line."""
        if self._theirs is not None:
            self._theirs.close()
            self._theirs = None

    def close(self) -> None:
        """Disconnect everybody."""
        self._drop_line()
        for number in list(self._held):
            self._let_go(number)
        for sock in self._waiting:
            sock.close()
        self._waiting.clear()
        self._view.release()
        os.close(self._memory)

    def _accept(self) -> None:
        try:
            sock = self._listener.accept()
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EMFILE, errno.ENFILE):
                raise
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
        self._held[number] = (sock, *pipe)
        if self._line is not None:
            try:
                socket.send_fds(self._line, [NUMBER.pack(number)], [sock.fileno(), *pipe])
            except OSError:  # the front end is gone, or does not take them: the next one is given all
                self._drop_line()

    def _take_ended(self) -> None:
        """The front end says who is gone; or is gone itself."""
        assert self._line is not None
        try:
            while packet := self._line.recv(NUMBER.size):
                self._let_go(NUMBER.unpack(packet)[0])
        except BlockingIOError:
            return
        except OSError:
            pass
        self._drop_line()

    def _let_go(self, number: int) -> None:
        held = self._held.pop(number, None)
        if held is None:
            return
        sock, *pipe = held
        sock.close()
        for fd in pipe:
            os.close(fd)
        self._leaving.discard(number)
        self._free.append(number)
        if self._waiting:
            self._admit(self._waiting.popleft())

    def _drop_line(self) -> None:
        if self._line is not None:
            self._forget(self._line.fileno())
            self._line.close()
            self._line = None
        self.started()
