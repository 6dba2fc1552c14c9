"""A daemon on a real mount over an HTTP backend: what it asks for, what faults and killed workers cost, who has secrets.

The server runs in the test's process, so whatever waits for the mount is read by a process of its own.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import blobs
from tests.support.daemon import Daemon, wait_for_role
from tests.support.discipline import wait_until
from tests.support.faulty_server import Faulty, Reply, Request, faulty, part_of
from tests.support.oracle import Image, image, truth

SMALL = image("v6-zstd-blake3")
REPO = "shop/frontend"
SECRET = "c2VjcmV0LXVzZXI6dmVyeS1zZWNyZXQtcGFzc3dvcmQ="
CHUNK = 1 << 20
BIG = "sizes/1048577"
"""A file of the image without compression; its first chunk has 1 MiB of stored bytes."""


def config(server: Faulty, cache: Path | None, **more: object) -> dict[str, object]:
    """A version 2 configuration: a registry over HTTP; `cache` None: nothing is stored."""
    registry = {"scheme": "http", "host": server.host, "repo": REPO, "auth": SECRET, "timeout": 2, "connect_timeout": 2}
    kept = {"type": "blobcache", "filecache": {"work_dir": str(cache)}} if cache is not None else {"type": ""}
    return {
        "version": 2,
        "backend": {"type": "registry", "registry": registry},
        "cache": kept,
        "rafs": {"mode": "direct", "enable_xattr": True},
        **more,
    }


@contextlib.contextmanager
def registry(chosen: Image) -> Iterator[Faulty]:
    """A server that has the blobs of an image."""
    with faulty() as server:
        for blob in chosen.blobs.iterdir():
            serve(server, blob.name, blob.read_bytes())
        yield server


def serve(server: Faulty, blob_id: str, data: bytes, *before: Callable[[Request, bytes], Reply]) -> None:
    """Answer requests for a blob: the first ones by `before`, one each."""
    steps = [lambda request, step=step: step(request, data) for step in before]
    server.program(f"/v2/{REPO}/blobs/sha256:{blob_id}", *steps, lambda request: part_of(data, request))


def ranges(server: Faulty) -> list[tuple[int, int]]:
    """(offset, length) of the requests so far."""
    return [(one.range[0], one.range[1] - one.range[0] + 1) for one in server.requests if one.range is not None]


def read_all(daemon: Daemon, chosen: Image) -> None:
    """Compare every file with the truth."""
    for path, content in truth(chosen.name).items():
        with open(os.path.join(os.fsencode(daemon.mountpoint), path), "rb") as file:
            assert (file.read() == content) is True, path


def test_what_was_fetched_is_there_without_the_backend(tmp_path: Path) -> None:
    with registry(SMALL) as server:
        settings = config(server, tmp_path)
        with Daemon(SMALL.bootstrap, SMALL.blobs, config=settings) as daemon:
            read_all(daemon, SMALL)
    with Daemon(SMALL.bootstrap, SMALL.blobs, config=settings) as daemon:  # the server is gone
        read_all(daemon, SMALL)


@pytest.mark.parametrize(
    "chosen", [image("v6-zstd-blake3"), image("v6-targz-ref"), image("v5-aligned")], ids=lambda i: i.name
)
def test_image_is_read_without_a_cache(chosen: Image) -> None:
    with registry(chosen) as server, Daemon(chosen.bootstrap, chosen.blobs, config=config(server, None)) as daemon:
        read_all(daemon, chosen)


def test_cold_sequential_read_asks_for_each_byte_once_in_few_requests(tmp_path: Path) -> None:
    with registry(SMALL) as server:
        size = sum(blob.stat().st_size for blob in SMALL.blobs.iterdir())
        with Daemon(SMALL.bootstrap, SMALL.blobs, config=config(server, tmp_path)) as daemon:
            read_all(daemon, SMALL)
        asked = ranges(server)
        assert sum(length for _offset, length in asked) <= size
        assert len(asked) <= 2 + size // (1 << 20) * 2, asked


def test_requests_are_as_long_as_amplify_io_says(tmp_path: Path) -> None:
    with registry(SMALL) as server:
        settings = config(server, tmp_path, rafs={"mode": "direct", "batch_size": 128 << 10})
        with Daemon(SMALL.bootstrap, SMALL.blobs, config=settings) as daemon:
            read_all(daemon, SMALL)
        _, (blob,) = blobs.open_image(SMALL.name)
        chunks = {(record.coff, record.csize) for record in blob.records}
        longer = [asked for asked in ranges(server) if asked[1] > 128 << 10]
        assert set(longer) <= chunks, "several chunks in a request that is too long"
        assert len(ranges(server)) < len(chunks) / 4


def test_thousand_readers_of_one_cold_chunk_are_one_request(tmp_path: Path) -> None:
    chosen = image("v6-none-sha256")
    (tmp_path / "truth").write_bytes(truth(chosen.name)[BIG.encode()])
    with registry(chosen) as server:
        settings = config(server, tmp_path / "cache", rafs={"mode": "direct", "batch_size": 0})
        with Daemon(chosen.bootstrap, chosen.blobs, config=settings) as daemon:
            (daemon.mountpoint / "bigowner").read_bytes()  # so that the blob is open
            before = len(server.requests)
            command = [sys.executable, "-m", "tests.support.readers", "storm", str(daemon.mountpoint / BIG)]
            subprocess.run([*command, str(tmp_path / "truth"), "50", "20", str(CHUNK)], check=True, timeout=120)
            assert len(server.requests) == before + 1


def test_only_fetch_workers_and_the_supervisor_hold_credentials(tmp_path: Path) -> None:
    environment = {"NYDUS_HEADER_X-Secret": SECRET, "DEPLOY_TOKEN": SECRET, "MIRROR": f"http://user:{SECRET}@host/"}
    with registry(SMALL) as server:
        daemon = Daemon(SMALL.bootstrap, SMALL.blobs, config=config(server, tmp_path), environment=environment)
        with daemon:
            read_all(daemon, SMALL)
            daemon.ctl("info")
            holders = {
                role: [_holds(pid) for pid in daemon.pids(role)] for role in ("fuse", "decompress", "api", "fetch")
            }
            assert any(holders.pop("fetch")), "the search finds nothing"
            assert not any(any(found) for found in holders.values()), holders
            assert SECRET not in daemon.log.read_text()
            assert SECRET not in daemon.ctl("--raw", "info")
            assert not any(SECRET in path.read_text() for path in Path(f"/proc/{daemon.pid}").glob("cmdline"))


def _holds(pid: int) -> bool:
    """Whether a process has the secret anywhere in its memory: what a core file of it would tell."""
    plain = base64.b64decode(SECRET)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights, *_ = line.split()
            if "w" not in rights and "[stack]" not in line:
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            try:
                memory.seek(start)
                content = memory.read(end - start)
            except OSError:
                continue
            if SECRET.encode() in content or plain in content:
                return True
    return False


def test_chunk_that_comes_damaged_is_fetched_once_more(tmp_path: Path) -> None:
    (blob,) = SMALL.blobs.iterdir()
    data = blob.read_bytes()
    with registry(SMALL) as server, Daemon(SMALL.bootstrap, SMALL.blobs, config=config(server, tmp_path)) as daemon:
        wait_until(lambda: _cache(daemon)["blobs"][0]["state"] == "ready", "the blob to be open", 30)
        before = len(server.requests)
        broken = data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
        serve(server, blob.name, data, lambda request, _data: part_of(broken, request))
        read_all(daemon, SMALL)
        asked = ranges(server)[before:]
        assert len([offset for offset, length in asked if offset <= 1000 < offset + length]) == 2
        assert _cache(daemon)["blobs"][0]["failed"] == 0


def test_open_connections_of_each_worker_are_reported(tmp_path: Path) -> None:
    with registry(SMALL) as server, Daemon(SMALL.bootstrap, SMALL.blobs, config=config(server, tmp_path)) as daemon:
        read_all(daemon, SMALL)
        rows = [row for row in _processes(daemon) if row["role"] == "fetch"]
        assert len(rows) == 4
        assert sum(row["jobs"] for row in rows) >= daemon.backend_reads()
        open_now = [row["connections"] for row in rows if row["connections"]]
        assert open_now and all(row == {server.host: 1} for row in open_now)


def test_daemon_without_an_image_gets_more_fetch_workers_with_its_first_one_from_a_server(tmp_path: Path) -> None:
    name, content = BIG, truth("v6-none-sha256")[BIG.encode()]
    chosen = image("v6-none-sha256")
    with registry(chosen) as server, Daemon(None, chosen.blobs) as daemon:
        wait_for_role(daemon, "fetch", 1)
        settings = json.dumps(config(server, tmp_path))
        assert daemon.mount("/one", chosen.bootstrap, chosen.blobs, config=settings) == (204, "")
        wait_for_role(daemon, "fetch", 4)
        assert (daemon.mountpoint / "one" / name).read_bytes() == content


def test_stop_while_all_fetch_workers_wait_for_a_dead_server_loses_nothing(tmp_path: Path) -> None:
    chosen = image("v6-none-sha256")
    (blob,) = chosen.blobs.iterdir()
    contents = truth(chosen.name)
    first = b"sizes/4096"
    with registry(chosen) as server:
        tuning = {"checkpoint_interval": 3600.0, "read_deadline": 60.0}
        settings = config(server, tmp_path, rafs={"mode": "direct", "batch_size": 0}, nydusd=tuning)
        with Daemon(chosen.bootstrap, chosen.blobs, config=settings) as daemon:
            here = os.path.join(os.fsencode(daemon.mountpoint), first)
            assert Path(os.fsdecode(here)).read_bytes() == contents[first]
            server.handlers[f"/v2/{REPO}/blobs/sha256:{blob.name}"] = lambda request: Reply(silent=True)
            names = [
                os.path.join(os.fsencode(daemon.mountpoint), name) for name in contents if len(contents[name]) > 99
            ]
            readers = [
                subprocess.Popen(["cat", name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for name in names
            ]
            wait_until(lambda: len(_busy(daemon, "fetch")) == 4, "four requests under way", 30)
            for reader in readers:
                reader.kill()
                reader.wait()
        served = len(server.requests)
        with Daemon(chosen.bootstrap, chosen.blobs, config=settings) as daemon:
            here = os.path.join(os.fsencode(daemon.mountpoint), first)
            assert Path(os.fsdecode(here)).read_bytes() == contents[first]
        assert len(server.requests) == served


class TestKilled:
    """SIGKILL of a worker that has something in hands: its reader sees a delay and nothing else."""

    def test_fetch_worker_in_mid_body(self, tmp_path: Path) -> None:
        (blob,) = SMALL.blobs.iterdir()
        with registry(SMALL) as server:
            stalled = threading.Event()

            def stall(request: Request, data: bytes) -> Reply:
                stalled.set()
                reply = part_of(data, request)
                return dataclasses.replace(reply, pieces=4096, pace=0.5)

            settings = config(server, tmp_path)
            with Daemon(SMALL.bootstrap, SMALL.blobs, config=settings) as daemon:
                wait_for_role(daemon, "fetch", 4)
                wait_until(lambda: _busy(daemon, "prepare") == [] and len(server.requests) > 0, "the blob to be open")
                serve(server, blob.name, blob.read_bytes(), stall)
                with _reader(daemon) as reader:
                    assert stalled.wait(20)
                    (victim,) = _busy(daemon, "fetch")
                    daemon.kill(victim)
                    assert reader.wait(20) == 0
                wait_for_role(daemon, "fetch", 4, without=victim)
                read_all(daemon, SMALL)
                assert _arena(daemon) == 0

    def test_decompress_workers_in_mid_fill(self, tmp_path: Path) -> None:
        with registry(SMALL) as server, Daemon(SMALL.bootstrap, SMALL.blobs, config=config(server, tmp_path)) as daemon:
            wait_until(lambda: all(row.get("ready", True) for row in _processes(daemon)), "all workers", 30)
            victims = daemon.pids("decompress")
            for pid in victims:
                os.kill(pid, signal.SIGSTOP)  # what they are given they keep
            with _reader(daemon) as reader:
                wait_until(lambda: len(_busy(daemon, "fill")) > 0, "a fill under way")
                assert _arena(daemon) > 0
                for pid in victims:
                    daemon.kill(pid)
                assert reader.wait(20) == 0
            read_all(daemon, SMALL)
            assert _arena(daemon) == 0


def _processes(daemon: Daemon) -> list[dict[str, Any]]:
    answer = daemon.get("/api/v1/nydusd/workers")
    assert isinstance(answer, dict)
    return list(answer["processes"])


def _busy(daemon: Daemon, kind: str) -> list[int]:
    """The pids of the workers that are doing such a job."""
    return [row["pid"] for row in _processes(daemon) if row.get("busy") == kind]


def _cache(daemon: Daemon) -> dict[str, Any]:
    answer = daemon.get("/api/v1/nydusd/cache")
    assert isinstance(answer, dict)
    return answer


def _arena(daemon: Daemon) -> int:
    return int(_cache(daemon)["arena_bytes"])


@contextlib.contextmanager
def _reader(daemon: Daemon) -> Iterator[subprocess.Popen[bytes]]:
    """A process that reads a file of SMALL and ends with 0 if its bytes are right."""
    path, content = max(truth(SMALL.name).items(), key=lambda item: len(item[1]))
    script = (
        "import hashlib, sys; sys.exit(hashlib.sha256(open(sys.argv[1].encode('utf-8', 'surrogateescape'), 'rb').read())"
        ".hexdigest() != sys.argv[2])"
    )
    name = os.fsdecode(os.path.join(os.fsencode(daemon.mountpoint), path))
    with subprocess.Popen([sys.executable, "-c", script, name, hashlib.sha256(content).hexdigest()]) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
