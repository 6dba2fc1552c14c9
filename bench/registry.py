"""A small registry for benchmarks, in a process of its own: it serves one blob as fast as it can.

`python -m bench.registry BLOB REPO` prints `host:port` and serves until its stdin ends. `far_away` puts it behind a delay.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterator
from pathlib import Path

from bench.delay import in_process

_RANGE = re.compile(rb"bytes=(\d+)-(\d*)")
_PIECE = 256 << 10


class Registry:
    """Serves the blob file at `path`, named by its digest, below `repo`."""

    def __init__(self, path: Path, repo: str) -> None:
        self._size = path.stat().st_size
        self._fd = os.open(path, os.O_RDONLY)
        self._url = f"/v2/{repo}/blobs/sha256:{path.name}".encode()

    async def connection(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Answer the requests of one connection."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                for piece in self._answer(await reader.readuntil(b"\r\n\r\n")):
                    writer.write(piece)
                    await writer.drain()
        writer.close()

    def _answer(self, head: bytes) -> Iterator[bytes]:
        method, url = head.split(b" ", 2)[:2]
        if url != self._url:
            yield b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
            return
        match = re.search(rb"(?im)^range: *(.*?)\r$", head)
        asked = _RANGE.fullmatch(match[1]) if match else None
        first, last = 0, self._size - 1
        text = "HTTP/1.1 200 OK\r\n"
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or last), last)
            text = f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{self._size}\r\n"
        yield f"{text}Content-Length: {last - first + 1}\r\nContent-Type: application/octet-stream\r\n\r\n".encode()
        while method != b"HEAD" and first <= last:
            piece = os.pread(self._fd, min(_PIECE, last - first + 1), first)
            first += len(piece)
            yield piece


@contextlib.contextmanager
def far_away(blob: Path, repo: str, round_trip: float) -> Iterator[str]:
    """A registry whose answers come `round_trip` seconds after they were asked for; gives `host:port`."""
    command = [sys.executable, "-m", "bench.registry", str(blob), repo]
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            with in_process(process.stdout.readline().strip(), round_trip * 1000) as port:
                yield f"127.0.0.1:{port}"
        finally:
            process.stdin.close()
            process.wait(10)


async def _main(path: Path, repo: str) -> None:
    server = await asyncio.start_server(Registry(path, repo).connection, "127.0.0.1", 0)
    print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), sys.argv[2]))
