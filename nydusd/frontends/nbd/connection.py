"""One client of the export: its messages in, its replies out, as far as its socket takes them. Never waits.

Runs in the front end; the client survives it. A message is taken when all of it is there, by one recv(2) into memory that
outlives us (`kept.py`): it is there wholly or not at all. A reply is written to a pipe, in pieces, and moved on to the
socket by splice(2), so that the kernel itself keeps the count of what was sent. The successor answers what was taken and not
answered, and goes on in the middle of a reply: an image is read-only, so the rest of it is the same bytes, computed once more.

What a client may cost is bounded, and what all of them do (`room.py`): a read for whose reply there is no room is put off, and
meanwhile, or while too many are under way, nothing more is read from the socket. A client that breaks the protocol is
disconnected.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import logging
import os
import socket
import termios
from collections import deque
from collections.abc import Callable, Sequence

from nydusd import points

from . import kept, protocol
from .kept import Kept, Sending
from .protocol import Export, ProtocolError, Request
from .room import Room

log = logging.getLogger(__name__)

_SKIP_SIZE = 64 << 10


class Connection:
    """`read(connection, request)` begins a read, which `answer` ends. `pipe`: its ends, empty or as a predecessor left it.

    `room`: what all share.
    """

    def __init__(
        self,
        number: int,
        sock: socket.socket,
        pipe: tuple[int, int],
        known: Kept,
        export: Export,
        read: Callable[[Connection, Request], None],
        room: Room,
    ) -> None:
        self.number = number
        self.sock = sock
        self.closed = False
        self._out, self._in = pipe
        self._room = fcntl.fcntl(self._in, fcntl.F_GETPIPE_SZ)
        self._kept = known
        self._export = export
        self._read = read
        self._room_of_all = room
        self.held = 0
        """Bytes of replies that the client has not taken, or that its reads under way will give."""
        self._put_off: deque[Request] = deque()
        """Reads that were taken and not begun: there was no room."""
        self._under_way = 0
        """Commands that were taken and whose replies are not ready."""
        self._ready: deque[tuple[Request, int, memoryview | None]] = deque()
        self._reply: Sequence[memoryview] | None = None
        """What is being sent, all of it from its first byte."""
        self._left = 0
        """Bytes in the pipe."""
        self._resumed: int | None = None
        """The slot of a command whose reply a predecessor has begun, and which is not computed again yet."""
        self.partial = False
        """Whether there is a part of a message, so that nothing can be taken: it makes no event when the rest comes."""
        self._failed = False
        """Whether the client was told that data follow, and they cannot be had."""

    def resume(self) -> None:
        """Begin: greet the client, or go on where a predecessor was killed. Raises ProtocolError."""
        known = self._kept
        if known.skips_unknown:
            raise ProtocolError("it was writing, to what is read-only, when the front end was killed")
        self._left = _queued(self._out)
        at, piece, what = known.sending
        piece = piece or self._left
        if piece and not self._left:
            at, piece = at + piece, 0
        known.sending = Sending(at, piece, what)
        taken = [slot for slot in range(kept.SLOTS) if known.is_taken(slot)]
        if known.phase == kept.GREETING or what == kept.OF_GREETING:
            self._begin(kept.OF_GREETING, [memoryview(protocol.GREETING)])
        elif known.phase == kept.FLAGS and any(known.flags):
            self._flags_taken()
        elif known.option[0]:
            self._option_taken()
        elif what == kept.OF_OPTION or (what and what - 1 not in taken):
            known.sending = Sending(0, 0, kept.NOTHING)  # all of it was sent
        for slot in taken:
            if what == slot + 1:
                self._resumed = slot
            self._request_taken(slot)

    # --- what the server asks ---------------------------------------------------------------------------------

    @property
    def serving(self) -> bool:
        """Whether the negotiation is over."""
        return self._kept.phase >= kept.SERVING

    @property
    def wants_input(self) -> bool:
        phase = self._kept.phase
        if self.partial or phase in (kept.GREETING, kept.ENDING):
            return False
        if phase != kept.SERVING:
            return self._reply is None
        return self._under_way + len(self._ready) < kept.SLOTS - 1 and not self._put_off

    @property
    def wants_output(self) -> bool:
        """Whether `send` has something to do: also to find that it was the last."""
        if self._failed or self._reply is not None or (self._ready and self._resumed is None):
            return True
        return self._kept.phase == kept.ENDING and not self._under_way

    def receive(self) -> None:
        """Take in what has come. Raises ProtocolError, and OSError when the client is gone."""
        self.partial = False
        while self.wants_input and self._step():
            pass

    def send(self) -> None:
        """Give the client what it takes. Raises OSError when it is gone, or must be let go."""
        if self._failed:
            raise ConnectionAbortedError("a reply that was half sent cannot be ended")
        while self._reply is not None or (self._ready and self._resumed is None):
            if self._reply is None:
                self._begin_next()
            if not self._pump():
                return
            self._end_reply()
        if self._kept.phase == kept.ENDING and not self._under_way:
            raise ConnectionResetError("the client has said good-bye")

    def reserve(self, length: int) -> None:
        """A read of so many bytes is under way."""
        self._hold(length)

    def answer(self, asked: Request, code: int, data: memoryview | None) -> None:
        """End a read that was reserved."""
        self._hold(-asked.length)
        self._answer(asked, code, data)

    def _hold(self, more: int) -> None:
        self.held += more
        self._room_of_all.used += more

    @property
    def is_put_off(self) -> bool:
        """Whether a read waits for room."""
        return bool(self._put_off)

    def go_on(self) -> bool:
        """Begin a read that was put off, if there is room for it now; whether there was."""
        if not self._put_off or not self._room_of_all.has(self.held, self._put_off[0].length):
            return False
        self._read(self, self._put_off.popleft())
        return True

    def close(self) -> None:
        """For the client at once, whoever else has its socket."""
        self.closed = True
        self._hold(-self.held)
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self._kept.inodes = 0, 0
        os.close(self._in)
        os.close(self._out)

    # --- messages in: each step takes one, or says False because it is not there yet ----------------------------

    def _step(self) -> bool:
        known = self._kept
        if known.phase == kept.FLAGS:
            if not self._has(protocol.CLIENT_FLAGS.size):
                return False
            self._receive(known.flags)
            self._flags_taken()
            return True
        if known.phase == kept.OPTION:
            size = protocol.OPTION.size
            if not self._has(size):
                return False
            head = self.sock.recv(size, socket.MSG_PEEK)
            if len(head) < size:
                raise ProtocolError("a message with more than bytes")
            size += protocol.option_length(head)
            if not self._has(size):
                return False
            self._receive(known.option[:size])
            self._option_taken()
            return True
        if known.skip:
            self._skip()
            return True
        if not self._has(protocol.REQUEST.size):
            return False
        slot = next(slot for slot in range(kept.SLOTS) if not known.is_taken(slot))
        known.make_ready(slot)
        self._receive(known.request(slot))
        self._request_taken(slot)
        return True

    def _receive(self, place: memoryview) -> None:
        """Take a message that has come. Raises ProtocolError when file descriptors came with a part of it."""
        if self.sock.recv_into(place) != len(place):
            raise ProtocolError("a message with more than bytes")
        points.reach("nbd: message taken")

    def _has(self, size: int) -> bool:
        """Whether so many bytes have come. Raises ConnectionResetError at the end of the client's bytes."""
        there = _queued(self.sock.fileno())
        if there >= size:
            return True
        if there:
            self.partial = True
        elif not self.sock.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError("end of file")
        return False

    def _skip(self) -> None:
        """Throw away what has come of a write. Raises BlockingIOError when nothing has."""
        known = self._kept
        count = known.skip
        known.begin_skip()
        try:
            data = self.sock.recv(min(count, _SKIP_SIZE))
            points.reach("nbd: bytes of a write taken")
            count -= len(data)
        finally:
            known.skip = count
        if not data:
            raise ConnectionResetError("end of file")

    def _flags_taken(self) -> None:
        protocol.client_flags(bytes(self._kept.flags))
        self._kept.phase = kept.OPTION

    def _option_taken(self) -> None:
        """Answer the option that is there; in the middle of the answer if a predecessor had begun."""
        answer = self._option_answer()
        if answer.data:
            self._begin(kept.OF_OPTION, [memoryview(answer.data)])
        else:
            self._end_option()

    def _option_answer(self) -> protocol.Answer:
        head = bytes(self._kept.option[: protocol.OPTION.size])
        data = bytes(self._kept.option[len(head) : len(head) + protocol.option_length(head)])
        return protocol.option(head, data, self._export, protocol.client_flags(bytes(self._kept.flags)))

    def _end_option(self) -> None:
        """It was answered."""
        answer = self._option_answer()
        self._kept.phase = kept.SERVING if answer.serve else kept.ENDING if answer.end else kept.OPTION
        self._kept.option[0] = 0  # nothing is there any more: one store
        self._kept.sending = Sending(0, 0, kept.NOTHING)

    def _request_taken(self, slot: int) -> None:
        """Begin what a command asks for."""
        known = self._kept
        asked = protocol.request(known.request(slot), slot)
        if asked.kind == protocol.WRITE and not known.is_noted(slot):
            known.skip = asked.length
            known.note(slot)
        self._under_way += 1
        code = protocol.refusal(asked, self._export)
        if asked.kind == protocol.DISC:
            known.phase = kept.ENDING
            known.free(slot)
            self._under_way -= 1
        elif slot == self._resumed and known.code(slot):
            self._answer(asked, known.code(slot), None)
        elif code or asked.kind in (protocol.FLUSH, protocol.CACHE):
            self._answer(asked, code, None)
        elif slot == self._resumed or (not self._put_off and self._room_of_all.has(self.held, asked.length)):
            self._read(self, asked)  # what a predecessor has begun to send at once: all else waits for it
        else:
            self._put_off.append(asked)

    # --- replies out ------------------------------------------------------------------------------------------

    def _answer(self, asked: Request, code: int, data: memoryview | None) -> None:
        self._under_way -= 1
        if asked.slot != self._resumed:
            self._ready.append((asked, code, data))
            self._hold(0 if data is None else len(data))
            return
        self._resumed = None
        at, piece, _ = self._kept.sending
        if not at and not piece:
            self._kept.sending = Sending(0, 0, kept.NOTHING)
            self._ready.append((asked, code, data))
        elif code != self._kept.code(asked.slot):
            log.error("a client is disconnected: the rest of a reply that it has half of cannot be had")
            self._failed = True
        else:
            self._reply = self._views(asked, code, data)
        self._hold(0 if data is None else len(data))

    @staticmethod
    def _views(asked: Request, code: int, data: memoryview | None) -> list[memoryview]:
        head = memoryview(protocol.reply(asked.cookie, code))
        return [head] if data is None else [head, data]

    def _begin_next(self) -> None:
        asked, code, data = self._ready.popleft()
        self._kept.set_code(asked.slot, code)
        self._begin(asked.slot + 1, self._views(asked, code, data))

    def _begin(self, what: int, reply: Sequence[memoryview]) -> None:
        if self._kept.sending.what != what:
            self._kept.sending = Sending(0, 0, what)
        self._reply = reply

    def _pump(self) -> bool:
        """Send the reply as far as the client takes it; whether that was all of it."""
        assert self._reply is not None
        known = self._kept
        size = sum(len(view) for view in self._reply)
        while True:
            at, piece, what = known.sending
            if not piece:
                if at >= size:
                    return True
                self._left = piece = os.writev(self._in, _cut(self._reply, at, self._room))
                points.reach("nbd: piece in the pipe")
                known.sending = Sending(at, piece, what)
            while self._left:
                try:
                    done = os.splice(self._out, self.sock.fileno(), self._left, flags=os.SPLICE_F_NONBLOCK)
                except BlockingIOError:
                    return False
                points.reach("nbd: piece sent")
                if not done:
                    raise ConnectionAbortedError("the pipe of a client is empty")
                self._left -= done
            known.sending = Sending(at + piece, 0, what)
            points.reach("nbd: piece noted")

    def _end_reply(self) -> None:
        """All of it was sent."""
        what = self._kept.sending.what
        if what == kept.OF_OPTION:
            self._end_option()
        elif what == kept.OF_GREETING:
            self._kept.phase = kept.FLAGS
            self._kept.sending = Sending(0, 0, kept.NOTHING)
        else:
            assert self._reply is not None
            self._hold(-sum(len(view) for view in self._reply[1:]))
            self._kept.free(what - 1)
            points.reach("nbd: slot free")
            self._kept.sending = Sending(0, 0, kept.NOTHING)
        self._reply = None


def _queued(fd: int) -> int:
    """Bytes that can be read from a socket or a pipe."""
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


def _cut(views: Sequence[memoryview], start: int, most: int) -> list[memoryview]:
    """`most` bytes at most from `start` of what the views are together."""
    found = []
    for view in views:
        part = view[start : start + most]
        start = max(0, start - len(view))
        most -= len(part)
        if len(part):
            found.append(part)
    return found
