"""A daemon comes to the end of something: file descriptors, or all of its processes at once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.killing.scene import read
from tests.supervisor.lives import IMAGE, ONE_CHUNK, config_for, read_direct
from tests.support import oracle
from tests.support.daemon import Daemon, wait_for_role
from tests.support.discipline import detach_mount, wait_until
from tests.support.mounted import Tree
from tests.support.scarce import no_fd_left

NAMES = [f"{number:02}" for number in range(8)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("tree"))


def config(tree: Tree, cache: Path) -> dict[str, object]:
    backend = {"type": "localfs", "config": {"dir": str(tree.bootstrap.parent / "blobs")}}
    device = {"backend": backend, "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}}}
    return {"device": device, "mode": "direct", "amplify_io": 0, "nydusd": {"front_ends": 1, "decompress_workers": 1}}


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


def is_ready(daemon: Daemon, role: str) -> bool:
    answer = daemon.get("/api/v1/nydusd/workers")
    assert isinstance(answer, dict)
    return all(row["state"] == "idle" for row in answer["processes"] if row["role"] == role)


def test_reader_waits_while_no_worker_has_a_file_descriptor_for_his_chunks(tree: Tree, tmp_path: Path) -> None:
    """Of what a worker has not opened yet, it has nothing to let go."""
    found: list[bytes] = []
    cache = tmp_path / "cache"
    with Daemon(tree.bootstrap, tmp_path, cache=cache, config=config(tree, cache)) as daemon:
        wait_until(lambda: is_ready(daemon, "decompress"), "the worker to have loaded what it needs", 60)
        (worker,) = daemon.pids("decompress")
        reader = threading.Thread(target=lambda: found.append(read(daemon.mountpoint / NAMES[0])))
        with no_fd_left(worker):
            reader.start()
            waits = "readers wait for file descriptors or memory"
            wait_until(lambda: waits in daemon.log.read_text(), "the reader to wait", 60)
            assert waits in daemon.ctl("info")
            assert not found
        reader.join(60)
        assert found == [tree.contents[NAMES[0]]]
        wait_until(lambda: "memory are there again" in daemon.log.read_text(), "the supervisor to see it", 60)
        assert waits not in daemon.ctl("info")
        assert daemon.log.read_text().count(waits) == 1
        assert daemon.pids("decompress") == [worker]


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


def test_a_front_end_forgets_nothing_and_leaks_nothing_when_mounts_come_and_go(tree: Tree, tmp_path: Path) -> None:
    """Beside the image of its command line, which stays as it was."""
    cache = tmp_path / "cache"
    own = config_for(IMAGE, cache, nydusd={"front_ends": 1})
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=cache, config=own) as daemon:
        (front_end,) = daemon.pids("fuse")
        truth = oracle.truth(IMAGE.name)[ONE_CHUNK.encode()]
        counts = []
        for _ in range(5):
            assert daemon.mount("/dup", tree.bootstrap, tmp_path, config=json.dumps(config(tree, cache))) == (204, "")
            for name in NAMES:
                assert read(daemon.mountpoint / "dup" / name) == tree.contents[name]
            assert read_direct(daemon.mountpoint / ONE_CHUNK) == truth
            assert daemon.umount("/dup") == (204, "")
            assert read_direct(daemon.mountpoint / ONE_CHUNK) == truth
            counts.append(len(os.listdir(f"/proc/{front_end}/fd")))
        assert counts[-1] <= counts[1], counts
        assert daemon.pids("fuse") == [front_end]


def test_front_end_without_a_file_descriptor_learns_later_what_is_mounted(
    tree: Tree, tmp_path: Path, expect_log: Callable[..., None]
) -> None:
    """Until then it does not say that there is nothing, and what it has open is read as ever."""
    expect_log("the table of mounts .* cannot be read: .*Too many open files")
    with Daemon(None, tmp_path, config=config(tree, tmp_path / "cache")) as daemon:
        (front_end,) = daemon.pids("fuse")
        assert daemon.mount("/one", tree.bootstrap, tmp_path, config=json.dumps(config(tree, tmp_path / "one"))) == (
            204,
            "",
        )
        assert read(daemon.mountpoint / "one" / NAMES[0]) == tree.contents[NAMES[0]]
        with open(daemon.mountpoint / "one" / NAMES[0], "rb", buffering=0) as kept:
            with no_fd_left(front_end):
                text = json.dumps(config(tree, tmp_path / "two"))
                assert daemon.mount("/two", tree.bootstrap, tmp_path, config=text) == (204, "")
                with pytest.raises(OSError, match="Input/output error"):
                    os.stat(daemon.mountpoint / "two")
                assert kept.read() == tree.contents[NAMES[0]]
            wait_until(lambda: os.path.isdir(daemon.mountpoint / "two"), "the second image", 60)
        assert read(daemon.mountpoint / "two" / NAMES[1]) == tree.contents[NAMES[1]]
        assert daemon.pids("fuse") == [front_end]


def test_front_end_without_a_file_descriptor_lets_go_of_other_images_blobs(tree: Tree, tmp_path: Path) -> None:
    """What it closes for the one it opens again for the other: nobody waits for anybody."""
    with Daemon(None, tmp_path, config=config(tree, tmp_path / "cache")) as daemon:
        (front_end,) = daemon.pids("fuse")
        for place in ("one", "two"):
            text = json.dumps(config(tree, tmp_path / place))
            assert daemon.mount(f"/{place}", tree.bootstrap, tmp_path, config=text) == (204, "")
            assert sorted(os.listdir(daemon.mountpoint / place)) == NAMES
        assert read(daemon.mountpoint / "one" / NAMES[0]) == tree.contents[NAMES[0]]
        with no_fd_left(front_end):
            for place in ("two", "one", "two"):
                for name in NAMES:
                    assert read(daemon.mountpoint / place / name) == tree.contents[name]
        assert daemon.pids("fuse") == [front_end]


def test_supervisor_without_a_file_descriptor_keeps_readers_waiting_and_tells_clients(
    tree: Tree, tmp_path: Path
) -> None:
    """It cannot look at a blob that a worker has opened; it can later. What is open already is read as ever."""
    found: list[bytes] = []
    with Daemon(None, tmp_path, config=config(tree, tmp_path / "cache")) as daemon:
        for place in ("one", "two"):
            text = json.dumps(config(tree, tmp_path / place))
            assert daemon.mount(f"/{place}", tree.bootstrap, tmp_path, config=text) == (204, "")
        assert read(daemon.mountpoint / "one" / NAMES[0]) == tree.contents[NAMES[0]]
        processes = {role: daemon.pids(role) for role in ("fuse", "fetch", "decompress", "api")}
        late = threading.Thread(target=lambda: found.append(read(daemon.mountpoint / "two" / NAMES[0])))
        wait_until(lambda: list((tmp_path / "two").glob("*.blob.data")) != [], "the blob to be opened there", 60)
        (data,) = (tmp_path / "two").glob("*.blob.data")
        with no_fd_left(daemon.pid):
            data.unlink()  # so that it has to be opened anew
            late.start()
            wait_until(
                lambda: "cannot be opened: shared memory" in daemon.log.read_text(),
                "the blob that cannot be opened",
                60,
            )
            assert read(daemon.mountpoint / "one" / NAMES[1]) == tree.contents[NAMES[1]]
            assert daemon.says_running()
            text = json.dumps(config(tree, tmp_path / "three"))
            status, why = daemon.mount("/three", tree.bootstrap, tmp_path, config=text)
            assert status == 204 or (status >= 500 and "files" in why), (status, why)
        late.join(60)
        assert found == [tree.contents[NAMES[0]]]
        if status != 204:
            assert daemon.mount("/three", tree.bootstrap, tmp_path, config=text) == (204, "")
        assert read(daemon.mountpoint / "three" / NAMES[2]) == tree.contents[NAMES[2]]
        assert {role: daemon.pids(role) for role in processes} == processes


def test_api_process_without_a_file_descriptor_answers_later(tree: Tree, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    answers: list[object] = []
    with Daemon(tree.bootstrap, tmp_path, cache=cache, config=config(tree, cache)) as daemon:
        (api,) = daemon.pids("api")
        client = threading.Thread(target=lambda: answers.append(daemon.get("/api/v1/daemon", seconds=60)))
        with no_fd_left(api), contextlib.ExitStack() as others:
            for _ in range(8):  # it may have closed something since
                others.enter_context(socket.socket(socket.AF_UNIX)).connect(str(daemon.apisock))
            wait_until(lambda: "cannot accept a client" in daemon.log.read_text(), "a client to be refused", 60)
            client.start()
            for name in NAMES:
                assert read(daemon.mountpoint / name) == tree.contents[name]
        client.join(60)
        (answer,) = answers
        assert isinstance(answer, dict) and answer["state"] == "RUNNING"
        assert daemon.pids("api") == [api]
