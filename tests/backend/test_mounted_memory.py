"""A /dev/shm that is smaller than arenas may be, as in a container: readers wait for each other, and nothing fails for it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.support.discipline import wait_until
from tests.support.faulty_server import Reply, Request, faulty
from tests.support.mounted import CHUNK, Hub, Mounted, Tree
from tests.support.scarce import shared_memory_left

NAMES = [f"{number:02}" for number in range(64)]


@pytest.mark.parametrize("cached", [True, False], ids=["file cache", "no cache"])
def test_readers_of_more_than_shared_memory_holds_wait_for_each_other(tmp_path: Path, cached: bool) -> None:
    tree = Tree([*NAMES, "first", "place/file"], tmp_path)
    found: dict[str, bytes | int] = {}
    with faulty() as server:
        hub, gate = Hub(tree, server), threading.Event()

        def part_in_time(request: Request) -> Reply:
            gate.wait()
            return hub.part(request)

        tuning: dict[str, object] = {"fetch_workers": 2}
        with Mounted(tree, {"host": server.host}, tuning=tuning, cached=cached) as mounted:

            def read(name: str) -> None:
                found[name] = mounted.read(name)

            def waiting() -> int:
                load = mounted.daemon.get("/api/v1/nydusd/load")
                assert isinstance(load, dict)
                return int(load["waiting"])

            assert mounted.is_right("first")
            hub.always = part_in_time
            with shared_memory_left(10 * CHUNK):
                readers = [threading.Thread(target=read, args=(name,)) for name in NAMES]
                for reader in readers:
                    reader.start()
                try:
                    wait_until(lambda: waiting() + len(found) == len(NAMES), "all of them to wait", 60)
                finally:
                    gate.set()
                    for reader in readers:
                        reader.join()
                (blobs := tmp_path / "blobs").mkdir()
                (blobs / tree.blob_id).write_bytes(tree.data)
                assert mounted.daemon.mount("/place", tree.bootstrap, blobs)[0] == 204, (
                    "the state of a blob has no room"
                )
                assert mounted.is_right("place/first", "first")
    assert found == {name: tree.contents[name] for name in NAMES}
