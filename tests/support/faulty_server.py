"""An HTTP server that does what a test tells it to: one fault after the other, each request on record.

It runs in a thread of the test process. A handler is a function from a request to a reply; `Faulty.program` gives the
replies of a path one by one and repeats the last. What cannot be said in headers and bytes (cut off, stall, trickle) is
said by the fields of `Reply`.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.discipline import wait_until


@dataclass(frozen=True)
class Request:
    """One request as it came; `headers` has names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def range(self) -> tuple[int, int] | None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return (int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class Reply:
    """What to answer. `length` is the Content-Length to claim (None: the true one, -1: none at all).

    `cut` ends the connection after so many bytes of the body, by RST if `reset`. `stall` sends nothing more after so
    many bytes, until the server ends. `pieces` sends the body in pieces of so many bytes, `pace` seconds apart.
    `silent` answers nothing at all (and cuts the connection if `reset`). `delay` is seconds before the first byte.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    length: int | None = None
    cut: int | None = None
    reset: bool = False
    stall: int | None = None
    pieces: int = 0
    pace: float = 0.0
    silent: bool = False
    delay: float = 0.0
    close: bool = False


Handler = Callable[[Request], Reply]


def part_of(blob: bytes, request: Request, **extra: object) -> Reply:
    """The right answer to a request for a part of a blob."""
    asked = request.range
    if asked is None:
        return Reply(200, {"Content-Type": "application/octet-stream"}, blob, **extra)  # type: ignore[arg-type]
    first, last = asked
    if first >= len(blob):
        return Reply(416, {"Content-Range": f"bytes */{len(blob)}"})
    last = min(last, len(blob) - 1)
    headers = {"Content-Range": f"bytes {first}-{last}/{len(blob)}", "Content-Type": "application/octet-stream"}
    return Reply(206, headers, blob[first : last + 1], **extra)  # type: ignore[arg-type]


class Faulty:
    """The server. `handlers` are by path without query, `default` answers the rest."""

    def __init__(self, context: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.handlers: dict[str, Handler] = {}
        self.default: Handler = lambda request: Reply(404)
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self._server = _Server(self, context, port)
        self.port: int = self._server.server_address[1]
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"{'https' if context else 'http'}://{self.host}"
        self._serve()

    def _serve(self) -> None:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def program(self, path: str, *steps: Reply | Handler) -> None:
        """Answer the requests for a path one after the other by these, and all later ones by the last."""
        left = list(steps)

        def handler(request: Request) -> Reply:
            with self.lock:
                step = left.pop(0) if len(left) > 1 else left[0]
            return step if isinstance(step, Reply) else step(request)

        self.handlers[path] = handler

    def count(self, path: str = "", method: str = "") -> int:
        """How many requests there were whose path begins so."""
        return sum(one.path.startswith(path) and method in ("", one.method) for one in self.requests)

    def cut(self) -> None:
        """End all connections, as at the end of a test that others follow with the same server."""
        waiting, self.ended = self.ended, threading.Event()
        waiting.set()
        self._server.cut_all()
        wait_until(lambda: not self._server.open, "the end of all connections")

    @classmethod
    def that_may_refuse(cls) -> Faulty:
        """A server that can `refuse`. Its port is one that nobody gets who does not name it."""
        for port in random.sample(range(20000, 30000), 100):
            with contextlib.suppress(OSError):
                return cls(port=port)
        raise AssertionError("no port is free")

    def refuse(self) -> None:
        """Refuse connections from now on, until `accept`, and end those there are. The socket keeps a port that was named."""
        self._server.shutdown()
        self._thread.join()
        self._server.socket.shutdown(socket.SHUT_RDWR)
        self.cut()

    def accept(self) -> None:
        """Serve again."""
        self._server.socket.listen(self._server.request_queue_size)
        self._serve()

    def close(self) -> None:
        """End the server and all its connections."""
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.cut_all()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, owner: Faulty, context: ssl.SSLContext | None, port: int) -> None:
        self.owner = owner
        self.context = context
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Connection)

    def get_request(self) -> tuple[socket.socket, object]:
        sock, address = self.socket.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.owner.connections += 1
        self.open.add(sock)
        return sock, address

    def cut_all(self) -> None:
        for sock in list(self.open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def server_close(self) -> None:
        self.cut_all()
        super().server_close()

    def shutdown_request(self, request: object) -> None:
        assert isinstance(request, socket.socket)
        self.open.discard(request)
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)
        request.close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that break are what this server is for."""


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        if self.server.context is not None:
            wrapped = self.server.context.wrap_socket(self.request, server_side=True)
            self.server.open.discard(self.request)
            self.server.open.add(wrapped)
            self.request = wrapped
        super().setup()

    def finish(self) -> None:
        super().finish()
        if self.server.context is not None:
            self.server.shutdown_request(self.request)

    def handle_expect_100(self) -> bool:
        return True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests look at `requests`."""

    def _answer(self) -> None:
        owner = self.server.owner
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        with owner.lock:
            owner.requests.append(request)
        path = self.path.partition("?")[0]
        reply = owner.handlers.get(path, owner.default)(request)
        if reply.delay:
            owner.ended.wait(reply.delay)
        if reply.silent:
            if not reply.reset:
                owner.ended.wait(30)
            self._cut(reply.reset)
            return
        self.send_response_only(reply.status)
        for name, value in ({"Date": self.date_time_string()} | dict(reply.headers)).items():
            self.send_header(name, value)
        if reply.length != -1:
            self.send_header("Content-Length", str(len(reply.body) if reply.length is None else reply.length))
        if reply.close or reply.length == -1:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(reply)

    def _send_body(self, reply: Reply) -> None:
        if reply.stall is not None:
            self._write(reply.body[: reply.stall])
            self.server.owner.ended.wait(30)
            self._cut(False)
        elif reply.cut is not None:
            self._write(reply.body[: reply.cut])
            self._cut(reply.reset)
        elif reply.pieces:
            for start in range(0, len(reply.body), reply.pieces):
                self._write(reply.body[start : start + reply.pieces])
                if self.server.owner.ended.wait(reply.pace):
                    return
        else:
            self._write(reply.body)

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def _cut(self, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.wfile.close()
            self.connection.close()
        self.close_connection = True

    do_GET = do_HEAD = do_POST = do_CONNECT = _answer


@contextlib.contextmanager
def faulty(context: ssl.SSLContext | None = None, port: int = 0) -> Iterator[Faulty]:
    """A server for a `with` block."""
    server = Faulty(context, port)
    try:
        yield server
    finally:
        server.close()
