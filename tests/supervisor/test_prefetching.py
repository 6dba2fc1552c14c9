"""What a daemon fetches before anybody asks, and what not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.supervisor.lives import IMAGE, ONE_CHUNK, config_for, read_direct, wrong
from tests.support import oracle
from tests.support.daemon import Daemon
from tests.support.discipline import wait_until
from tests.support.oracle import Image

TABLE_IMAGE = oracle.image("v6-prefetch")
"""Its table names /sizes and /dup/a."""


class Prefetching:
    """A daemon that reads nothing ahead of readers, with `fs_prefetch` as given."""

    def __init__(self, image: Image, tmp_path: Path, prefetch: dict[str, object], paths: bytes | None = None) -> None:
        config = config_for(image, tmp_path / "cache", amplify_io=0, fs_prefetch=prefetch)
        args: tuple[str, ...] = ()
        if paths is not None:
            (tmp_path / "list").write_bytes(paths)
            args = ("--prefetch-files", str(tmp_path / "list"))
        self.daemon = Daemon(image.bootstrap, image.blobs, cache=tmp_path / "cache", config=config, args=args)

    def metrics(self) -> dict[str, int]:
        found = self.daemon.get("/api/v1/metrics/blobcache")
        assert isinstance(found, dict)
        return found

    def wait_for_chunks(self, least: int) -> None:
        wait_until(lambda: self.metrics()["entries_count"] >= least, f"{least} chunks to be prefetched", 20)

    def is_cached(self, path: str) -> bool:
        """Whether a read of this file asks the backend for nothing; its bytes are checked."""
        before = self.daemon.backend_reads()
        assert read_direct(self.daemon.mountpoint / path) == oracle.truth(IMAGE.name)[path.encode()]
        return self.daemon.backend_reads() == before


def settled(prefetching: Prefetching) -> None:
    """Wait for the end: a file that prefetch takes last is there."""
    seen = [-1]

    def quiet() -> bool:
        seen.append(prefetching.metrics()["entries_count"])
        return seen[-1] == seen[-2] > 0 and len(seen) > 20

    wait_until(quiet, "the end of prefetch", 20)


def test_all_is_fetched_when_asked_for(tmp_path: Path) -> None:
    prefetching = Prefetching(IMAGE, tmp_path, {"enable": True, "prefetch_all": True})
    with prefetching.daemon as daemon:
        wait_until(lambda: bool(prefetching.metrics()["data_all_ready"]), "all chunks", 20)
        before = daemon.backend_reads()
        assert wrong(daemon) == []
        assert daemon.backend_reads() == before


@pytest.mark.parametrize("name", [IMAGE.name, "v6-batch", "v6-targz-ref"])
def test_amount_that_is_told_is_what_the_backend_was_asked_for(name: str, tmp_path: Path) -> None:
    prefetching = Prefetching(oracle.image(name), tmp_path, {"enable": True, "prefetch_all": True})
    with prefetching.daemon as daemon:
        wait_until(lambda: bool(prefetching.metrics()["data_all_ready"]), "all chunks", 20)

        def read() -> int:
            found = daemon.get("/api/v1/metrics/backend")
            assert isinstance(found, dict) and isinstance(found["read_amount_total"], int)
            return found["read_amount_total"]

        amount = prefetching.metrics()["prefetch_data_amount"]
        wait_until(lambda: read() >= amount > 0, "the last job to be counted", 20)
        # Two jobs may read what lies between two zran contexts.
        assert amount <= read() <= (amount if name != "v6-targz-ref" else amount * 1.01)


def test_table_of_the_image_is_fetched_and_no_more(tmp_path: Path) -> None:
    prefetching = Prefetching(TABLE_IMAGE, tmp_path, {"enable": True, "prefetch_all": False})
    with prefetching.daemon:
        settled(prefetching)
        assert prefetching.is_cached("sizes/300K-text")
        assert prefetching.is_cached(ONE_CHUNK)
        assert prefetching.is_cached("dup/a")
        assert not prefetching.metrics()["data_all_ready"]


def test_list_replaces_the_table_and_wrong_lines_in_it_harm_nothing(tmp_path: Path) -> None:
    prefetching = Prefetching(
        TABLE_IMAGE, tmp_path, {"enable": True, "prefetch_all": False}, b"/no/such/file\n/hard-link/x\n\n/dup\n"
    )
    with prefetching.daemon as daemon:
        settled(prefetching)
        assert prefetching.is_cached("dup/a")
        assert not prefetching.is_cached(ONE_CHUNK)
        assert "/no/such/file is not in the image" in daemon.log.read_text()


def test_files_that_the_api_names_are_fetched_and_no_others(tmp_path: Path) -> None:
    config = config_for(IMAGE, tmp_path / "cache", amplify_io=0, fs_prefetch={"enable": True, "prefetch_all": False})
    prefetching = Prefetching(IMAGE, tmp_path, {})
    prefetching.daemon = Daemon(None, IMAGE.blobs)
    with prefetching.daemon as daemon:
        for method, file in (("POST", "dup/a"), ("PUT", ONE_CHUNK)):
            before = prefetching.metrics()["entries_count"] if method == "PUT" else 0
            more = {"config": json.dumps(config), "prefetch_files": ["/no/such/file", f"/{file}"]}
            assert daemon.mount("/", IMAGE.bootstrap, IMAGE.blobs, method, **more) == (204, "")
            prefetching.wait_for_chunks(before + 1)
            settled(prefetching)
            assert prefetching.is_cached(file)
        assert not prefetching.is_cached("sizes/300K-text")


def test_list_that_names_the_root_fetches_all(tmp_path: Path) -> None:
    prefetching = Prefetching(IMAGE, tmp_path, {"enable": True, "prefetch_all": False}, b"/\n")
    with prefetching.daemon:
        wait_until(lambda: bool(prefetching.metrics()["data_all_ready"]), "all chunks", 20)


@pytest.mark.parametrize("prefetch", [{"enable": False, "prefetch_all": True}, {}], ids=["disabled", "default"])
def test_nothing_is_fetched_unless_enabled(tmp_path: Path, prefetch: dict[str, object]) -> None:
    prefetching = Prefetching(TABLE_IMAGE, tmp_path, prefetch)
    with prefetching.daemon as daemon:
        assert not prefetching.is_cached("dup/a")
        assert daemon.backend_reads() == 1
        assert prefetching.metrics()["prefetch_requests_count"] == 0


def test_low_limit_holds_prefetch_back_and_no_reader(tmp_path: Path) -> None:
    """At 1,000 bytes a second the image takes ten minutes."""
    prefetch: dict[str, object] = {
        "enable": True,
        "prefetch_all": True,
        "bandwidth_rate": 1000,
        "merging_size": 131072,
    }
    prefetching = Prefetching(IMAGE, tmp_path, prefetch)
    with prefetching.daemon as daemon:
        prefetching.wait_for_chunks(1)
        assert read_direct(daemon.mountpoint / ONE_CHUNK) == oracle.truth(IMAGE.name)[ONE_CHUNK.encode()]
        metrics = prefetching.metrics()
        assert metrics["prefetch_requests_count"] == 1
        assert not metrics["data_all_ready"]
        assert wrong(daemon) == []


def test_each_image_that_the_api_mounts_has_its_own_limits_also_after_a_takeover(tmp_path: Path) -> None:
    """As nydus-snapshotter does it in shared mode: the daemon has no configuration of its own."""
    all_of_it: dict[str, object] = {"enable": True, "prefetch_all": True}
    slow: dict[str, object] = {"fs_prefetch": all_of_it | {"bandwidth_rate": 1000, "merging_size": 131072}}
    other = oracle.image("v5-zstd-blake3")

    def metrics(place: str) -> dict[str, int]:
        found = daemon.get(f"/api/v1/metrics/blobcache?id={place}")
        assert isinstance(found, dict)
        return found

    with Daemon(None, IMAGE.blobs) as daemon:
        for place, image, more in (("/slow", IMAGE, slow), ("/fast", other, {"fs_prefetch": all_of_it})):
            config = json.dumps(config_for(image, tmp_path / place[1:], **more) | {"id": place})
            assert daemon.mount(place, image.bootstrap, image.blobs, config=config) == (204, "")
        wait_until(lambda: bool(metrics("/fast")["data_all_ready"]), "all of the image that has no limit", 20)
        assert metrics("/slow")["prefetch_requests_count"] == 1
        daemon.kill_supervisor()
        daemon.start()
        wait_until(lambda: metrics("/slow")["prefetch_requests_count"] > 0, "prefetch to go on", 20)
        assert wrong(daemon, other.name, "fast") == []
        assert not metrics("/slow")["data_all_ready"]
        assert wrong(daemon, place="slow") == []


def test_an_image_that_the_api_mounts_is_read_ahead_as_its_own_amplify_io_says(tmp_path: Path) -> None:
    with Daemon(None, IMAGE.blobs) as daemon:
        config = json.dumps(config_for(IMAGE, tmp_path / "cache", amplify_io=0))
        assert daemon.mount("/", IMAGE.bootstrap, IMAGE.blobs, config=config) == (204, "")
        read_direct(daemon.mountpoint / ONE_CHUNK)
        metrics = daemon.get("/api/v1/metrics/blobcache")
        assert isinstance(metrics, dict)
        assert metrics["entries_count"] == 1


def test_nothing_is_read_ahead_with_amplify_io_0(tmp_path: Path) -> None:
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config_for(IMAGE, tmp_path / "cache", amplify_io=0)) as daemon:
        read_direct(daemon.mountpoint / ONE_CHUNK)
        metrics = daemon.get("/api/v1/metrics/blobcache")
        assert isinstance(metrics, dict)
        assert metrics["entries_count"] == 1


def test_daemon_with_nothing_to_prefetch_sleeps(tmp_path: Path) -> None:
    """Its CPU time does not grow while it waits for a limit that leaves nothing to do for minutes."""
    prefetch: dict[str, object] = {"enable": True, "prefetch_all": True, "bandwidth_rate": 1000}
    prefetching = Prefetching(IMAGE, tmp_path, prefetch)
    with prefetching.daemon as daemon:
        prefetching.wait_for_chunks(1)
        switches = voluntary_switches(daemon.pid)
        asked = 20
        for _ in range(asked):
            daemon.get("/api/v1/daemon")
        assert voluntary_switches(daemon.pid) - switches < 20 * asked


def voluntary_switches(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches:"):
            return int(line.split()[1])
    raise AssertionError(f"process {pid} is gone: {os.listdir('/proc')}")
