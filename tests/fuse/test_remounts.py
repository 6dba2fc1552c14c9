"""Images that are mounted anew, or unmounted, while a front end reads them or looks them up. The test plays the supervisor."""

from __future__ import annotations

import errno
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.errors import UnmountedError
from nydusd.formats.model import Extent
from nydusd.frontends.attempt import LATER
from nydusd.frontends.fuse import namespace
from nydusd.frontends.fuse import protocol as p
from nydusd.frontends.fuse.answers import Answers
from nydusd.frontends.fuse.complaints import Complaints
from nydusd.frontends.fuse.mount import Mount
from nydusd.frontends.fuse.namespace import Namespace
from nydusd.frontends.fuse.reads import Reads
from nydusd.frontends.fuse.stats import Tally
from nydusd.ipc.client import Reply
from nydusd.ipc.messages import Json
from nydusd.ipc.shared_number import map_number
from nydusd.storage.api.io import BlobIoVec, ChunkRun
from nydusd.storage.state.names import remove
from nydusd.supervisor.mount_table import MountTable
from tests.fuse.test_dispatch import ALL_FLAGS, WholeDevice, read_in, request
from tests.fuse.test_waiting import Book, Line
from tests.fuse.tree import CHUNK, noise, sample

PLACE = (b"image",)


class Blob(WholeDevice):
    """A device whose blob has this handle, and no chunk before `come`."""

    def __init__(self, handle: int) -> None:
        super().__init__(sample())
        self._handle = handle
        self.come = False

    def handle(self, blob: int) -> int:
        return self._handle

    def runs(self, vec: list[Extent]) -> list[ChunkRun]:
        return [ChunkRun(extent.blob, extent.chunk, 1) for extent in vec]

    def missing(self, vec: BlobIoVec, again: bool = False) -> list[ChunkRun]:
        return [] if self.come else self.runs(list(vec))

    def refresh(self, vec: BlobIoVec) -> None:
        """Nothing of it changes."""

    def count_errors(self, vec: BlobIoVec) -> None:
        """They are not looked at."""


class Handles(Line):
    """Notes by which handles blobs are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[int] = []

    def request(self, run: ChunkRun, flags: int = 0, number: int | None = None) -> int:
        self.handles.append(run.blob)
        return super().request(run, flags, number)


class World:
    """A front end's reads, and a table with an image whose blob has handle 1 at first."""

    def __init__(self, folder: Path) -> None:
        self.name = f"/nydusd.remounts-{uuid.uuid4().hex[:12]}"
        self.table = MountTable(folder / "mounts", self.name)
        self.devices: list[Blob] = []
        self.shared = map_number(self.name)
        self.views = Namespace(str(folder / "mounts"), self.shared, ALL_FLAGS, self._open)
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self.line = Handles()
        complaints = Complaints("test")
        answers = Answers(self._theirs.fileno(), complaints)
        self.reads = Reads(self.views, answers, Tally(), complaints, Book(), lambda: self.line, 30.0, None)
        self.index = self.table.add(PLACE, {"handle": 1})
        self.views.reload()

    def _open(self, spec: Json, index: int) -> Mount:
        self.devices.append(Blob(spec["handle"]))
        return Mount("/image", self.devices[-1].tree, self.devices[-1], index=index)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()
        self.shared.release()
        self.table.close()
        remove(self.name)

    def read(self) -> None:
        """One reads 10 bytes of the file "third", which have to be fetched."""
        mount = self.views[self.index].mount
        assert mount is not None
        node = mount.node_of(self.devices[-1].tree.find(b"third").ino)
        packet = bytearray(request(p.READ, node, read_in(0, 10), 8))
        self.reads.read(memoryview(packet), 8, node, 0)

    def answer(self, code: int) -> None:
        """To what was asked for last."""
        self.line.answers = [Reply(self.line.asked[-1], code, None)]
        self.reads.parking.service()

    def later(self) -> None:
        time.sleep(LATER)
        self.reads.parking.service()

    def got(self) -> bytes | int | None:
        """What the reader has got, or its errno."""
        try:
            reply = self._ours.recv(4096)
        except BlockingIOError:
            return None
        return -p.OUT_HEADER.unpack_from(reply)[1] or reply[p.OUT_HEADER.size :]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("known", [True, False])
def test_a_read_whose_handle_nobody_knows_any_more_goes_on_with_that_of_the_remount(world: World, known: bool) -> None:
    """`known`: the front end has read the new table before it hears of it."""
    world.read()
    world.table.replace(PLACE, {"handle": 2}, same=True)
    if known:
        world.views.reload()
    world.answer(errno.ESTALE)
    world.views.reload()
    world.later()
    if not known:
        world.answer(errno.ESTALE)
        world.later()
    assert world.got() is None
    world.devices[-1].come = True
    world.answer(0)
    assert world.got() == noise("third", 100_000)[:10]
    assert world.line.handles == ([1, 2] if known else [1, 1, 2])


def test_a_read_of_an_image_as_it_is_mounted_fails_if_nobody_knows_its_handle(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.read()
    world.answer(errno.ESTALE)
    assert world.got() == errno.ESTALE
    assert "a read failed: Stale file handle" in caplog.text


def test_a_read_of_an_image_that_is_not_mounted_any_more_fails(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.read()
    world.table.remove(PLACE)
    world.views.reload()
    world.answer(errno.ESTALE)
    assert (world.got(), caplog.text) == (errno.ESTALE, "")


def test_an_image_that_is_mounted_anew_after_the_table_was_read_is_opened_as_it_is_now(world: World) -> None:
    for handle in (2, 3):
        world.table.replace(PLACE, {"handle": handle}, same=True)
    view = world.views[world.index]
    assert view.mount is not None and view.mount.device.handle(0) == 3
    assert world.views.reload() == []
    assert world.views[world.index] is view


def test_an_image_that_is_unmounted_after_the_table_was_read_is_not_mounted_any_more(world: World) -> None:
    world.table.remove(PLACE)
    with pytest.raises(UnmountedError):
        world.views[world.index]


def test_what_is_remembered_of_chunks_is_bounded_for_all_images_and_goes_with_what_is_closed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namespace, "_KNOWN", 3)
    views = [world.views[world.index]]
    for place in (b"two", b"three"):
        index = world.table.add((place,), {"handle": 1})
        world.views.reload()
        views.append(world.views[index])
    node = world.devices[0].tree.find(b"third").ino
    for view in views:
        for chunk in range(2):
            view.learn(node, chunk * CHUNK)
            assert sum(len(each.known) for each in views) <= 3
    assert [len(view.known) for view in views] == [0, 1, 2]
    world.views.let_go(views[2].mount)
    assert [len(view.known) for view in views] == [0, 0, 2]
