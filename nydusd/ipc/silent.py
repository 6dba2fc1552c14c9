"""Silent clients of the API: connected, and not a byte said. Their connections outlive the API process.

nydus-snapshotter keeps such a connection and takes its end for the daemon's. So the supervisor holds a copy of each and
gives them to the next API process. `SilentHolder` is the supervisor's end of the line between the two, `SilentLine` the
API process's.

A packet says the number of a client. To the supervisor: with the connection, it is to be held; without, no more, for
something is about to be read from it. To a new API process: that of the first of those in the packet, which is
sent before the process starts.

What holds after SIGKILL of the API process: of whoever was told to be held, and not to be let go, nothing was read, and the
next one serves him. Who was being let in at that very moment is not held yet, and is disconnected like those who have said
something. Of the supervisor: its copies are closed, and the API process ends; so clients see that the daemon died.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from nydusd.ipc import passed
from nydusd.ipc.messages import NUMBER

HELD_MOST: Final = 256
"""Any further ones are served, and end with the API process."""
_IN_PACKET: Final = 64
"""Connections in one packet: four packets fit into a line that nobody reads yet."""


class SilentHolder:
    """Holds copies. `watch(fd)` has `take` called when there is something to read from `fileno()`, `forget(fd)` ends that."""

    def __init__(self, watch: Callable[[int], None], forget: Callable[[int], None]) -> None:
        self._watch = watch
        self._forget = forget
        self._held: dict[int, int] = {}
        """The fd of each by its number."""
        self._line: socket.socket | None = None
        """To the API process, and its end of it until it has that."""
        self._theirs: socket.socket | None = None

    def fileno(self) -> int:
        """Our end of the line, -1 if there is none."""
        return -1 if self._line is None else self._line.fileno()

    def begin(self) -> tuple[int, int]:
        """For a new API process: its end of a line to us, and how many clients it gets by that, from number 0 on.

        -1 and none where there is no fd for a line: whom nobody would serve is disconnected.
        """
        self.take()
        self._drop_line()
        try:
            self._line, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            self.close()
            return -1, 0
        self._line.setblocking(False)
        self._watch(self._line.fileno())
        self._held = dict(enumerate(self._held.values()))
        fds = list(self._held.values())
        with suppress(OSError):  # it lets those go that do not come
            for first in range(0, len(fds), _IN_PACKET):
                socket.send_fds(self._line, [NUMBER.pack(first)], fds[first : first + _IN_PACKET])
        return self._theirs.fileno(), len(fds)

    def begun(self) -> None:
        """The API process has its end of the line."""
        if self._theirs is not None:
            self._theirs.close()
            self._theirs = None

    def take(self) -> None:
        """What the API process says; or it is gone, and those that are held wait for the next one. Does not block."""
        while self._line is not None:
            try:
                packet, fds = passed.receive(self._line, NUMBER.size, 1)
            except ConnectionResetError:  # killed before it had read all of ours; then comes what it had sent before
                continue
            except OSError:  # nothing more; or no memory for it now
                return
            if not packet:
                self._drop_line()
                return
            number = NUMBER.unpack(packet)[0]
            if not fds:  # also when it could not be received, for want of fds
                self._let_go(number)
            elif number in self._held or len(self._held) >= HELD_MOST:
                os.close(fds[0])
            else:
                self._held[number] = fds[0]

    def close(self) -> None:
        """Let go of all."""
        self._drop_line()
        for number in list(self._held):
            self._let_go(number)

    def _let_go(self, number: int) -> None:
        fd = self._held.pop(number, -1)
        if fd >= 0:
            os.close(fd)

    def _drop_line(self) -> None:
        if self._line is not None:
            self._forget(self._line.fileno())
            self._line.close()
            self._line = None
        self.begun()


class SilentLine:
    """The API process's end. `line` and `count` are what `SilentHolder.begin` gave; without a line nobody is held."""

    def __init__(self, line: socket.socket | None, count: int) -> None:
        if line is not None:
            line.setblocking(False)
        self._line = line
        self._inherited = count
        self._next = count

    def inherit(self) -> dict[int, socket.socket]:
        """Those who were silent when the former API process ended, by number. Some may have spoken, or left, since."""
        found: dict[int, socket.socket] = {}
        if self._line is None:
            return found
        with suppress(OSError):  # no more
            while len(found) < self._inherited:
                packet, fds = passed.receive(self._line, NUMBER.size, _IN_PACKET)
                if not packet:
                    break
                found.update(enumerate((socket.socket(fileno=fd) for fd in fds), NUMBER.unpack(packet)[0]))
        for number in range(self._inherited):
            if number not in found:  # for want of fds
                self.let_go(number)
        return found

    def hold(self, sock: socket.socket) -> int | None:
        """Have it held if it is silent: its number. None for one that has spoken, or left; or nobody holds any more."""
        if self._line is None:
            return None
        try:
            sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            return None
        except BlockingIOError:
            pass
        except OSError:
            return None
        number, self._next = self._next, self._next + 1
        try:
            socket.send_fds(self._line, [NUMBER.pack(number)], [sock.fileno()])
        except OSError:  # it has no time, there is no room, or it is gone
            return None
        return number

    def let_go(self, number: int) -> bool:
        """Before anything is read from it. False: the supervisor cannot be told now, so nothing may be read yet."""
        assert self._line is not None
        try:
            self._line.send(NUMBER.pack(number))
        except ConnectionError:
            return True
        except OSError:
            return False
        return True
