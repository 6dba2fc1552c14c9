"""A small registry and a slow link to it, for benchmarks: a process that serves one blob with a round trip as long as told.

`python -m bench.link BLOB REPO SECONDS` prints `host:port` and serves until its stdin ends. What is answered comes a round
trip after it was asked for, and is not slowed otherwise: what is under way overlaps, as on a long cable. A new connection
costs a round trip more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from asyncio import Queue, StreamReader, StreamWriter, Task
from collections.abc import Iterator
from pathlib import Path

_RANGE = re.compile(rb"bytes=(\d+)-(\d*)")
_PIECE = 256 << 10
_LIMIT = 4 << 20
"""Bytes that are under way at most on one connection, as TCP has a limit, too."""


class Link:
    """Serves the blob file at `path` (named by its digest) below `repo`, from `round_trip` seconds away."""

    def __init__(self, path: Path, repo: str, round_trip: float) -> None:
        self._size = path.stat().st_size
        self._fd = os.open(path, os.O_RDONLY)
        self._url = f"/v2/{repo}/blobs/sha256:{path.name}".encode()
        self._round_trip = round_trip
        self._tasks: set[Task[None]] = set()

    async def serve(self) -> tuple[asyncio.Server, int]:
        """Start listening; the server, and the port."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=_LIMIT)
        return server, server.sockets[0].getsockname()[1]

    async def _connection(self, reader: StreamReader, writer: StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        line: Queue[tuple[float, bytes]] = Queue(_LIMIT // _PIECE)
        sender = loop.create_task(self._send(line, writer))
        self._tasks.add(sender)
        sender.add_done_callback(self._tasks.discard)
        extra = self._round_trip  # the handshake, which ends here at once
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                for piece in self._answer(head):
                    await line.put((loop.time() + self._round_trip + extra, piece))
                extra = 0.0
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            sender.cancel()
            writer.close()

    @staticmethod
    async def _send(line: Queue[tuple[float, bytes]], writer: StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while True:
                due, piece = await line.get()
                if (wait := due - loop.time()) > 0:
                    await asyncio.sleep(wait)
                writer.write(piece)
                await writer.drain()

    def _answer(self, head: bytes) -> Iterator[bytes]:
        method, url = head.split(b" ", 2)[:2]
        if url != self._url:
            yield b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
            return
        match = re.search(rb"(?im)^range: *(.*?)\r$", head)
        asked = _RANGE.fullmatch(match[1]) if match else None
        first, last = 0, self._size - 1
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or last), last)
            text = f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{self._size}\r\n"
        else:
            text = "HTTP/1.1 200 OK\r\n"
        yield f"{text}Content-Length: {last - first + 1}\r\nContent-Type: application/octet-stream\r\n\r\n".encode()
        while method != b"HEAD" and first <= last:
            piece = os.pread(self._fd, min(_PIECE, last - first + 1), first)
            first += len(piece)
            yield piece


@contextlib.contextmanager
def link(blob: Path, repo: str, round_trip: float) -> Iterator[str]:
    """A link in a process of its own; gives `host:port`."""
    command = [sys.executable, "-m", "bench.link", str(blob), repo, str(round_trip)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(10)


async def _main(path: Path, repo: str, round_trip: float) -> None:
    server, port = await Link(path, repo, round_trip).serve()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
