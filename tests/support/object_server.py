"""A small HTTP server that gives objects by path, over TCP or a unix socket, with a guard that may refuse requests.

It honours Range, and remembers what it was asked. Guards are where servers differ: see `oss_server` and the tests of S3.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote


@dataclass(frozen=True)
class Asked:
    """A request as it came; `path` is what stood in the request line, header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    status: int = 0


@dataclass(frozen=True)
class Reply:
    """What a guard says instead of the object. HEAD is answered without the body."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


Guard = Callable[[Asked], Reply | None]


@dataclass
class ObjectServer:
    """`objects` are found by host and path: the keys are `/path`, or `//host/path` where one host is meant."""

    objects: dict[str, bytes]
    guard: Guard
    clock_offset: float = 0.0
    """Seconds by which the server's time is ahead of ours."""
    address: str = ""
    """host:port, or the path of the socket."""
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    """How many connections were accepted so far."""

    def now(self) -> float:
        return time.time() + self.clock_offset

    @property
    def statuses(self) -> list[int]:
        """The statuses of all answers so far."""
        return [asked.status for asked in self.asked]

    def find(self, asked: Asked) -> bytes | None:
        path = unquote(asked.path)
        host = asked.headers.get("host", "").rpartition(":")[0]
        return self.objects.get(f"//{host}{path}", self.objects.get(path))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    disable_nagle_algorithm = False  # it fails on unix sockets
    owner: ObjectServer

    def setup(self) -> None:
        super().setup()
        self.owner.connections += 1

    def do_GET(self) -> None:
        asked = Asked(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        reply = self.owner.guard(asked) or self._object(asked)
        self.owner.asked.append(Asked(asked.method, asked.path, asked.headers, reply.status))
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_HEAD = do_GET

    def _object(self, asked: Asked) -> Reply:
        data = self.owner.find(asked)
        if data is None:
            return Reply(404, body=b"no such object")
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.headers.get("range", ""))
        if not match:
            return Reply(200, body=data)
        first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        if first > last:
            return Reply(416, {"Content-Range": f"bytes */{len(data)}"})
        return Reply(206, {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1])

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(self.owner.now(), usegmt=True)

    def address_string(self) -> str:
        return "client"

    def log_message(self, format: str, *args: object) -> None:
        return


class _Tcp(socketserver.ThreadingTCPServer):
    daemon_threads = True


class _Unix(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


@contextlib.contextmanager
def object_server(
    objects: Mapping[str, bytes], guard: Guard = lambda asked: None, socket_path: Path | None = None
) -> Iterator[ObjectServer]:
    """Serve `objects` on a free port of 127.0.0.1, or on a unix socket. Connections end with the server."""
    owner = ObjectServer(dict(objects), guard)
    handler = type("Handler", (_Handler,), {"owner": owner})
    server: socketserver.BaseServer
    if socket_path is None:
        server = tcp = _Tcp(("127.0.0.1", 0), handler)
        owner.address = f"127.0.0.1:{tcp.server_address[1]}"
    else:
        server = _Unix(os.fspath(socket_path), handler)
        owner.address = str(socket_path)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield owner
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def names_are_local(*suffixes: str) -> Iterator[None]:
    """Host names that end so are this machine, for this process."""
    real = socket.getaddrinfo

    def look_up(host: str, *args: object, **named: object) -> object:
        return real("127.0.0.1" if host.endswith(suffixes) else host, *args, **named)  # type: ignore[arg-type]

    socket.getaddrinfo = look_up  # type: ignore[assignment]
    try:
        yield
    finally:
        socket.getaddrinfo = real
