"""Blobs that no image uses any more, and what is left of those whose chunk maps somebody deletes afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from nydusd.storage.api.factory import BlobFactory
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.manager import CacheConfig
from nydusd.storage.cache.prefetch import PrefetchWorker
from nydusd.storage.cache.requests import Job
from nydusd.supervisor import unused
from nydusd.supervisor.pool import WorkerPool
from nydusd.supervisor.router import Router
from nydusd.supervisor.unused import Unused
from tests.supervisor.world import Clock, World
from tests.support.blobs import blob_info
from workers.blobs import OpenBlobs
from workers.checkpoint import forget_deleted


class Daemon:
    """What `Unused` needs of one: `mount` uses a blob, `umount` ends that, and `turn` is a turn of the loop.

    `asked` is what a worker was asked to look at and `work` has it done.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self.clock = Clock()
        patch.setattr(unused, "time", self.clock)
        self.factory = BlobFactory("unused", str(folder))
        self.asked: list[Job] = []
        self._unused = Unused(self.factory, PrefetchWorker())

    def mount(self, image: str = "image", work_dir: Path | str | None = "") -> BlobCache:
        """`work_dir`: the folder, if none is given."""
        folder = str(self._folder) if work_dir == "" else None if work_dir is None else str(work_dir)
        config = CacheConfig("localfs", {}, folder, always_verify=False)
        return self.factory.new_blob_cache(config, blob_info(chunk_count=3), image, "bootstrap", "b", extracted=False)

    def umount(self, cache: BlobCache) -> None:
        self._unused.let_go(cache)

    def turn(self) -> None:
        self._unused.collect(cast(Router, self), cast(WorkerPool, self))

    def work(self) -> None:
        job = self.asked.pop()
        job.done(job, forget_deleted(OpenBlobs(), job.payload))

    def may_close(self, _cache: BlobCache) -> bool:
        return True

    def closed(self, _cache: BlobCache) -> None:
        pass

    def submit(self, job: Job) -> None:
        self.asked.append(job)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    return Daemon(tmp_path, monkeypatch)


def stored(cache: BlobCache) -> tuple[Path, Path]:
    """A stored map and its record."""
    record = cache.spec.map_path.with_name(f"{cache.spec.map_path.name}.nydusd")
    for path in (cache.spec.map_path, record):
        path.touch()
    return cache.spec.map_path, record


def test_record_goes_whenever_its_map_is_deleted_after_the_umount(daemon: Daemon) -> None:
    cache = daemon.mount()
    stored_map, record = stored(cache)
    daemon.umount(cache)
    daemon.turn()
    daemon.work()
    assert record.exists()
    stored_map.unlink()  # after it was looked at
    daemon.turn()
    assert not daemon.asked, "a worker is not kept busy with it"
    daemon.clock.now += unused._AGAIN
    daemon.turn()
    daemon.work()
    assert not record.exists()
    daemon.clock.now += unused._AGAIN
    daemon.turn()
    assert not daemon.asked and not daemon.factory.left and daemon._unused._look_at == math.inf


def test_record_of_a_map_that_was_deleted_while_nobody_had_looked_again_goes_with_the_daemon(daemon: Daemon) -> None:
    cache = daemon.mount()
    stored_map, record = stored(cache)
    daemon.umount(cache)
    daemon.turn()
    daemon.work()
    stored_map.unlink()
    daemon.factory.close()
    assert not record.exists()


@pytest.mark.parametrize("when", ["before the look", "after it"])
def test_what_was_used_again_meanwhile_is_looked_at_as_if_for_the_first_time(daemon: Daemon, when: str) -> None:
    cache = daemon.mount()
    daemon.umount(cache)
    daemon.turn()

    def again() -> None:
        cache = daemon.mount()
        stored(cache)[0].unlink()
        daemon.umount(cache)
        daemon.turn()

    steps: list[Callable[[], None]] = [again, daemon.work] if when == "before the look" else [daemon.work, again]
    for step in steps:
        step()
    daemon.turn()
    assert [job.payload["maps"] for job in daemon.asked] == [[str(cache.spec.map_path)]]
    daemon.work()
    assert list(daemon._folder.iterdir()) == []


def test_what_is_kept_of_a_blob_in_the_run_time_folder_goes_with_its_last_user(daemon: Daemon, tmp_path: Path) -> None:
    """It is in memory, and a daemon may mount thousands of images."""
    (tmp_path / "cache").mkdir()
    one, other = (daemon.mount(image, work_dir) for image, work_dir in (("one", None), ("other", tmp_path / "cache")))
    kept = tmp_path / one.spec.meta_path.name
    for path in (kept, other.spec.meta_path):
        path.touch()
    for cache, is_left in ((one, True), (other, False)):  # the other may have found no room in its cache folder
        daemon.umount(cache)
        daemon.turn()
        assert kept.exists() is is_left
    assert other.spec.meta_path.exists()


def test_what_is_fetched_ahead_of_a_blob_whose_registry_is_not_there_ends_with_its_last_user(world: World) -> None:
    """Its job is under way at the umount, and comes back to be done again later: when there is no blob any more."""
    leaving = Unused(world.factory, world.prefetch)
    world.worker("fetch", b"f")
    world.prefetch.want(world.far, 0, 2)
    world.worker("decompress", b"w")
    world.pump()
    leaving.let_go(world.far)
    leaving.collect(world.router, world.fetch)
    world.out(b"f")
    leaving.collect(world.router, world.fetch)
    world.pump()
    world.done(b"f", {"gone": []})
    assert world.factory.get(world.far.handle) is None
    world.blobs.remove(world.far)
    world.clock.now += 60
    world.pump()
    assert world.prefetch.idle() and world.prefetch.wait(world.clock.now) is None
