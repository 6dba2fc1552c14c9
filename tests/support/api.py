"""The API process of a daemon without the rest of it: a real `nydusd.control`, and a supervisor that a test plays."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import zmq

from nydusd.ipc.spec import write_spec

Json = dict[str, object]
Handler = Callable[[Json], Json | None]
SECONDS = 30.0


class Supervisor:
    """Answers control requests with what `handler` returns, in a thread of the test; None leaves them unanswered."""

    def __init__(self, folder: Path, handler: Handler) -> None:
        self.handler = handler
        self.endpoint = f"ipc://{folder}/front"
        self.asked: list[Json] = []
        self.patience: list[float] = []
        """Seconds that the supervisor has for each."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(self.endpoint)
        self._stop_out, self._stop_in = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop_out, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._stop_out in ready:
                return
            identity, kind, number, body = self._socket.recv_multipart()
            assert (kind, len(number)) == (b"C", 8)
            request: Json = json.loads(body)
            self.patience.append(float(str(request.pop("until"))) - time.monotonic())
            self.asked.append(request)
            reply = self.handler(request)
            if reply is not None:
                self._socket.send_multipart([identity, b"C", number, json.dumps(reply).encode()])

    def close(self) -> None:
        os.close(self._stop_in)
        self._thread.join(SECONDS)
        os.close(self._stop_out)
        self._socket.close()
        self._context.term()


class ApiProcess:
    """`with ApiProcess(folder, handler) as api:` serves at `api.path` until the block ends, then demands exit status 0."""

    def __init__(self, folder: Path, handler: Handler, level: str = "debug", metrics: bool = False) -> None:
        self.path = str(folder / "api.sock")
        self.log = folder / "api.log"
        self.supervisor = Supervisor(folder, handler)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(512)
        self._metrics = socket.create_server(("127.0.0.1", 0)) if metrics else None
        lifeline_out, self._lifeline = os.pipe()
        spec = {
            "listen_fd": self._listener.fileno(),
            "front": self.supervisor.endpoint,
            "log": {"level": level, "file": str(self.log)},
            "lifeline_fd": lifeline_out,
        }
        more = []
        if self._metrics is not None:
            more.append(self._metrics.fileno())
            spec["metrics_fd"] = more[0]
        fd = write_spec(spec)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nydusd.control", "--spec-fd", str(fd)],
            pass_fds=[fd, self._listener.fileno(), lifeline_out, *more],
        )
        os.close(fd)
        os.close(lifeline_out)

    def cut_lifeline(self) -> None:
        """What the process sees when the supervisor is gone."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut_lifeline()
        try:
            assert self.process.wait(SECONDS) == 0
        finally:
            self.process.kill()
            self.process.wait()
            self.supervisor.close()
            self._listener.close()
            if self._metrics is not None:
                self._metrics.close()

    def connect_metrics(self) -> Wire:
        """A connection to the TCP port."""
        assert self._metrics is not None
        return Wire(self._metrics.getsockname())

    def connect(self) -> Wire:
        return Wire(self.path)


class Wire:
    """A raw connection, so that a test can send what no HTTP library would."""

    def __init__(self, address: str | tuple[str, int]) -> None:
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.sock.connect(address)  # waits, as it would not with a time-out, while many others connect
        self.sock.settimeout(SECONDS)
        self._got = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, text: str | bytes) -> None:
        self.sock.sendall(text if isinstance(text, bytes) else text.encode())

    def ask(self, method: str, target: str, body: str = "") -> Response:
        length = f"Content-Length: {len(body)}\r\n" if method != "GET" or body else ""
        self.send(f"{method} {target} HTTP/1.1\r\nHost: unix\r\n{length}\r\n{body}")
        return self.response()

    def response(self) -> Response:
        """The next response. AssertionError if the connection ends before it is complete."""
        while b"\r\n\r\n" not in self._got:
            self._more()
        head, _, rest = self._got.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers.get("content-length", "0"))
        self._got = rest
        while len(self._got) < length:
            self._more()
        body, self._got = self._got[:length], self._got[length:]
        return Response(status, headers, body)

    def _more(self) -> None:
        data = self.sock.recv(65536)
        assert data, f"the connection ended after {self._got!r}"
        self._got += data

    def at_end(self) -> bool:
        """Whether the server closes the connection, with nothing more to read."""
        return not self._got and self.sock.recv(65536) == b""

    def is_open(self) -> bool:
        """Whether nothing has arrived, an end included."""
        return not self._got and not select.select([self.sock], [], [], 0)[0]


class Response:
    """A parsed response."""

    def __init__(self, status: str, headers: dict[str, str], body: bytes) -> None:
        self.status_line = status
        self.status = int(status.split(" ")[1])
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Json:
        data = json.loads(self.body)
        assert isinstance(data, dict)
        return data

    @property
    def message(self) -> str:
        assert self.json["code"] == "UNDEFINED"
        assert set(self.json) == {"code", "message"}
        return str(self.json["message"])
