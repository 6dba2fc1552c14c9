"""A read that waits is shown by the API and in the metrics, whichever front end has it, until it is answered."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nydusd.frontends.nbd import protocol
from tests.nbd.test_export import Export, answered, command, exactly, serving
from tests.support import oracle
from tests.support.daemon import Daemon, image_config, wait_for_role
from tests.support.discipline import wait_until

IMAGE = oracle.image("v6-zstd-blake3")
NAME, CONTENT = next((name, data) for name, data in oracle.truth(IMAGE.name).items() if 0 < len(data) <= 4096)
IN_A_BLOB = 128 * 4096
"""Of the export."""


def config(cache: Path) -> dict[str, object]:
    """One worker of each kind, which may do nothing for as long as the test takes."""
    tuning = {"front_ends": 1, "fetch_workers": 1, "decompress_workers": 1, "worker_idle": 0, "worker_patience": 600}
    return image_config(IMAGE.blobs, cache) | {"nydusd": tuning}


def shown(daemon: Daemon) -> list[dict[str, int]]:
    rows = daemon.get("/api/v1/metrics/inflight")
    assert rows is None or isinstance(rows, list)
    return rows or []


def asked(daemon: Daemon) -> int:
    """How many requests of front ends the supervisor has not answered."""
    load = daemon.get("/api/v1/nydusd/load")
    assert isinstance(load, dict)
    return int(load["waiting"])


def metric(daemon: Daemon, name: str) -> float:
    page = daemon.request("GET", "/metrics/prometheus")[1].decode()
    (value,) = re.findall(rf"^{name} (\S+)$", page, re.MULTILINE)
    return float(value)


def is_shown_through_a_kill(daemon: Daemon, role: str, read: Callable[[], bytes]) -> tuple[dict[str, int], bytes]:
    """Read while no worker works, and kill the front end meanwhile. What was shown, and what was read."""
    workers = [*daemon.pids("fetch"), *daemon.pids("decompress")]
    assert len(workers) == 2
    assert shown(daemon) == []
    assert metric(daemon, "nydusd_waiting_reads") == metric(daemon, "nydusd_longest_wait_seconds") == 0
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        try:
            answer = pool.submit(read)
            wait_until(lambda: shown(daemon) != [], "the read to be shown", 60)
            (row,) = shown(daemon)
            assert metric(daemon, "nydusd_waiting_reads") == 1
            wait_until(lambda: metric(daemon, "nydusd_longest_wait_seconds") > 0, "the read to wait longer", 60)
            (front_end,) = daemon.pids(role)
            daemon.kill(front_end)
            wait_for_role(daemon, role, 1, without=front_end, seconds=60)
            wait_until(lambda: asked(daemon) == 1, "its successor to ask for the chunk", 60)
            assert shown(daemon) == [row], "it has waited since then"
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
        found = answer.result(60)
    wait_until(lambda: shown(daemon) == [], "the board to be empty", 60)
    assert metric(daemon, "nydusd_waiting_reads") == metric(daemon, "nydusd_longest_wait_seconds") == 0
    assert row.keys() == {"inode", "opcode", "unique", "timestamp_secs"}
    assert row["opcode"] == 15
    return row, found


@pytest.mark.parametrize(("verb", "args"), [("fuse", ()), ("erofs", ("--driver", "fanotify"))])
def test_a_read_of_a_mount_is_shown_until_it_is_answered(tmp_path: Path, verb: str, args: tuple[str, ...]) -> None:
    cache = tmp_path / "cache"
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config(cache), verb=verb, args=args) as daemon:
        path = Path(os.fsdecode(os.fsencode(daemon.mountpoint) + b"/" + NAME))
        row, found = is_shown_through_a_kill(daemon, verb, path.read_bytes)
        assert found == CONTENT
        # The kernel's EROFS says no more than which file it reads: a cache file.
        (cached,) = cache.glob("*.blob.data")
        assert row["inode"] == (path if verb == "fuse" else cached).stat().st_ino


def test_a_read_of_a_block_device_is_shown_until_it_is_answered(tmp_path: Path) -> None:
    with Export(IMAGE, config=config(tmp_path / "cache")) as export:
        with serving(export) as wire:

            def read() -> bytes:
                wire.sendall(command(protocol.READ, IN_A_BLOB, 4096))
                assert answered(wire) == 0
                return exactly(wire, 4096)

            row, found = is_shown_through_a_kill(export, "nbd", read)
        assert row["inode"] == 0
        assert found == export.copy(tmp_path / "disk").read_bytes()[IN_A_BLOB : IN_A_BLOB + 4096]
