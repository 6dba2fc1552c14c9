"""The disk of the cache folder does not take what the page cache has, and nobody has synced it yet: no reader gets zeros."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nydusd.storage.state.doubts import flush
from nydusd.storage.state.lost import has_lost_writes
from tests.killing.scene import read
from tests.support.disk import NO_WRITES, Disk
from tests.support.mounted import Mounted, Tree

NAMES = [f"{number:02}" for number in range(4)]
Expect = Callable[..., None]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("tree"))


def drop(path: Path) -> None:
    """Have the kernel read a file anew from the device, whatever it could not write there; nobody is told of that."""
    with open(path, "rb") as file:
        ctypes.CDLL(None).syncfs(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_flush_waits_for_the_disk_and_leaves_its_failure_to_be_told() -> None:
    """Of a sync nobody is told who opens the file after it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nydusd-k-") as folder, Disk(Path(folder)) as disk:
        path = disk.path / "file"
        path.write_bytes(bytes(1 << 20))
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
            disk.does(NO_WRITES)
            file.write(b"x" * (1 << 20))
            file.flush()
            flush(file.fileno())
            with open(path, "rb") as later:
                assert has_lost_writes(later.fileno()), "it was tried by now, and nobody was told"
                assert has_lost_writes(file.fileno())


def test_what_the_disk_did_not_take_is_read_right(tree: Tree, expect_log: Expect) -> None:
    """It is ready, in the page cache alone, and nobody would sync it for an hour. What was read before is read once more."""
    expect_log("its disk did not take all that was written: fetching it again")
    backend: dict[str, object] = {"dir": str(tree.bootstrap.parent / "blobs")}
    tuning: dict[str, object] = {"checkpoint_interval": 3600, "front_ends": 1}
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nydusd-k-") as folder,
        Disk(Path(folder), "commit=300") as disk,
    ):
        cache = disk.path / "cache"
        made = Mounted(tree, backend, kind="localfs", cache=cache, tuning=tuning)
        with made as mounted:
            files = [mounted.daemon.mountpoint / name for name in NAMES]
            for file in files * 2:
                assert read(file, direct=False) == tree.contents[file.name]
            disk.does(NO_WRITES)
            drop(cache / f"{tree.blob_id}.blob.data")
            for file in files * 2:
                assert read(file, direct=False) == tree.contents[file.name], file.name
            assert "chunks cannot be read from the cache file" in mounted.log()
