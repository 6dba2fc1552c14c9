"""`python -m nydusd.frontends.nbd --spec-fd N`: export an image as a block device, from the supervisor's spec, to its clients.

Sockets, pipes and what is known of each client are the supervisor's (`supervisor/nbd_clients.py`). After SIGKILL a successor
goes on with each of them where we were: to the clients nothing has happened. If the supervisor is killed we serve on what is
cached; the next supervisor takes copies of all that is open here, ends us, and starts a successor (`supervisor/nbd_left.py`).
Without a supervisor we end with the last client.

The spec: `index`, `identity`, `lifeline_fd`, `front` (the supervisor's endpoint), `read_deadline` (seconds), `image` (as in
`Image.spec`), `inflight` (the board of reads that wait), `log`, `line` (fd: clients come there, by number and with three fds,
and numbers of those that have gone are sent), `known` (memfd, see `kept.py`), `clients` (number, then the fds, of those who
are there). The listening socket is open, too, for the next supervisor: whoever connects meanwhile waits there.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import select
import signal
import socket
from collections.abc import Callable, Sequence

from nydusd import logs, points
from nydusd.formats import open_bootstrap
from nydusd.frontends.blobfs.device import RangeDevice
from nydusd.frontends.fuse.main import map_bootstrap
from nydusd.frontends.fuse.parking import Client
from nydusd.ipc import passed
from nydusd.ipc.inflight import open_row
from nydusd.ipc.line import open_line
from nydusd.ipc.messages import Json
from nydusd.ipc.spec import read_spec
from nydusd.proctitle import set_title

from .connection import Connection
from .kept import NUMBER, SIZE, Kept
from .layout import Layout
from .protocol import Export, ProtocolError
from .reads import Reads
from .room import Room

log = logging.getLogger(__name__)

_PARTIAL = 0.05
"""Seconds between looks at a client that has sent a part of a message."""
_FDS = 3
"""Of a client: its socket, and both ends of its pipe."""


class Server:
    """Serves the clients that the supervisor has sent on `line`; once the lifeline pipe is closed, until the last has gone.
    `known`: what is kept of them.
    """

    def __init__(self, line: socket.socket, lifeline: int, known: memoryview, export: Export, reads: Reads) -> None:
        self._line = line
        self._poll = select.poll()
        self._poll.register(line, select.POLLIN)
        self._poll.register(lifeline, select.POLLIN)
        self._lifeline = lifeline
        self._orphaned = self._line_is_over = False
        self._known = known
        self._export = export
        self._reads = reads
        self._room = Room()
        self._connections: dict[int, Connection] = {}

    def add(self, number: int, fds: Sequence[int]) -> None:
        """Serve a client: its socket, and both ends of its pipe."""
        sock = socket.socket(fileno=fds[0])
        known = Kept(self._known[number * SIZE : (number + 1) * SIZE])
        connection = Connection(number, sock, (fds[1], fds[2]), known, self._export, self._reads.begin, self._room)
        self._connections[sock.fileno()] = connection
        self._guarded(connection, connection.resume)

    def run(self) -> None:
        """Serve until the supervisor is gone and all clients are."""
        poll = self._poll
        client = None
        registered: set[int] = set()
        while not self._orphaned or self._connections:
            timeout = self._reads.service()
            if self._begin_put_off():
                continue  # what came meanwhile, and what they wait for
            if self._reads.client is not None and client is None:
                client = self._reads.client.fileno()
                poll.register(client, select.POLLIN)
                continue  # what came before it was polled
            for number in registered - self._connections.keys():
                poll.unregister(number)
            registered = set(self._connections)
            for number, connection in self._connections.items():
                wanted = select.POLLIN * connection.wants_input | select.POLLOUT * connection.wants_output
                poll.register(number, wanted)
                if connection.partial:
                    timeout = _PARTIAL if timeout is None else min(timeout, _PARTIAL)
            for ready, events in poll.poll(None if timeout is None else math.ceil(timeout * 1000)):
                if ready == self._lifeline:
                    self._orphaned = True
                    poll.unregister(ready)
                    self._take_clients()  # the last that it let in
                elif ready == self._line.fileno():
                    self._take_clients()
                elif ready in self._connections:
                    self._serve(self._connections[ready], events)
            for connection in [each for each in self._connections.values() if each.partial]:
                self._guarded(connection, connection.receive)

    def _begin_put_off(self) -> bool:
        """Begin a read that was put off, of who holds least first; whether there was room for one."""
        waiting = sorted((each for each in self._connections.values() if each.is_put_off), key=lambda each: each.held)
        return any(each.go_on() for each in waiting)

    def _take_clients(self) -> None:
        """Those whom the supervisor has let in."""
        while True:
            try:
                packet, fds = passed.receive(self._line, NUMBER.size, _FDS)
            except ConnectionResetError:
                continue  # the kernel says so once, and then gives what was sent before
            except BlockingIOError:
                return
            if len(packet) < NUMBER.size:  # nobody is at the other end: nothing will ever come
                if not self._line_is_over:
                    self._line_is_over = True
                    self._poll.unregister(self._line)
                return
            (number,) = NUMBER.unpack(packet)
            if len(fds) == _FDS:
                self.add(number, fds)
            else:
                self._refuse(number, fds)

    def _refuse(self, number: int, fds: Sequence[int]) -> None:
        """Of a client's fds the kernel has given us these only: we can have no more open. Whoever is served does not notice."""
        log.warning("a client is disconnected: the front end can open no more files")
        for fd in fds:
            os.close(fd)
        Kept(self._known[number * SIZE : (number + 1) * SIZE]).inodes = 0, 0
        self._tell_ended(number)

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
        points.reach("nbd: client ended")
        self._tell_ended(connection.number)

    def _tell_ended(self, number: int) -> None:
        # If the supervisor has been told so much that it takes no more, it looks for itself who is gone.
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            self._line.send(NUMBER.pack(number))


def main(argv: list[str]) -> int:
    """Serve until nobody is left to serve. Raises NydusError when the spec cannot be used."""
    spec = read_spec(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_title("nbd 0")
    logs.setup_child(spec["log"], "nbd 0")
    line = socket.socket(fileno=int(spec["line"]))
    line.setblocking(False)
    layout, reads = _image(spec)
    known = memoryview(mmap.mmap(int(spec["known"]), 0))
    server = Server(line, int(spec["lifeline_fd"]), known, Export(layout.size, layout.block), reads)
    for number, *fds in spec["clients"]:
        server.add(int(number), [int(fd) for fd in fds])
    server.run()
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
        return open_line(front, identity)

    board = open_row(spec["inflight"], int(spec["index"]))
    return layout, Reads(layout, device, connect, float(spec["read_deadline"]), board)
