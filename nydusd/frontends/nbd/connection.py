"""One client of the export: its bytes in, its replies out, as far as its socket takes them. Never waits.

What a client may cost is bounded: as long as too many bytes wait to be taken by it, or too many of its reads are under way,
nothing more is read from its socket. A client that breaks the protocol is disconnected.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable

from . import protocol
from .protocol import Export, Request

_READ_SIZE = 64 << 10
_UNDER_WAY_MOST = 64
"""Reads of a client that wait for chunks."""
_UNSENT_MOST = 64 << 20
"""Bytes of replies that a client has not taken, or that its reads under way will give."""


class Connection:
    """`read(connection, request)` begins a read, which `answer` ends."""

    def __init__(self, sock: socket.socket, export: Export, read: Callable[[Connection, Request], None]) -> None:
        self.sock = sock
        self.closed = False
        self._export = export
        self._read = read
        self._in = bytearray()
        self._skip = 0
        self._out: deque[memoryview] = deque([memoryview(protocol.GREETING)])
        self._unsent = len(protocol.GREETING)
        self._step: Callable[[], bool] = self._take_flags
        self._no_zeroes = False
        self._under_way = 0
        self._ends = False
        self.serving = False
        """Whether the negotiation is over."""

    @property
    def wants_input(self) -> bool:
        return not self._ends and self._under_way < _UNDER_WAY_MOST and self._unsent < _UNSENT_MOST

    @property
    def wants_output(self) -> bool:
        """Whether `send` has something to do: also to find that it was the last."""
        return bool(self._out) or (self._ends and not self._under_way)

    def receive(self) -> None:
        """Take in what has come. Raises ProtocolError, and OSError when the client is gone."""
        data = self.sock.recv(_READ_SIZE)
        if not data:
            raise ConnectionResetError("end of file")
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._in += data[skipped:]
        self.proceed()

    def proceed(self) -> None:
        """Do what the bytes that are there ask for. Raises ProtocolError."""
        while self.wants_input and self._step():
            pass

    def send(self) -> None:
        """Give the client what it takes. Raises OSError when it is gone."""
        while self._out:
            view = self._out[0]
            try:
                done = self.sock.send(view)
            except BlockingIOError:
                return
            self._unsent -= done
            if done < len(view):
                self._out[0] = view[done:]
                return
            self._out.popleft()
        if self._ends and not self._under_way:
            raise ConnectionResetError("the client has said good-bye")

    def reserve(self, length: int) -> None:
        """A read of so many bytes is under way."""
        self._under_way += 1
        self._unsent += length

    def answer(self, asked: Request, code: int, data: memoryview | None) -> None:
        """End a read that was reserved."""
        self._under_way -= 1
        self._unsent -= asked.length
        self._put(protocol.reply(asked.cookie, code))
        if data is not None:
            self._out.append(data)
            self._unsent += len(data)

    def _put(self, data: bytes) -> None:
        if data:
            self._out.append(memoryview(data))
            self._unsent += len(data)

    def _cut(self, size: int) -> bytes | None:
        """The first bytes of what has come, None if there are fewer."""
        if len(self._in) < size:
            return None
        head = bytes(self._in[:size])
        del self._in[:size]
        return head

    # --- steps: each takes one message, or says False because it is not there yet ------------------------------

    def _take_flags(self) -> bool:
        raw = self._cut(protocol.CLIENT_FLAGS.size)
        if raw is None:
            return False
        self._no_zeroes = protocol.client_flags(raw)
        self._step = self._take_option
        return True

    def _take_option(self) -> bool:
        size = protocol.OPTION.size
        if len(self._in) < size:
            return False
        length = protocol.option_length(bytes(self._in[:size]))
        raw = self._cut(size + length)
        if raw is None:
            return False
        answer = protocol.option(raw[:size], raw[size:], self._export, self._no_zeroes)
        self._put(answer.data)
        self._ends = answer.end
        if answer.serve:
            self.serving = True
            self._step = self._take_request
        return True

    def _take_request(self) -> bool:
        raw = self._cut(protocol.REQUEST.size)
        if raw is None:
            return False
        asked = protocol.request(raw)
        if asked.kind == protocol.WRITE:
            skipped = min(asked.length, len(self._in))
            del self._in[:skipped]
            self._skip = asked.length - skipped
        code = protocol.refusal(asked, self._export)
        if asked.kind == protocol.DISC:
            self._ends = True
        elif code or asked.kind in (protocol.FLUSH, protocol.CACHE):
            self._put(protocol.reply(asked.cookie, code))
        else:
            self._read(self, asked)
        return True

    def close(self) -> None:
        self.closed = True
        self.sock.close()
