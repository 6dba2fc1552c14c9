"""Workers without jobs end, and are there again for the next one: no reader notices more than some milliseconds."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.supervisor.lives import IMAGE, ONE_CHUNK, config_for, read_direct, wrong
from tests.support.daemon import Daemon
from tests.support.discipline import wait_until

ROLES = ("fetch", "decompress")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    config = config_for(IMAGE, tmp_path / "cache", nydusd={"worker_idle": 0.2, "front_ends": 1})
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
        read_direct(daemon.mountpoint / ONE_CHUNK)
        wait_for_rest(daemon)
        yield daemon


def states(daemon: Daemon) -> set[str]:
    answer = daemon.get("/api/v1/nydusd/workers")
    assert isinstance(answer, dict)
    return {row["state"] for row in answer["processes"] if row["role"] in ROLES}


def wait_for_rest(daemon: Daemon) -> None:
    wait_until(
        lambda: states(daemon) == {"resting"} and not any(map(daemon.pids, ROLES)),
        "all workers at rest",  # one may be needed once more, to store the chunk map
    )


def test_what_is_not_cached_is_read_while_all_workers_rest_again_and_again(daemon: Daemon) -> None:
    assert wrong(daemon) == []
    wait_for_rest(daemon)
    assert "resting" in daemon.ctl("workers")
    assert wrong(daemon) == []


def test_an_image_that_is_mounted_while_workers_rest_is_prefetched_and_read(tmp_path: Path) -> None:
    config = config_for(IMAGE, tmp_path / "cache", nydusd={"worker_idle": 0.2, "front_ends": 1})
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config, args=("-m", "/first")) as daemon:
        wait_for_rest(daemon)
        more = {"fs_prefetch": {"enable": True, "prefetch_all": True}}
        wanted = config_for(IMAGE, tmp_path / "more", id="/more") | more
        command = {"fs_type": "rafs", "source": str(IMAGE.bootstrap), "config": json.dumps(wanted)}
        assert daemon.request("POST", "/api/v1/mount?mountpoint=/more", json.dumps(command).encode())[0] == 204
        wait_until(lambda: "complete" in daemon.ctl("info"), "the end of its prefetch")
        wait_for_rest(daemon)
        assert read_direct(daemon.mountpoint / "more" / ONE_CHUNK) == read_direct(
            daemon.mountpoint / "first" / ONE_CHUNK
        )
        assert daemon.umount("/more") == (204, "")


def test_a_fork_server_that_was_killed_meanwhile_is_no_obstacle(daemon: Daemon) -> None:
    wait_until(lambda: len(daemon.pids("fork server")) == 2, "the copy of the fork server")
    before = daemon.pids("fork server")
    os.kill(before[0], signal.SIGKILL)
    assert wrong(daemon) == []
    wait_until(lambda: len(set(daemon.pids("fork server")) - {before[0]}) == 2, "another copy")


def test_a_new_supervisor_has_workers_though_the_former_one_had_none(daemon: Daemon) -> None:
    daemon.kill_supervisor()
    daemon.start()
    assert wrong(daemon) == []
    wait_for_rest(daemon)


def test_a_daemon_stops_while_workers_rest_and_keeps_what_is_cached(tmp_path: Path) -> None:
    config = config_for(IMAGE, tmp_path / "cache", nydusd={"worker_idle": 0.2, "checkpoint_interval": 3600})
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
        assert wrong(daemon) == []
        wait_for_rest(daemon)
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
        assert wrong(daemon) == []
        assert daemon.backend_reads() == 0


def test_workers_do_not_rest_if_the_configuration_says_so(tmp_path: Path) -> None:
    config = config_for(IMAGE, tmp_path / "cache", nydusd={"worker_idle": 0})
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
        assert wrong(daemon) == []
        assert "resting" not in states(daemon)


def test_workers_are_scaled_and_upgraded_while_they_rest(daemon: Daemon) -> None:
    daemon.ctl("workers", "scale", "decompress=1")
    wait_for_rest(daemon)
    daemon.ctl("workers", "upgrade")
    assert wrong(daemon) == []
    daemon.ctl("workers", "scale", "decompress=3")
    wait_for_rest(daemon)
    assert wrong(daemon) == []
