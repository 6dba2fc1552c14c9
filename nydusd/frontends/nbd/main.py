"""`python -m nydusd.frontends.nbd --spec-fd N`: export an image as a block device, from the supervisor's spec, on its socket.

The socket is the supervisor's, so that a client that connects while we are replaced waits. After SIGKILL clients are
disconnected, and a successor serves them when they come again.

The spec: `index`, `identity`, `listen_fd`, `lifeline_fd`, `front` (the supervisor's endpoint), `read_deadline` (seconds),
`image` (as in `Image.spec`), `log`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import select
import signal
import socket
from collections.abc import Callable

from nydusd import logs
from nydusd.formats import open_bootstrap
from nydusd.frontends.blobfs.device import RangeDevice
from nydusd.frontends.fuse.main import map_bootstrap
from nydusd.frontends.fuse.parking import Client
from nydusd.ipc.messages import Json
from nydusd.ipc.spec import read_spec
from nydusd.proctitle import set_title

from .connection import Connection
from .layout import Layout
from .protocol import Export, ProtocolError
from .reads import Reads

log = logging.getLogger(__name__)

CONNECTIONS_MOST = 64


class Server:
    """Serves those who connect to `listener`, until the lifeline pipe closes."""

    def __init__(self, listener: socket.socket, lifeline: int, export: Export, reads: Reads) -> None:
        self._listener = listener
        self._lifeline = lifeline
        self._export = export
        self._reads = reads
        self._connections: dict[int, Connection] = {}

    def run(self) -> None:
        """Raises OSError when the listener fails."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._lifeline, select.POLLIN)
        client = None
        while True:
            timeout = self._reads.service()
            if self._reads.client is not None and client is None:
                client = self._reads.client.fileno()
                poll.register(client, select.POLLIN)
                continue  # what came before it was polled
            for number, connection in list(self._connections.items()):
                self._guarded(connection, connection.proceed)
                if connection.closed:
                    with contextlib.suppress(KeyError):
                        poll.unregister(number)
                    continue
                wanted = select.POLLIN * connection.wants_input | select.POLLOUT * connection.wants_output
                poll.register(number, wanted)
            for ready, events in poll.poll(None if timeout is None else math.ceil(timeout * 1000)):
                if ready == self._lifeline:
                    return
                if ready == self._listener.fileno():
                    self._accept()
                elif ready in self._connections:
                    self._serve(self._connections[ready], events)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EMFILE):
                raise
            return
        sock.setblocking(False)
        if len(self._connections) >= CONNECTIONS_MOST:
            # Who has said nothing useful yet makes room: a client that is stuck in the negotiation keeps nobody out.
            idle = next((old for old in self._connections.values() if not old.serving), None)
            if idle is None:
                log.warning("a client was refused: %d are connected", len(self._connections))
                sock.close()
                return
            self._end(idle)
        self._connections[sock.fileno()] = Connection(sock, self._export, self._reads.begin)

    def _serve(self, connection: Connection, events: int) -> None:
        if events & (select.POLLHUP | select.POLLERR) and not events & select.POLLIN:
            self._end(connection)
            return
        if events & select.POLLIN:
            self._guarded(connection, connection.receive)
        if not connection.closed and connection.wants_output:
            self._guarded(connection, connection.send)

    def _guarded(self, connection: Connection, step: Callable[[], None]) -> None:
        """Do something for a client; whatever it does wrong ends its connection, no more."""
        try:
            step()
        except BlockingIOError:
            pass
        except ProtocolError as e:
            log.warning("a client is disconnected: %s", e)
            self._end(connection)
        except OSError:
            self._end(connection)

    def _end(self, connection: Connection) -> None:
        self._connections.pop(connection.sock.fileno(), None)
        connection.close()


def main(argv: list[str]) -> int:
    """Serve until the supervisor is gone. Raises NydusError when the spec cannot be used."""
    spec = read_spec(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_title("nbd 0")
    logs.setup_child(spec["log"], "nbd 0")
    listener = socket.socket(fileno=int(spec["listen_fd"]))
    listener.setblocking(False)
    layout, reads = _image(spec)
    Server(listener, int(spec["lifeline_fd"]), Export(layout.size, layout.block), reads).run()
    return 0


def _image(spec: Json) -> tuple[Layout, Reads]:
    image = spec["image"]
    path = str(image["bootstrap"])
    view = map_bootstrap(path, image["bootstrap_size"])
    blobs = open_bootstrap(view, path, image["path_id"], extracted=bool(image["extracted"])).blobs
    layout = Layout(view, [blob.uncompressed_size for blob in blobs], path)
    device = RangeDevice.from_spec(image["blobs"], int(spec["index"]))
    assert isinstance(device, RangeDevice)
    front, identity = str(spec["front"]), str(spec.get("identity") or "nbd").encode()

    def connect() -> Client:
        from nydusd.ipc.client import ChunkClient

        return ChunkClient(front, identity)

    return layout, Reads(layout, device, connect, float(spec["read_deadline"]))
