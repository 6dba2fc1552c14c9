"""The loop of the API process: many clients, one question channel to the supervisor, no threads.

Nothing here blocks, so a slow client delays nobody and a probe is answered while the supervisor mounts. Clients keep
a connection open for the whole life of a daemon and take its loss for the daemon's death: only a request that was begun
and not finished has a time-out. Who comes to the TCP port for metrics has one in any case, and a small number of places
apart from the others': it may be anybody, and must keep nobody from the API. The process keeps no state: after SIGKILL
the supervisor starts another on the same listening socket, with the clients who had not said anything yet (`ipc/silent.py`);
the others are disconnected, and connect again.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import time
from itertools import islice
from typing import Final, NamedTuple

import zmq

from nydusd import logs
from nydusd.control.client import Client, Request
from nydusd.control.routes import METRICS_PATHS, Answer, Call, Refused, answer, error_answer, resolve
from nydusd.errors import InternalError
from nydusd.ipc.messages import CONTROL, NUMBER, decode, encode
from nydusd.ipc.silent import SilentLine

log = logging.getLogger(__name__)

SUPERVISOR_PATIENCE: Final = 5.0
"""Seconds until a question to the supervisor counts as not answered (503), unless its route says more."""
REQUEST_PATIENCE: Final = 30.0
"""Seconds from the first byte of a request to its last."""
_LAST_WORDS: Final = 1.0
"""Seconds in which the answer to `exit` must have come when the supervisor ends."""
_LAST_OTHERS: Final = 0.1
"""The same for all else, and for clients to take what they are told: readers may wait for who comes next."""
METRICS_PATIENCE: Final = 120.0
"""Seconds that who comes for metrics may do nothing, between two requests as well: scrapers ask more often."""
_MAX_CLIENTS: Final = 4096
_MAX_METRICS_CLIENTS: Final = 64
_TURN: Final = 16
"""Requests of one client in a row; a client that pipelines more waits until the others had their turn."""
_NO_FILES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_ACCEPT_PAUSE: Final = 1.0
_SILENT_PAUSE: Final = 0.05
"""Seconds until the supervisor, which had no room for a message, is told again."""


class _Question(NamedTuple):
    client: Client
    call: Call
    deadline: float


class _Door:
    """A listening socket, and who came in by it: at most `most` at a time, for one of `paths` only if there are any."""

    def __init__(self, listener: socket.socket, most: int, patience: float, paths: tuple[str, ...] = ()) -> None:
        listener.setblocking(False)
        self.listener = listener
        self.most = most
        self.patience = patience
        self.paths = paths
        self.clients: set[Client] = set()
        self.late: dict[Client, float] = {}
        """Clients who owe us something and their deadlines, first to expire first."""
        self.is_open = False
        self.open_again = 0.0

    def waits_for(self, client: Client) -> bool:
        """Whether it is this client's turn, and it has not all the time there is."""
        return not client.waiting if self.paths else client.half_sent


class ApiServer:
    """Serves until the lifeline closes. The caller owns the handles; who comes to `metrics` is served metrics only."""

    def __init__(
        self,
        listener: socket.socket | None,
        supervisor: zmq.Socket[bytes],
        lifeline_fd: int,
        silent: SilentLine,
        metrics: socket.socket | None = None,
    ) -> None:
        self._doors: list[_Door] = []
        if listener is not None:
            self._doors.append(_Door(listener, _MAX_CLIENTS, REQUEST_PATIENCE))
        if metrics is not None:
            self._doors.append(_Door(metrics, _MAX_METRICS_CLIENTS, METRICS_PATIENCE, METRICS_PATHS))
        self._supervisor = supervisor
        self._silent = silent
        self._lifeline_fd = lifeline_fd
        self._selector = selectors.DefaultSelector()
        self._questions: dict[int, _Question] = {}
        """By number."""
        self._ready: dict[Client, None] = {}
        """Clients with more complete requests than one turn."""
        self._unread: dict[Client, None] = {}
        """Clients who have spoken, and the supervisor does not know yet that it must let go of them."""
        self._number = 0
        self._end: float | None = None

    def run(self) -> None:
        """Serve until the supervisor is gone."""
        self._selector.register(self._lifeline_fd, selectors.EVENT_READ, None)
        self._selector.register(self._supervisor.fileno(), selectors.EVENT_READ, None)
        for door in self._doors:
            self._listen(door, True)
        for number, sock in self._silent.inherit().items():
            self._let_in(self._doors[0], sock, number)
        try:
            while not self._finished():
                self._step()
        finally:
            for client in self._clients():
                client.close()
            self._selector.close()

    def _step(self) -> None:
        for key, mask in self._selector.select(self._timeout()):
            if isinstance(key.data, Client):
                self._serve(key.data, mask)
            elif isinstance(key.data, _Door):
                self._accept(key.data)
            elif key.fd == self._lifeline_fd and not os.read(self._lifeline_fd, 4096):
                self._begin_end()
        for client in list(self._ready):
            del self._ready[client]
            self._advance(client)
        for client in list(self._unread):
            self._serve(client, selectors.EVENT_READ)
        self._take_replies()  # before who waits for one is told that there is none
        self._expire(time.monotonic())
        # Always, whatever woke us, and last of all: ZeroMQ's fd signals only a change, and sending may swallow one.
        self._take_replies()

    def _timeout(self) -> float | None:
        if self._ready:
            return 0.0
        times = [question.deadline for question in self._questions.values()]
        for door in self._doors:
            times += islice(door.late.values(), 1)
            if not door.is_open and self._end is None:
                times.append(door.open_again)
        if self._end is not None:
            times.append(self._end + (_LAST_WORDS if time.monotonic() >= self._end + _LAST_OTHERS else _LAST_OTHERS))
        if self._unread:
            times.append(time.monotonic() + _SILENT_PAUSE)
        return max(0.0, min(times) - time.monotonic()) if times else None

    # Clients

    def _clients(self) -> list[Client]:
        return [client for door in self._doors for client in door.clients]

    def _listen(self, door: _Door, on: bool) -> None:
        if on and not door.is_open:
            self._selector.register(door.listener, selectors.EVENT_READ, door)
        elif not on and door.is_open:
            self._selector.unregister(door.listener)
            door.open_again = time.monotonic() + _ACCEPT_PAUSE
        door.is_open = on

    def _accept(self, door: _Door) -> None:
        try:
            sock, _ = door.listener.accept()
        except OSError as error:
            if error.errno in _NO_FILES:
                log.warning("cannot accept a client: %s", error.strerror)
                self._listen(door, False)
            return
        self._let_in(door, sock, None if door.paths else self._silent.hold(sock))

    def _let_in(self, door: _Door, sock: socket.socket, number: int | None) -> None:
        sock.setblocking(False)
        client = Client(sock, door.paths, number)
        door.clients.add(client)
        self._watch(client)
        if len(door.clients) >= door.most:
            log.warning("%d clients are connected, no more are accepted until one leaves", len(door.clients))
            self._listen(door, False)

    def _serve(self, client: Client, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            client.write()
        if mask & selectors.EVENT_READ and not client.closed and self._may_read(client):
            client.read()
        self._advance(client)

    def _may_read(self, client: Client) -> bool:
        """Once something was read, the next API process could not go on with this client: so nobody is to hold it for that."""
        if client.number is None or self._silent.let_go(client.number):
            client.number = None
            self._unread.pop(client, None)
        else:
            self._unread[client] = None
        client.unread = client in self._unread
        return not client.unread

    def _advance(self, client: Client) -> None:
        """Handle what the client has sent in full, then wait for what it needs next."""
        for _ in range(_TURN):
            request = client.next_request()
            if request is None:
                break
            self._handle(client, request)
        else:
            self._ready[client] = None
        self._watch(client)

    def _watch(self, client: Client) -> None:
        door = next(door for door in self._doors if door.paths == client.paths)
        if door.waits_for(client) and not client.closed:
            door.late.setdefault(client, time.monotonic() + door.patience)
        else:
            door.late.pop(client, None)
        client.watch(self._selector)
        if client.closed:
            door.clients.discard(client)
            self._ready.pop(client, None)

    def _handle(self, client: Client, request: Request) -> None:
        try:
            call = resolve(request.method, request.target, request.body, client.paths)
            until = time.monotonic() + (call.route.patience or SUPERVISOR_PATIENCE)
            message = encode(call.message | {"until": until})
        except Refused as refused:
            client.answer(refused.answer)
        except RecursionError:  # its body is read, but too deep to be passed on
            client.answer(error_answer(400, "BadRequest"))
        except Exception:  # one request must not end the process: it has clients who take that for the daemon's end
            log.exception("%s %s failed by a bug of ours", request.method, request.target)
            client.answer(error_answer(500, "InternalServerError"))
        else:
            self._ask(client, call, message, until)

    # The supervisor

    def _ask(self, client: Client, call: Call, message: bytes, until: float) -> None:
        """`until`: the supervisor does not begin it later, when the client has been told that it is not done."""
        if self._end is not None:
            client.answer(_not_ready(call))
            return
        self._number += 1
        frames = [CONTROL, NUMBER.pack(self._number), message]
        try:
            self._supervisor.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            client.answer(_not_ready(call))
            return
        client.waiting = True
        self._questions[self._number] = _Question(client, call, until)

    def _take_replies(self) -> None:
        """Until there is none: what is asked while they are taken may hide that another has come."""
        while True:
            try:
                frames = self._supervisor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 3 or frames[0] != CONTROL or len(frames[1]) != NUMBER.size:
                log.error("unknown message from the supervisor: %r", frames[:2])
                continue
            question = self._questions.pop(NUMBER.unpack(frames[1])[0], None)
            if question is not None:  # else its time was over
                self._reply(question, frames[2])

    def _reply(self, question: _Question, frame: bytes) -> None:
        route = question.call.route
        try:
            reply = decode(frame)
        except InternalError as error:
            log.error("%s", error)
            reply = {}
        if route.op == "set_log_level" and "ok" in reply:
            logs.set_level(str(question.call.message["log_level"]))
        try:
            found = answer(route, reply)
        except Exception:  # as in `_handle`
            log.exception("the answer to %r failed by a bug of ours", route.op)
            found = answer(route, {"error": {"status": 500, "message": "the daemon's log says why"}})
        question.client.answer(found)
        self._advance(question.client)

    # Time and the end

    def _expire(self, now: float) -> None:
        for number, question in list(self._questions.items()):
            if question.deadline > now:
                continue
            del self._questions[number]
            log.warning("the supervisor did not answer %r in time", question.call.route.op)
            question.client.answer(_not_ready(question.call))
            self._advance(question.client)
        for door in self._doors:
            for client, deadline in list(door.late.items()):
                if deadline > now:
                    break
                client.timed_out()
                self._watch(client)
            if not door.is_open and self._end is None and door.open_again <= now:
                door.open_again = now + _ACCEPT_PAUSE
                self._listen(door, len(door.clients) < door.most)

    def _begin_end(self) -> None:
        self._selector.unregister(self._lifeline_fd)
        for door in self._doors:
            self._listen(door, False)
        self._end = time.monotonic()

    def _finished(self) -> bool:
        if self._end is None:
            return False
        since = time.monotonic() - self._end
        if since < _LAST_OTHERS:
            return not self._questions and not any(client.has_output for client in self._clients())
        # What else was asked is done, or not: who asked it is disconnected, as by any end of a supervisor.
        exits = any(question.call.route.op == "exit" for question in self._questions.values())
        return not exits or since >= _LAST_WORDS


def _not_ready(call: Call) -> Answer:
    return error_answer(503, f"{call.route.outer}(DaemonAbnormal(NotReady))")
