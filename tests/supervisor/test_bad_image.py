"""One image that a supervisor cannot take over is no obstacle to the others of its daemon. Real daemons."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import posix_ipc
import pytest

from tests.supervisor.lives import IMAGE, ONE_CHUNK, crash, read_direct, state_file
from tests.support import oracle
from tests.support.daemon import Daemon

ExpectLog = Callable[..., None]
PATH = "sizes/300K-text"
TRUTH = oracle.truth(IMAGE.name)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """Two images mounted by the API, one read through a folder that stays open."""
    with Daemon(None, tmp_path, cache=tmp_path / "cache") as daemon:
        for place in ("/one", "/two"):
            assert daemon.mount(place, IMAGE.bootstrap, IMAGE.blobs)[0] == 204
        yield daemon


def places(daemon: Daemon) -> list[str]:
    return sorted(row["mountpoint"] for row in daemon.get("/api/v1/nydusd/mounts")["images"])  # type: ignore[index]


def test_a_record_that_is_damaged_costs_its_image_alone(daemon: Daemon, expect_log: ExpectLog) -> None:
    held = os.open(daemon.mountpoint / "two", os.O_PATH)
    gone = os.open(daemon.mountpoint / "one", os.O_PATH)
    crash(daemon)
    record = next((state_file(daemon).parent / "mounts").glob("1.*.record"))
    content = bytearray(record.read_bytes())
    content[len(content) // 2] ^= 1
    record.write_bytes(content)
    expect_log("the image at /one cannot be taken over: .*record.*; it is unmounted")
    daemon.start()
    assert places(daemon) == ["/two"]
    assert read_direct(Path(f"/proc/self/fd/{held}") / ONE_CHUNK) == TRUTH[ONE_CHUNK.encode()]
    with pytest.raises(OSError) as raised:
        read_direct(Path(f"/proc/self/fd/{gone}") / PATH)
    assert raised.value.errno == errno.ESTALE
    for fd in (held, gone):
        os.close(fd)
    assert daemon.mount("/one", IMAGE.bootstrap, IMAGE.blobs)[0] == 204
    assert read_direct(daemon.mountpoint / "one" / PATH) == TRUTH[PATH.encode()]


def test_counters_that_are_gone_are_made_anew(daemon: Daemon, expect_log: ExpectLog) -> None:
    crash(daemon)
    instance = state_file(daemon).parent.name
    for name in ("count.1", "inflight"):
        posix_ipc.unlink_shared_memory(f"/nydusd.{instance}.{name}")
    expect_log("the image at /one is counted from 0 again")
    daemon.start()
    assert places(daemon) == ["/one", "/two"]
    for place in places(daemon):
        assert read_direct(daemon.mountpoint / place[1:] / PATH) == TRUTH[PATH.encode()]
