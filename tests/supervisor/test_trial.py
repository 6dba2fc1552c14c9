"""The trial of new workers while blobs of images are not all that they could be. Old workers and new ones are played."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from nydusd.ipc.messages import Json
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.state.segment import RECORD
from nydusd.supervisor import trial
from nydusd.supervisor.children import Child
from nydusd.supervisor.mounts import Mounts
from tests.supervisor.world import CHUNKS, World

if TYPE_CHECKING:
    from nydusd.supervisor.runtime import Runtime

OLD = b"old"


class Trying:
    """A trial of two new workers, which at its begin is at the blob of an image; `asked` is what these have not done yet."""

    def __init__(self, world: World, folder: Path) -> None:
        self._world = world
        self.asked: list[tuple[bytes, Json]] = []
        prefix = f"/nydusd.{world.instance}."
        self.mounts = Mounts(folder, prefix, world.factory, world.prefetch, lambda _: None, 1)
        self.mounts.start(world.fetch, world.router)
        self.trial = trial.Trial(
            lambda identity, message: self.asked.append((identity, message)),
            {"fetch": world.fetch, "decompress": world.decompress},
            world.factory,
            cast("Runtime", SimpleNamespace(folder=str(folder), prefix=prefix, term=0)),
            self.mounts.unused.let_go,
        )
        self._steps = self.trial.run([Child(role, 0, "workers") for role in ("fetch", "decompress")])
        self.go_on()
        for identity, message in self.asked:
            content = trial.STORED if message["kind"] == "fetch" else trial.PLAIN
            (arena,) = self.trial._arenas
            arena.view(message["slot"]["offset"], len(content))[:] = content
            self.trial.answered(identity, {})
        self.asked.clear()
        self.over = self.go_on()

    def go_on(self) -> bool:
        """As far as that can be done without waiting; whether it is over."""
        return next(self._steps, "over") == "over"

    def old_one_works(self) -> list[int]:
        """An old worker does what it is asked; gives the chunks."""
        self._world.worker("decompress", OLD)
        return self._world.fill_next()

    def new_one_works(self, *, wrong: bool = False) -> None:
        """So does the new one, of which one chunk of the blob of an image is wanted, or it gives a `wrong` byte."""
        ((identity, message),) = self.asked
        (chunk,) = message["chunks"]
        if wrong:
            self.trial._arenas[-1].view(message["slot"]["offset"], 1)[:] = b"x"
        self.trial.answered(identity, {"placed": [[chunk, message["slot"]["offset"], message["slot"]["length"]]]})

    def unmount(self) -> None:
        """The image of the blob that comes first is unmounted, and the loop turns."""
        self.mounts.unused.let_go(self._world.plain)
        self.mounts.unused.collect(self._world.router, self._world.fetch)

    def is_open(self) -> bool:
        """Whether that blob is open after a turn of the loop."""
        self.mounts.unused.collect(self._world.router, self._world.fetch)
        return self._world.factory.get(self._world.plain.handle) is not None

    def close(self) -> None:
        """As an upgrade that is given up."""
        self._steps.close()
        self.trial.close()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """All blobs are open, and no worker is there."""
    made = World(monkeypatch)
    monkeypatch.setattr(trial, "time", made.clock)
    try:
        made.open_all()
        yield made
    finally:
        made.close()


@contextmanager
def begun(world: World, folder: Path) -> Iterator[Trying]:
    folder.mkdir(exist_ok=True)
    made = Trying(world, folder)
    try:
        yield made
    finally:
        made.close()
        made.mounts.close()
        made.mounts.memory.board.close()


@pytest.fixture
def trying(world: World, tmp_path: Path) -> Iterator[Trying]:
    with begun(world, tmp_path) as made:
        yield made


def test_a_blob_whose_image_is_unmounted_meanwhile_is_tried_to_the_end(trying: Trying) -> None:
    trying.unmount()
    assert trying.old_one_works() == [0]
    assert not trying.go_on()
    assert trying.is_open()
    trying.new_one_works()
    assert trying.go_on()
    assert trying.trial.note == "chunk 0 of blob plain is the same"
    assert not trying.is_open()


@pytest.mark.parametrize("asked", ["the old ones", "the new ones"])
def test_a_trial_that_is_given_up_keeps_no_blob_open_and_leaves_no_job(
    trying: Trying, world: World, asked: str
) -> None:
    trying.unmount()
    if asked == "the new ones":
        trying.old_one_works()
        assert not trying.go_on()
    trying.close()
    assert not world.decompress.queued()
    assert not trying.is_open()


def test_a_blob_that_is_opened_anew_while_old_ones_have_it_is_not_tried(trying: Trying, world: World) -> None:
    """The chunk may be of what was open before."""
    world.worker("decompress", OLD)
    world.pump()
    world.router.renew(world.plain)
    world.filled(OLD)
    assert trying.go_on()
    assert trying.trial.note == "chunk 0 of blob plain was not tried: a decompress worker failed: it was cancelled"
    assert not trying.asked


def test_new_ones_are_not_to_blame_for_a_blob_that_is_opened_anew(trying: Trying, world: World) -> None:
    trying.old_one_works()
    assert not trying.go_on()
    world.router.renew(world.plain)
    trying.new_one_works(wrong=True)
    assert trying.go_on()
    assert trying.trial.note == "chunk 0 of blob plain was not tried: the blob was opened anew meanwhile"


def test_new_ones_that_give_a_wrong_byte_are_to_blame(trying: Trying) -> None:
    trying.old_one_works()
    assert not trying.go_on()
    trying.new_one_works(wrong=True)
    with pytest.raises(trial.TrialError, match="gave other bytes for chunk 0 of blob plain"):
        trying.go_on()


def test_old_workers_that_have_no_time_for_it_are_not_waited_for(trying: Trying, world: World) -> None:
    """The queue before them is long. What they were asked is taken back, and nobody is to blame."""
    world.clock.now = trying.trial.until - 0.01
    assert not trying.go_on()
    world.clock.now = trying.trial.until
    assert trying.go_on()
    assert trying.trial.note == "chunk 0 of blob plain was not tried: the old workers had no time for it within 20 s"
    assert trying.trial.until == math.inf
    assert not world.decompress.queued()


def test_an_old_worker_that_does_not_come_to_an_end_is_not_waited_for(trying: Trying, world: World) -> None:
    """Nor does another one do it when that is killed at last."""
    world.worker("decompress", OLD)
    world.pump()
    world.clock.now = trying.trial.until
    assert trying.go_on()
    world.kill(OLD)
    assert not world.decompress.queued()


def empty(cache: BlobCache, chunk: int) -> None:
    """The blob was made with such a chunk."""
    assert cache.segment is not None
    record = cache.meta.record(chunk)._replace(usize=0, csize=0)
    RECORD.pack_into(cache.segment.records, chunk * RECORD.size, *record)


def test_what_is_tried_has_bytes_and_has_not_failed(world: World, tmp_path: Path) -> None:
    """Nothing is equal to nothing; and what kills workers would kill them again."""
    empty(world.plain, 0)
    world.plain.failed(4, errno.EIO, poison=True)
    with begun(world, tmp_path) as trying:
        assert trying.old_one_works() == [8]


def test_a_blob_is_passed_over_where_each_chunk_is_empty_or_has_failed(world: World, tmp_path: Path) -> None:
    for chunk in range(CHUNKS):
        if chunk % 2:
            empty(world.plain, chunk)
        else:
            world.plain.failed(chunk, errno.EIO, poison=True)
    world.batch.failed(1, errno.EIO, poison=True)
    with begun(world, tmp_path) as trying:
        assert trying.old_one_works() == [3, 4, 5], "the chunks of a unit are decoded together"
    for cache in world.blobs:
        for chunk in range(CHUNKS):
            cache.failed(chunk, errno.EIO)
    with begun(world, tmp_path / "again") as trying:
        assert trying.over
        assert trying.trial.note == "no blob of an image is open that could be tried"
