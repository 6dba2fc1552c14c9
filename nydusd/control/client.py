"""One client of the API: its socket, its half-read request, its half-written answer.

Runs in the API process, never blocks. Memory is bounded by what this module keeps for a client: at most 64 KiB that were read
ahead, a body of 1 MiB, and one answer; nothing more is read from it until that answer is on the wire.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
from typing import Final, NamedTuple

import h11

from nydusd.control.routes import Answer, error_answer

MAX_BODY: Final = 1 << 20
"""Longest request body in bytes; a longer one gets 413."""
_MAX_HEAD: Final = 64 << 10
_READ_SIZE: Final = 64 << 10


class Request(NamedTuple):
    """A complete request."""

    method: str
    target: str
    body: bytes


class Client:
    """An accepted connection. The server calls `read`, `next_request`, `answer`, `write` and asks for its state."""

    def __init__(self, sock: socket.socket, paths: tuple[str, ...] = (), number: int | None = None) -> None:
        self._sock = sock
        self.paths = paths
        """All that this client may ask for, without a body; empty: anything."""
        self.number = number
        """Under which the supervisor holds the connection, too; None: it does not."""
        self.unread = False
        """It has spoken, and must not be read yet."""
        self._max_body = 0 if paths else MAX_BODY
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
        self._head: h11.Request | None = None
        self._body = bytearray()
        self._out = bytearray()
        self._discarding = False
        self._watched = 0
        self.waiting = False
        """A request of this client is with the supervisor."""
        self.closed = False

    @property
    def has_output(self) -> bool:
        return bool(self._out)

    @property
    def half_sent(self) -> bool:
        """Whether the client owes us the rest of something: of a request, or of what we refused to read."""
        if self._discarding:
            return True
        if self.waiting or self._out:
            return False
        return self._http.their_state is h11.SEND_BODY or bool(self._http.trailing_data[0])

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Have the selector report what can be gone on with now: output first, no input while a request is under way."""
        wanted = 0
        if not self.closed:
            wanted |= selectors.EVENT_WRITE if self._out else 0
            can_read = self._discarding or not (self.waiting or self._out or self.unread)
            wanted |= selectors.EVENT_READ if can_read else 0
        if wanted == self._watched:
            return
        if wanted and self._watched:
            selector.modify(self._sock, wanted, self)
        elif wanted:
            selector.register(self._sock, wanted, self)
        else:
            selector.unregister(self._sock)
        self._watched = wanted

    def read(self) -> None:
        """Take in what has arrived, at most 64 KiB."""
        try:
            data = self._sock.recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if self._discarding:
            if not data:
                self.close()
            return
        self._http.receive_data(data)

    def next_request(self) -> Request | None:
        """The next complete request, None if there is none yet. A wrong one is answered here, and the connection ends."""
        if self.waiting or self._out or self.closed or self._discarding:
            return None
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            self._head = None
        try:
            return self._take_events()
        except h11.RemoteProtocolError as error:
            self._refuse(error_answer(error.error_status_hint, "BadRequest"))
            return None

    def _take_events(self) -> Request | None:
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Request):
                self._head = event
                self._body.clear()
                if _content_length(event) > self._max_body:
                    self._refuse(error_answer(413, "BadRequest"))
                    return None
                if self._http.they_are_waiting_for_100_continue:
                    go_on = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
                    self._out += self._http.send(go_on) or b""
                    self.write()
            elif isinstance(event, h11.Data):
                self._body += event.data
                if len(self._body) > self._max_body:
                    self._refuse(error_answer(413, "BadRequest"))
                    return None
            elif isinstance(event, h11.EndOfMessage):
                assert self._head is not None
                return Request(self._head.method.decode(), self._head.target.decode(), bytes(self._body))
            elif isinstance(event, h11.ConnectionClosed):
                self.close()
                return None
            else:  # NEED_DATA or PAUSED
                return None

    def answer(self, answer: Answer) -> None:
        """Send an answer to the request that `next_request` gave last."""
        self.waiting = False
        if self.closed:
            return
        kind = answer.content_type or "application/json"
        body = _body(answer)
        headers = [("Server", "Nydus API"), ("Connection", "close" if self._discarding else "keep-alive")]
        if answer.status != 204:
            headers += [("Content-Type", kind), ("Content-Length", str(len(body)))]
        response = h11.Response(status_code=answer.status, headers=headers, reason=b"")
        self._out += self._http.send(response) or b""
        if body and answer.status != 204 and not (self._head is not None and self._head.method == b"HEAD"):
            self._out += self._http.send(h11.Data(data=body)) or b""
        self._out += self._http.send(h11.EndOfMessage()) or b""
        self.write()

    def _refuse(self, answer: Answer) -> None:
        """Answer a request that was not read to its end; then the connection is of no further use."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.close()
            return
        self._discarding = True
        self.answer(answer)

    def timed_out(self) -> None:
        """The rest of a request did not come in time; or none at all, or an answer was not taken."""
        if self._discarding or not self.half_sent:
            self.close()
            return
        self._refuse(error_answer(408, "BadRequest"))
        self.close()

    def write(self) -> None:
        """Send what the socket takes of the pending output."""
        if self.closed:
            return
        try:
            while self._out:
                del self._out[: self._sock.send(self._out)]
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if self._discarding:
            # Closed at once, a client that is still sending would see a reset instead of our answer.
            self._shut_down()
        elif self._http.our_state in (h11.MUST_CLOSE, h11.ERROR):
            self.close()

    def _shut_down(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()

    def close(self) -> None:
        if self.number is None:
            with contextlib.suppress(OSError):  # the supervisor may not have let go of it yet
                self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._out.clear()
        self.closed = True


def _body(answer: Answer) -> bytes:
    if answer.content_type:
        return str(answer.payload).encode()
    return b"" if answer.payload is None else json.dumps(answer.payload, separators=(",", ":")).encode()


def _content_length(request: h11.Request) -> int:
    """As announced (h11 has checked that it is one number of at most 20 digits), 0 if it is not announced."""
    return max((int(value) for name, value in request.headers if name == b"content-length"), default=0)
