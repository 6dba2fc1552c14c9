"""The disk of the cache folder fails, on a real block device: reads go on uncached, right, and the daemon says so."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.killing.scene import read
from tests.supervisor.lives import IMAGE
from tests.supervisor.test_told import held_by_disk, standing_still
from tests.support.daemon import Daemon, image_config
from tests.support.discipline import descendants, discipline, is_running, wait_until
from tests.support.disk import GOOD, NO_READS, NO_WRITES, Disk, make_ext4, mounted
from tests.support.mounted import Tree

NAMES = [f"{number:02}" for number in range(6)]
_SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN."""
Expect = Callable[..., None]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("tree"))


@pytest.fixture
def disk() -> Iterator[Disk]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nydusd-k-") as folder, Disk(Path(folder)) as made:
        yield made


def daemon_on(tree: Tree, disk: Path, **more: float) -> Daemon:
    cache = disk / "cache"
    backend = {"type": "localfs", "config": {"dir": str(tree.bootstrap.parent / "blobs")}}
    device = {"backend": backend, "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}}}
    tuning = {"front_ends": 1, "decompress_workers": 1, "checkpoint_interval": 0.2} | more
    config = {"device": device, "mode": "direct", "amplify_io": 0, "nydusd": tuning}
    return Daemon(tree.bootstrap, cache, cache=cache, config=config)


def right(daemon: Daemon, tree: Tree) -> None:
    for name in NAMES:
        assert read(daemon.mountpoint / name) == tree.contents[name], name


def says_uncached(daemon: Daemon) -> bool:
    (row,) = daemon.get("/api/v1/nydusd/mounts")["images"]  # type: ignore[index]
    return bool(row["uncached"]) and "reads go on uncached" in daemon.ctl("info")


def test_disk_that_gives_nothing_back_costs_no_read(tree: Tree, disk: Disk, expect_log: Expect) -> None:
    expect_log("cache file at .*: Input/output error: fetching it again")
    with daemon_on(tree, disk.path) as daemon:
        right(daemon, tree)
        disk.forget_cached(daemon.cache / f"{tree.blob_id}.blob.data")
        assert not says_uncached(daemon)
        disk.does(NO_READS)
        right(daemon, tree)
        assert says_uncached(daemon)
        disk.does(GOOD)
        right(daemon, tree)


def test_disk_that_takes_nothing_costs_no_read(tree: Tree, disk: Disk) -> None:
    # The front end hears of it unless the next checkpoint comes before.
    discipline.logs.allow("its disk did not take all that was written: fetching it again")
    with daemon_on(tree, disk.path) as daemon:
        assert read(daemon.mountpoint / NAMES[0]) == tree.contents[NAMES[0]]
        disk.does(NO_WRITES)
        right(daemon, tree)
        wait_until(lambda: says_uncached(daemon), "the daemon to find out", 60)
        right(daemon, tree)


def test_disk_that_is_read_only_from_the_start_costs_no_read(tree: Tree, disk: Disk) -> None:
    (disk.path / "cache").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk.path)], check=True)
    with daemon_on(tree, disk.path) as daemon:
        right(daemon, tree)
        assert says_uncached(daemon)
        assert list(daemon.cache.iterdir()) == []


def test_disk_that_becomes_read_only_before_a_worker_has_the_cache_file_open_costs_no_read(
    tree: Tree, disk: Disk
) -> None:
    """As ext4 does of itself at an error: a worker that was just started cannot open the file for writing."""
    with daemon_on(tree, disk.path) as daemon:
        wait_until(lambda: "chunks are in the cache" in daemon.log.read_text(), "the blob to be open", 60)
        subprocess.run(["mount", "-o", "remount,ro", str(disk.path)], check=True)
        right(daemon, tree)
        assert says_uncached(daemon)


def test_disk_that_is_shut_down_costs_no_read(tree: Tree, disk: Disk, expect_log: Expect) -> None:
    """As ext4 and XFS do of themselves: from then on files cannot even be opened."""
    expect_log("cache file", "fetching it again")
    with daemon_on(tree, disk.path) as daemon:
        for name in NAMES[:3]:
            assert read(daemon.mountpoint / name) == tree.contents[name]
        folder = os.open(disk.path, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, _SHUTDOWN, (2).to_bytes(4, "little"))  # without writing what it has
        finally:
            os.close(folder)
        right(daemon, tree)
        right(daemon, tree)
        assert says_uncached(daemon)
        for pid in [*daemon.pids("fuse"), *daemon.pids("fetch"), *daemon.pids("decompress")]:
            os.kill(pid, signal.SIGKILL)
        right(daemon, tree)


def test_disk_that_stands_still_keeps_nobody_who_reads_from_another_while_an_image_is_unmounted(
    tree: Tree, tmp_path: Path
) -> None:
    """Nothing of that image was read: its chunk map, which is not there, is looked for all the same, and its record goes."""
    make_ext4(tmp_path / "disk")
    with mounted(tmp_path / "disk", tmp_path / "still", "rw"):
        cache = tmp_path / "still" / "cache"
        cache.mkdir()
        records = [cache / f"{blob.name}.blob.data.chunk_map.nydusd" for blob in IMAGE.blobs.iterdir()]
        for record in records:
            record.touch()
        blobs = tree.bootstrap.parent / "blobs"
        with Daemon(None, blobs) as daemon:
            assert daemon.mount("/tree", tree.bootstrap, blobs) == (204, "")
            config = json.dumps(image_config(IMAGE.blobs, cache))
            assert daemon.mount("/other", IMAGE.bootstrap, IMAGE.blobs, config=config) == (204, "")
            with standing_still(tmp_path / "still"):
                assert daemon.umount("/other") == (204, "")
                wait_until(lambda: bool(held_by_disk(descendants(daemon.pid))), "a worker to look for it", 60)
                assert not held_by_disk([daemon.pid])
                for name in NAMES:
                    assert read(daemon.mountpoint / "tree" / name) == tree.contents[name], name
            wait_until(lambda: not any(record.exists() for record in records), "the record to go", 60)


def test_stop_waits_for_no_disk_that_stands_still_if_nothing_is_to_be_done_there(tree: Tree, tmp_path: Path) -> None:
    make_ext4(tmp_path / "disk")
    with mounted(tmp_path / "disk", tmp_path / "still", "rw"), daemon_on(tree, tmp_path / "still") as daemon:
        wait_until(lambda: "chunks are in the cache" in daemon.log.read_text(), "the blob to be open", 60)
        with standing_still(tmp_path / "still"):
            daemon.stop()


def test_worker_that_a_disk_holds_is_killed_once_and_keeps_its_job_until_it_is_gone(tree: Tree, tmp_path: Path) -> None:
    """Another one would wait for the same disk."""
    make_ext4(tmp_path / "disk")
    with (
        mounted(tmp_path / "disk", tmp_path / "still", "rw"),
        daemon_on(
            tree, tmp_path / "still", decompress_workers=2, checkpoint_interval=60, worker_patience=0.5
        ) as daemon,
        ThreadPoolExecutor() as threads,
    ):
        assert read(daemon.mountpoint / NAMES[0]) == tree.contents[NAMES[0]]
        with standing_still(tmp_path / "still"):
            reading = threads.submit(read, daemon.mountpoint / NAMES[1])
            wait_until(lambda: "was killed and does not end" in daemon.log.read_text(), "a worker to be killed", 60)
            (held,) = held_by_disk(daemon.pids("decompress"))
            time.sleep(0.5)  # it is looked at four times
            said = daemon.log.read_text()
            assert said.count(f"(pid {held}) has shown no sign of life") == 1
            assert said.count("was killed and does not end") == 1
            assert held_by_disk(daemon.pids("decompress")) == [held] and not reading.done()
        assert reading.result() == tree.contents[NAMES[1]]
        assert not is_running(held)
        right(daemon, tree)
