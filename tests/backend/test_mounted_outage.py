"""A registry that is away: what its readers wait for and how long, what is asked of it, and who else notices."""

from __future__ import annotations

import errno
import json
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.discipline import wait_until
from tests.support.fault_table import ORIGIN, PAGE, SILENT, STORM, rows_of
from tests.support.faulty_server import Reply, faulty
from tests.support.mounted import AUTH, REPO, Hub, Mounted, Tree
from tests.support.registry import docker_registry

READERS = 64
NAMES = [f"{number:03}" for number in range(2 * READERS)]
PLACE = "place"
"""A folder of the image, for another image to be mounted upon."""
FAILED = "ERROR .*(blob|a read failed)"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree([*NAMES, f"{PLACE}/file"], tmp_path_factory.mktemp("image"))


@pytest.fixture
def hub(tree: Tree) -> Iterator[Hub]:
    with faulty() as server:
        yield Hub(tree, server)


class Readers:
    """Threads that read files one after the other; `found` is what came of each file that was read."""

    def __init__(self, mounted: Mounted, names: list[str], count: int) -> None:
        self.found: dict[str, bytes | int] = {}
        self._threads = [
            threading.Thread(target=self._read, args=(mounted, names[number::count])) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, mounted: Mounted, names: list[str]) -> None:
        for name in names:
            self.found[name] = mounted.read(name)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


def test_registry_that_is_stopped_under_load_and_started_again_costs_its_readers_a_delay(
    tree: Tree, tmp_path: Path
) -> None:
    """No read fails: those that meet the outage go on when the registry is there again."""
    assert rows_of(ORIGIN) == ["origin down under load, and back"]
    with docker_registry(tmp_path / "registry") as registry:
        registry.push(REPO, tree.data, tree.blob_id)
        with Mounted(tree, {"host": registry.host, "auth": None}, tuning={"fetch_workers": 4}) as mounted:
            assert mounted.is_right(NAMES[0])
            registry.stop()
            before = len(mounted.log())
            readers = Readers(mounted, NAMES, 16)
            try:
                down = rf"WARN .*{re.escape(registry.host)}: counts as down for"
                wait_until(lambda: len(re.findall(down, mounted.log())) >= 3, "the third try in vain", 30)
                assert mounted.is_right(NAMES[0]), "what is cached does not need the registry"
                assert "readers wait for the backend" in mounted.daemon.ctl("info")
                assert not [name for name, found in readers.found.items() if isinstance(found, int)]
                tried = len(re.findall(r"no connection to it .*\(attempt", mounted.log()[before:]))
            finally:
                registry.start()
                readers.join()
        assert readers.found == {name: tree.contents[name] for name in NAMES}
        assert tried <= 5 + 3 + 3, "five, one in each pause, and those under way when it was found to be down"
        said = mounted.log()[before:]
        assert mounted.line(registry.host, r"no connection to it \(Connection refused\)").search(said)
        assert re.search(rf"readers wait for the backend: blob {tree.blob_id}: {registry.host}: ", said)
        assert re.search(rf"blob {tree.blob_id}: the backend answers again", said)
        assert mounted.wrong_in_cache() == []


def test_sixty_four_readers_of_a_dead_origin_are_few_requests(
    tree: Tree, hub: Hub, expect_log: Callable[..., None]
) -> None:
    assert rows_of(STORM) == ["origin down for longer than `read_deadline`, 64 readers at once"]
    with Mounted(tree, {"host": hub.server.host}, tuning={"read_deadline": 2.0, "fetch_workers": 4}) as mounted:
        assert mounted.is_right(NAMES[0])
        expect_log(FAILED)
        hub.always = Reply(500)
        before = hub.server.count(hub.path)
        names = NAMES[1 : 1 + READERS]
        readers = Readers(mounted, names, READERS)
        readers.join()
        asked = hub.server.count(hub.path) - before
        hub.always = None
        assert set(readers.found.values()) <= {errno.EIO, errno.ETIMEDOUT}
        assert asked <= 5 + 3 + 6, "five, those under way then, and one in each pause"
        error = rf"ERROR .*blob {tree.blob_id} chunks .*{hub.server.host}.*status 500.*readers have no more time"
        assert re.search(error, mounted.log())
        for name in names:
            wait_until(partial(mounted.is_right, name), f"{name} to be readable", 30)
        assert mounted.wrong_in_cache() == []


def test_readers_of_a_blob_that_only_comes_wrong_are_few_requests(
    tree: Tree, hub: Hub, expect_log: Callable[..., None]
) -> None:
    """A server that answers, if only with a page, does not count as down; but it is left alone with this blob."""
    assert rows_of(PAGE) == ["page with status 200 for longer than `read_deadline`, 64 readers at once"]
    with Mounted(tree, {"host": hub.server.host}, tuning={"read_deadline": 2.0, "fetch_workers": 4}) as mounted:
        assert mounted.is_right(NAMES[0])
        expect_log(FAILED)
        hub.always = Reply(200, {"Content-Type": "text/html"}, b"<html>We will be back soon.</html>")
        before = hub.server.count(hub.path)
        readers = Readers(mounted, NAMES[1 : 1 + READERS], READERS)
        readers.join()
        asked = hub.server.count(hub.path) - before
        hub.always = None
        assert set(readers.found.values()) <= {errno.EIO, errno.ETIMEDOUT}
        assert asked <= 5 + 3 + 4 * 5, "five, those under way then, and one by each worker in each pause"
        wait_until(partial(mounted.is_right, NAMES[1]), "the blob to be readable", 30)
        assert mounted.wrong_in_cache() == []


def test_silent_token_server_holds_no_reader_of_another_host(
    tree: Tree, hub: Hub, tmp_path: Path, expect_log: Callable[..., None]
) -> None:
    """It accepts and says nothing, while more readers wait for it than there are workers."""
    assert rows_of(SILENT) == ["token server that accepts and says nothing"]
    expect_log(FAILED)
    inner = Tree(NAMES[:8], tmp_path / "inner")
    with faulty() as server:
        Hub(inner, server)
        registry = {"scheme": "http", "host": server.host, "repo": REPO, "auth": AUTH}
        cache = {"type": "blobcache", "filecache": {"work_dir": str(tmp_path / "cache")}}
        rafs = {"mode": "direct", "batch_size": 0}
        config = {"version": 2, "backend": {"type": "registry", "registry": registry}, "cache": cache, "rafs": rafs}
        tuning: dict[str, object] = {"read_deadline": 3.0, "fetch_workers": 4}
        with Mounted(tree, {"host": hub.server.host, "timeout": 20}, tuning=tuning) as mounted:
            assert mounted.is_right(NAMES[0])
            done = mounted.daemon.mount(f"/{PLACE}", inner.bootstrap, tmp_path, config=json.dumps(config))
            assert done == (204, "")
            hub.good.clear()
            hub.server.handlers["/token"] = lambda request: Reply(silent=True)
            before = hub.server.count("/token")
            readers = Readers(mounted, NAMES[1:17], 16)
            try:
                wait_until(lambda: hub.server.count("/token") > before, "the token server to be asked")
                for name in NAMES[:8]:
                    assert mounted.read(f"{PLACE}/{name}") == inner.contents[name]
                assert not readers.found, "all of them wait still"
            finally:
                readers.join()
            assert set(readers.found.values()) <= {errno.EIO, errno.ETIMEDOUT}
            assert hub.server.count("/token") - before <= 4
            hub.server.handlers["/token"] = hub.token
            for name in readers.found:
                wait_until(partial(mounted.is_right, name), f"{name} to be readable", 30)
