"""A TCP forwarder that makes a server far away: what it passes on arrives later, in order, however much is on its way.

`python -m bench.delay TARGET_HOST:PORT ROUND_TRIP_MS [LISTEN_PORT]` prints the port on which it listens and forwards until it
is ended. In code: `async with Forwarder(...)`, or `with in_process(...)`, which runs it in a process of its own, so that it
takes no time of whoever measures. Each direction is delayed by half of the round trip; a new connection costs another round
trip, as a real one does. Bandwidth is not limited.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

_PIECE = 1 << 18
_LIMIT = 64 << 20
"""Bytes on their way in one direction of a connection, at most: far more than any window of a real network."""


class _Direction(asyncio.Protocol):
    """Takes what one side sends, and gives it to the other side `delay` seconds later."""

    def __init__(self, forwarder: Forwarder, peer: _Direction | None = None) -> None:
        self._forwarder = forwarder
        self._loop = asyncio.get_running_loop()
        self.peer = peer
        self.transport: asyncio.Transport | None = None
        self._line: deque[tuple[float, bytes]] = deque()
        self._held = 0
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(_LIMIT)
        if self.peer is None:
            self._forwarder.connections += 1
            task = self._loop.create_task(self._connect())
            self._forwarder.tasks.add(task)
            task.add_done_callback(self._forwarder.tasks.discard)
        else:
            self.peer.flush()

    async def _connect(self) -> None:
        await asyncio.sleep(self._forwarder.delay * 2)
        self.peer = _Direction(self._forwarder, self)
        try:
            await self._loop.create_connection(
                lambda: self.peer or _Direction(self._forwarder), *self._forwarder.target
            )
        except OSError:
            if self.transport is not None:
                self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self._line.append((self._loop.time() + self._forwarder.delay, data))
        self._held += len(data)
        if self._held > _LIMIT and self.transport is not None:
            self.transport.pause_reading()
        self.flush()

    def flush(self) -> None:
        """Give on what is due, and come back for the rest."""
        if self._timer is not None or self.peer is None or self.peer.transport is None:
            return
        now = self._loop.time()
        while self._line and self._line[0][0] <= now:
            _, data = self._line.popleft()
            self._held -= len(data)
            self.peer.transport.write(data)
        if self._held <= _LIMIT and self.transport is not None:
            self.transport.resume_reading()
        if self._line:
            self._timer = self._loop.call_at(self._line[0][0], self._due)
        elif self._ended:
            self.peer.transport.close()

    def _due(self) -> None:
        self._timer = None
        self.flush()

    def eof_received(self) -> bool:
        self._ended = True
        self.flush()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self._ended = True
        self.flush()


class Forwarder:
    """Forwards connections to `target` (host, port) with a round trip of `round_trip` seconds. `port` 0 takes a free one."""

    def __init__(self, target: tuple[str, int], round_trip: float, port: int = 0) -> None:
        self.target = target
        self.delay = round_trip / 2
        self.port = port
        self.connections = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Forwarder:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Direction(self), "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()


@contextlib.contextmanager
def in_process(target: str, round_trip_ms: float) -> Iterator[int]:
    """A forwarder to `target` (host:port) in a process of its own; gives its port."""
    command = [sys.executable, "-m", "bench.delay", target, str(round_trip_ms)]
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


async def _serve(target: str, round_trip_ms: float, port: int) -> None:
    host, _, number = target.rpartition(":")
    async with Forwarder((host, int(number)), round_trip_ms / 1000, port) as forwarder:
        print(forwarder.port, flush=True)
        await asyncio.Event().wait()


def main(arguments: list[str]) -> int:
    match arguments:
        case [target, round_trip_ms, *port] if len(port) < 2:
            with contextlib.suppress(KeyboardInterrupt):
                asyncio.run(_serve(target, float(round_trip_ms), int(port[0]) if port else 0))
            return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
