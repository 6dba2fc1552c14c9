"""A forward proxy on loopback, as dfdaemon is one: it asks the origin itself and counts what it passes on.

`routes` are origins by the `host:port` of the URL that is asked for, so that it alone can reach them. CONNECT opens a
tunnel to the origin. What `instead` gives is answered in place of the origin's answer.
"""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import urlsplit

from tests.support.faulty_server import Reply


class ForwardProxy:
    """The running proxy. `passed` counts the bytes of bodies (of tunnels: of everything) that came from the origin."""

    def __init__(self, routes: Mapping[str, str]) -> None:
        self.routes = dict(routes)
        self.instead: Callable[[str], Reply | None] = lambda path: None
        self.passed = 0
        self.tunnels = 0
        self.asked: list[dict[str, str]] = []
        self.lock = Lock()
        self._server = _Server(self)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"http://{self.host}"
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The proxy dies, its connections with it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self, owner: ForwardProxy) -> None:
        self.owner = owner
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Connection)

    def get_request(self) -> tuple[socket.socket, object]:
        sock, address = self.socket.accept()
        self.open.add(sock)
        return sock, address

    def server_close(self) -> None:
        for sock in list(self.open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def shutdown_request(self, request: object) -> None:
        assert isinstance(request, socket.socket)
        self.open.discard(request)
        request.close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections end in the middle when the proxy dies."""


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        owner = self.server.owner
        with owner.lock:
            owner.asked.append({name.lower(): value for name, value in self.headers.items()})
        parts = urlsplit(self.path)
        reply = owner.instead(parts.path)
        if reply is not None:
            self._send(reply.status, list(reply.headers.items()), reply.body)
            return
        target = owner.routes.get(parts.netloc)
        if target is None:
            self._send(502, [], b"")
            return
        connection = http.client.HTTPConnection(target, timeout=10)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "proxy-authorization"}
            connection.request(self.command, parts.path, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        with owner.lock:
            owner.passed += len(body)
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in ("content-length", "date")]
        self._send(answer.status, kept, body)

    do_HEAD = do_GET

    def do_CONNECT(self) -> None:
        owner = self.server.owner
        target = owner.routes.get(self.path)
        self.close_connection = True
        if target is None:
            self._send(502, [], b"")
            return
        owner.tunnels += 1
        host, _, port = target.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as origin:
            self.send_response(200)
            self.end_headers()
            while True:
                ready, _, _ = select.select([origin, self.connection], [], [], 10)
                for source in ready:
                    data = source.recv(65536)
                    if not data:
                        return
                    if source is origin:
                        owner.passed += len(data)
                        self.connection.sendall(data)
                    else:
                        origin.sendall(data)
                if not ready:
                    return

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests look at what was passed."""


@contextlib.contextmanager
def forward_proxy(routes: Mapping[str, str]) -> Iterator[ForwardProxy]:
    """A proxy for a `with` block; it may be closed before its end."""
    proxy = ForwardProxy(routes)
    try:
        yield proxy
    finally:
        proxy.close()
