"""A daemon comes to the end of something: file descriptors, or all of its processes at once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.killing.scenes import read
from tests.support.daemon import Daemon, wait_for_role
from tests.support.discipline import detach_mount
from tests.support.mounted import Tree

NAMES = [f"{number:02}" for number in range(8)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("tree"))


def config(tree: Tree, cache: Path) -> dict[str, object]:
    backend = {"type": "localfs", "config": {"dir": str(tree.bootstrap.parent / "blobs")}}
    device = {"backend": backend, "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}}}
    return {"device": device, "mode": "direct", "amplify_io": 0, "nydusd": {"front_ends": 1, "decompress_workers": 1}}


@contextlib.contextmanager
def no_fd_left(pid: int) -> Iterator[None]:
    """A process that can open nothing more, unless it closes something."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(set(range(len(used) + 1)) - used), before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def test_worker_without_a_file_descriptor_lets_go_of_some(tree: Tree, tmp_path: Path) -> None:
    with Daemon(None, tmp_path) as daemon, contextlib.ExitStack() as limits:
        for place in ("one", "two"):
            text = json.dumps(config(tree, tmp_path / place) | {"id": f"/{place}"})
            assert daemon.mount(f"/{place}", tree.bootstrap, tmp_path, config=text) == (204, "")
            for name in NAMES:
                assert read(daemon.mountpoint / place / name) == tree.contents[name]
            if place == "one":
                workers = daemon.pids("decompress")
                for pid in workers:
                    limits.enter_context(no_fd_left(pid))
        assert "no file descriptor is left" in daemon.log.read_text()
        assert daemon.pids("decompress") == workers


def test_all_processes_killed_at_once_in_the_middle_of_reads_leave_nothing(tree: Tree, tmp_path: Path) -> None:
    """Again and again: the next daemon clears up, and after it there is nothing but the files of the blob."""
    choose = random.Random(11)
    cache = tmp_path / "cache"
    with Daemon(tree.bootstrap, tmp_path, cache=cache, config=config(tree, cache)) as daemon:
        for _ in range(2):
            wait_for_role(daemon, "decompress", 1)
            reader = threading.Thread(target=_read_some, args=(daemon, choose.sample(NAMES, len(NAMES))))
            reader.start()
            threading.Event().wait(choose.random() * 0.02)
            daemon.kill_all()
            reader.join()
            detach_mount(str(daemon.mountpoint))
            daemon.start()
        for name in NAMES:
            assert read(daemon.mountpoint / name) == tree.contents[name]
    data = f"{tree.blob_id}.blob.data"
    assert {path.name for path in cache.iterdir()} == {
        *(data, f"{data}.chunk_map", f"{data}.chunk_map.nydusd", f"{tree.blob_id}.blob.meta")
    }


def _read_some(daemon: Daemon, names: list[str]) -> None:
    with contextlib.suppress(OSError):
        for name in names:
            read(daemon.mountpoint / name)
