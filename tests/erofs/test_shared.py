"""One cache file of several mounts, or of one after the other: readers pass by what is said of the very file now.

A socket pair takes the place of the fanotify group; mounts are entries of the table, images segments in shared memory.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from nydusd.errors import LostWritesError, MountError
from nydusd.formats.model import ChunkFlag
from nydusd.frontends.erofs import losses, session, table
from nydusd.frontends.erofs.device import Blob
from nydusd.frontends.erofs.fanotify import Event
from nydusd.frontends.erofs.journal import _ENTRY, UNKNOWN, Journal, create
from nydusd.frontends.erofs.known import Known
from nydusd.frontends.erofs.loop import FrontEnd
from nydusd.frontends.erofs.synced import Syncs
from nydusd.frontends.erofs.table import File, Mounted, Table
from nydusd.ipc.client import Reply
from nydusd.ipc.messages import LOST, SYNC, SlotRef
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.names import remove
from nydusd.storage.state.segment import EMPTY, READY, VERIFY, Identity, Segment
from nydusd.supervisor.kernel_images import file_at
from nydusd.supervisor.kernel_table import KernelTable
from tests.support.segments import Place, make_segment, segment_name

EVENT = struct.Struct("=IBBHQii BBHIQQ")
ANSWER = struct.Struct("=iI")
PASSES, FAILS = 1, 2 | errno.EIO << 24
CHUNK, COUNT = 4096, 4
UNLISTED = int(ChunkFlag.UNLISTED)
ALL = range(COUNT)


class Line:
    """A line to a supervisor that answers as a test says."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._answers: list[Reply] = []
        self.asked: dict[int, ChunkRun] = {}
        self.flags: list[int] = []
        """Of all requests that had some."""
        self._number = 0

    def fileno(self) -> int:
        return self._fd

    def request(self, run: ChunkRun, flags: int = 0, number: int | None = None) -> int:
        self._number += 1
        self.asked[self._number] = run
        self.flags += [flags] if flags else []
        return self._number

    def answer(self, handle: int, code: int) -> None:
        """To all that was asked for by this handle."""
        for number in [number for number, run in self.asked.items() if run.blob == handle]:
            del self.asked[number]
            self._answers.append(Reply(number, code, None))

    def replies(self) -> list[Reply]:
        taken, self._answers = self._answers, []
        return taken

    def cancel(self, request: int) -> None:
        self.asked.pop(request, None)

    def pieces(self, slot: SlotRef) -> dict[int, memoryview]:
        return {}

    def release(self, slot: SlotRef) -> None: ...

    def forget_arenas(self) -> None: ...


class Kernel:
    """A blob of four chunks, the mounts that have it, and the front end that is asked about it."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        path.write_bytes(bytes(CHUNK * COUNT))
        self._path = path
        self._stack = stack
        self.memory = table.create()
        stack.callback(os.close, self.memory)
        self._ours, self._group = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._ours, self._group):
            stack.callback(end.close)
            end.setblocking(False)
        self._journal = create()
        stack.callback(os.close, self._journal)
        self._mounts: dict[int, Mounted] = {}
        self._names: dict[int, str] = {}
        self.line = Line(self._ours.fileno())
        self.front: FrontEnd | None = None
        stack.callback(self.end)

    def begin(self) -> FrontEnd:
        """A front end that succeeds the one that there is, which is killed."""
        self.end()

        def know(complain: object) -> Known:
            return Known(self.memory, self._group.fileno(), 0, lambda _text: None)

        journal = Journal(self._journal)
        self.front = FrontEnd(self._group.fileno(), journal, know, lambda: self.line, lambda: False, inherited=set())
        self.line.asked.clear()
        self.front._recover()
        return self.front

    def end(self) -> None:
        """Nothing of a front end stays."""
        if self.front is None:
            return
        for _, blob in self.front._known.files.values():
            self.front._known._forget(blob)
        for number in self.front._waiting.keys() - self.front._own_numbers:
            os.close(number)
        self.front = None

    def mount(
        self,
        index: int,
        handle: int,
        *,
        lists: Iterable[int] = ALL,
        ready: Iterable[int] = (),
        lacks: Iterable[int] = (),
        birth: int | None = 1,
    ) -> Segment:
        """A further one, by an image that lists these chunks, of which these are ready; `lacks`: what it knows nothing of."""
        name = self._names[index] = self._stack.enter_context(segment_name())
        st = self._path.stat()
        segment = self.publish(index, lists=lists, ready=ready, lacks=lacks, birth=birth)
        file = File(index << 8, "blob", handle, name, str(self._path), st.st_dev, st.st_ino, (0,), birth)
        self._mounts[index] = Mounted(index, f"/{index}", f"/mnt/{index}", "id", (file,), (f"no-{index}",))
        self._write()
        return segment

    def publish(
        self,
        index: int,
        *,
        lists: Iterable[int] = ALL,
        ready: Iterable[int] = (),
        lacks: Iterable[int] = (),
        birth: int | None = 1,
    ) -> Segment:
        """The segment of a mount, made anew."""
        st = self._path.stat()
        places = [
            Place(CHUNK * i, 0) if i in lacks else Place(CHUNK * i, CHUNK, CHUNK, 0 if i in lists else UNLISTED)
            for i in ALL
        ]
        state = bytes(READY if i in ready else EMPTY for i in ALL)
        identity = Identity(st.st_dev, st.st_ino, CHUNK * COUNT, birth or 0)
        segment = make_segment(self._names[index], places, state=state, identity=identity)
        self._stack.callback(segment.close)
        return segment

    def says(self, index: int, *, verifies: bool = False, listed: bool = False) -> None:
        """What `File` says beside of the image of this mount."""
        mounted = self._mounts[index]
        (file,) = mounted.files
        self._mounts[index] = replace(mounted, files=(replace(file, verifies=verifies, listed=listed),))
        self._write()

    def blob(self) -> Blob:
        """As the front end knows it."""
        front = self.front or self.begin()
        front._known.refresh()
        ((_, blob),) = front._known.files.values()
        return blob

    def umount(self, index: int) -> None:
        del self._mounts[index]
        remove(self._names[index])
        self._write()

    def _write(self) -> None:
        table.write(self.memory, Table(tuple(self._mounts.values())))

    def read(self, first: int, count: int = 1) -> list[int]:
        """Somebody reads these chunks: the answers at once."""
        front = self.front or self.begin()
        front._take(self.event(front, first, count))
        return self.answers()

    def event(self, front: FrontEnd, first: int, count: int = 1) -> int:
        """Have the front end's buffer hold an event of somebody who reads these chunks; gives its bytes."""
        event = os.open(self._path, os.O_RDONLY)
        packet = EVENT.pack(EVENT.size, 3, 0, 24, 0, event, 0, 6, 0, 24, 0, CHUNK * first, CHUNK * count)
        front._journal.buffer[: len(packet)] = packet
        return len(packet)

    def asked(self) -> list[ChunkRun]:
        return list(self.line.asked.values())

    def answered(self, handle: int, code: int = 0) -> list[int]:
        """The supervisor answers what was asked for by this handle: what readers get then."""
        assert self.front is not None
        self.line.answer(handle, code)
        self.front._service()
        return self.answers()

    def answers(self) -> list[int]:
        found = []
        while True:
            try:
                found.append(ANSWER.unpack(self._ours.recv(ANSWER.size))[1])
            except BlockingIOError:
                return found


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    with ExitStack() as stack:
        yield Kernel(tmp_path / "blob.data", stack)


# --- one file after the other ----------------------------------------------------------------------------------


@pytest.mark.parametrize("births", [(1, 2), (1, 1), (None, None)])
def test_what_is_known_of_a_file_says_nothing_of_the_next_one_of_its_number(
    kernel: Kernel, births: tuple[int | None, int | None]
) -> None:
    """Also if it is the same file: others may have taken something out of it while nobody had it mounted."""
    kernel.mount(1, 7, ready=ALL, birth=births[0])
    assert kernel.read(0) == [PASSES]
    kernel.umount(1)
    segment = kernel.mount(2, 9, birth=births[1])
    assert kernel.read(0) == [] and kernel.asked() == [ChunkRun(9, 0, 1)]
    segment.state[0] = READY
    assert kernel.answered(9) == [PASSES]


def test_a_mount_that_has_ended_and_is_not_forgotten_says_nothing_of_the_next_file_of_its_number(
    kernel: Kernel,
) -> None:
    kernel.mount(1, 7, ready=ALL, birth=1)
    assert kernel.read(0) == [PASSES]
    kernel.mount(2, 9, birth=2)
    assert kernel.read(0) == [] and kernel.asked() == [ChunkRun(9, 0, 1)]
    assert kernel.answered(9, errno.EIO) == [FAILS]


def test_what_is_cached_is_read_on_while_other_mounts_come_and_go(kernel: Kernel) -> None:
    """Its segment has lost its name: the cache file was deleted and made again, under the mount."""
    kernel.mount(1, 7, ready=ALL)
    assert kernel.read(0) == [PASSES]
    remove(kernel._names[1])
    kernel.mount(2, 9, lists=[])
    assert kernel.read(0) == [PASSES]
    kernel.umount(2)
    assert kernel.read(1) == [PASSES]


# --- events that are left --------------------------------------------------------------------------------------


def test_a_reader_that_is_noted_for_a_mount_that_is_gone_waits_for_what_it_needs(kernel: Kernel) -> None:
    segment = kernel.mount(1, 7)
    kernel.mount(2, 9)
    assert kernel.read(0) == [] and kernel.asked() == [ChunkRun(9, 0, 1)]
    kernel.umount(2)
    kernel.begin()
    assert kernel.answers() == [] and kernel.asked() == [ChunkRun(7, 0, 1)]
    segment.state[0] = READY
    assert kernel.answered(7) == [PASSES]


def test_the_number_of_a_mount_is_never_given_to_another_one(kernel: Kernel) -> None:
    known = KernelTable(kernel.memory)
    for index in (1, 2, 3):
        assert known.next_index() == index
        known.add(Mounted(index, f"/{index}", f"/mnt/{index}", "id", ()))
    known.forget(3)
    known.note_folder("/mnt/3")
    assert known.next_index() == 4
    assert KernelTable(kernel.memory).next_index() == 4, "nor by the next supervisor"


def test_an_event_is_noted_for_a_mount_of_any_number(kernel: Kernel) -> None:
    """A front end of an older release, which has written 32 bits, is killed, and so is one that knows 64."""
    segment = kernel.mount(1 << 40, 7)
    assert kernel.read(0) == []
    kernel.begin()
    assert kernel.answers() == [] and kernel.asked() == [ChunkRun(7, 0, 1)]
    segment.state[0] = READY
    assert kernel.answered(7) == [PASSES]
    journal = Journal(kernel._journal)
    place = journal.keep(Event(99, 0, CHUNK), UNKNOWN)
    at = place * _ENTRY.size
    assert struct.unpack_from("=iIiIQQ", journal._entries, at)[2] == -1, "as an older release reads it"
    struct.pack_into("=iIiIQQ", journal._entries, at, 99, 0, 1 << 8, 0, 0, CHUNK)
    assert [left.blob for left in Journal(kernel._journal).left] == [1 << 8]


def test_an_event_is_noted_for_its_mount_before_it_is_looked_at(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what a front end takes up needs no other image than the one it is of."""

    def is_killed(*_: object) -> None:
        raise SystemExit

    kernel.mount(300, 7)
    front = kernel.begin()
    length = kernel.event(front, 1)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Blob, "missing", is_killed)
        front._take(length)
    (left,) = Journal(kernel._journal).left
    assert (left.blob, *left.event[1:3]) == (300 << 8, CHUNK, CHUNK)
    os.close(left.event.fd)


def test_an_older_release_goes_on_with_the_table_and_drops_what_it_does_not_know(kernel: Kernel) -> None:
    kernel.mount(5, 7)
    ours = table.read(kernel.memory)
    start = 4096 + (table.revision_of(kernel.memory) & 1) * (64 << 20)
    (length,) = struct.unpack("=Q", os.pread(kernel.memory, 8, start))
    raw = json.loads(os.pread(kernel.memory, length, start + 8))
    known = {"key", "blob_id", "handle", "segment", "data", "device", "inode", "cuts"}
    assert [set(file) for mounted in raw["mounts"] for file in mounted["files"]] == [known]
    content = json.dumps({name: raw[name] for name in ("ended", "folders", "mounts")}).encode()
    os.pwrite(kernel.memory, struct.pack("=Q", len(content)) + content, start)
    (file,) = table.read(kernel.memory).mounts[0].files
    assert file.birth is None and ours.mounts[0].files[0].birth == 1
    assert KernelTable(kernel.memory).next_index() == 6


# --- marks -----------------------------------------------------------------------------------------------------


def test_a_mark_goes_though_the_next_event_is_always_there(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is cached, as after a start over a warm cache: nobody ever waits, and there is never a moment without an event."""
    kernel.mount(1, 7, ready=ALL)
    front = kernel.begin()
    unmarked: list[int] = []
    events = 0

    def read(_buffer: object) -> int:
        nonlocal events
        events += 1
        assert kernel.answers() == ([PASSES] if events > 1 else [])
        kernel.line.answer(7, 0)
        front._over = bool(unmarked) or events == 100
        return kernel.event(front, 0)

    for name in ("_LOOK", "_LOOK_SOON", "_LOOK_SHARE"):
        monkeypatch.setattr(f"nydusd.frontends.erofs.loop.{name}", 0)
    monkeypatch.setattr("nydusd.frontends.erofs.fanotify.unwatch", lambda _group, fd: unmarked.append(fd))
    monkeypatch.setattr(front._group, "read", read)
    front.run()
    assert unmarked and events < 10


# --- one file of several images --------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [False, True])
def test_what_cannot_be_had_for_the_latest_image_is_asked_for_by_another_one(kernel: Kernel, gone: bool) -> None:
    """Its image was unmounted, or its backend fails."""
    segment = kernel.mount(1, 7)
    kernel.mount(2, 9)
    assert kernel.read(1) == [] and kernel.asked() == [ChunkRun(9, 1, 1)]
    if gone:
        kernel.umount(2)
    assert kernel.answered(9, errno.EIO) == [] and kernel.asked() == [ChunkRun(7, 1, 1)]
    segment.state[1] = READY
    assert kernel.answered(7) == [PASSES]
    assert kernel.read(2) == []
    assert kernel.answered(9, errno.EIO) == []
    assert kernel.answered(7, errno.EIO) == [FAILS] and kernel.asked() == []


def test_a_chunk_is_there_if_an_image_says_so_that_lists_it(kernel: Kernel) -> None:
    lists_it = kernel.mount(1, 7)
    other = kernel.mount(2, 9, lists=[0, 1, 3], ready=[2])
    assert kernel.read(2) == [] and kernel.asked() == [ChunkRun(7, 2, 1)], "nobody has compared it with a digest"
    assert kernel.answered(7, errno.EIO) == [FAILS]
    lists_it.state[2] = READY
    assert kernel.read(2) == [PASSES]
    other.state[0] = READY
    assert kernel.read(0) == [PASSES], "both have the same digest of it"


def test_no_image_is_asked_for_chunks_that_it_does_not_list_and_another_does(kernel: Kernel) -> None:
    first = kernel.mount(1, 7, lists=[1, 2])
    second = kernel.mount(2, 9, lists=[0, 3])
    assert kernel.read(0, COUNT) == []
    assert kernel.asked() == [ChunkRun(9, 0, 1), ChunkRun(7, 1, 2), ChunkRun(9, 3, 1)]
    for chunk in (0, 3):
        second.state[chunk] = READY
    assert kernel.answered(9) == []
    for chunk in (1, 2):
        first.state[chunk] = READY
    assert kernel.answered(7) == [PASSES]
    blob = kernel.blob()
    assert blob.complete() and blob.whole(0, CHUNK * COUNT)
    first.state[2] = EMPTY
    assert not blob.complete() and not blob.whole(0, CHUNK * COUNT) and blob.whole(CHUNK * 3, CHUNK * COUNT)


@pytest.mark.parametrize("chunk", [0, 2, 3])
def test_nobody_reads_what_only_an_image_describes_of_which_nothing_is_known(kernel: Kernel, chunk: int) -> None:
    """There is no segment of it now, as while a worker replaces it."""
    others = [i for i in ALL if i != chunk]
    kernel.mount(1, 7, lacks=[chunk], ready=others)
    kernel.mount(2, 9, lacks=others)
    remove(kernel._names[2])
    blob = kernel.blob()
    assert kernel.read(chunk) == [FAILS] and kernel.read(0, COUNT) == [FAILS]
    assert not blob.whole(CHUNK * chunk, CHUNK * (chunk + 1)) and not blob.complete()
    assert all(kernel.read(other) == [PASSES] for other in others)
    assert all(blob.whole(CHUNK * other, CHUNK * (other + 1)) for other in others)
    kernel.publish(2, lacks=others)
    assert kernel.read(chunk) == [] and kernel.asked() == [ChunkRun(9, chunk, 1)]
    assert kernel.answered(9, errno.EIO) == [FAILS]


def test_a_range_is_whole_without_what_no_file_refers_to_if_that_is_known(kernel: Kernel) -> None:
    for index, handle in ((1, 7), (2, 9)):
        segment = kernel.mount(index, handle, lists=[0, 1, 2], ready=[0, 1, 2])
        kernel.says(index, listed=False)
        assert not kernel.blob().complete() and not kernel.blob().whole(0, CHUNK * COUNT)
        assert kernel.read(3) == [] and kernel.asked() == [ChunkRun(handle, 3, 1)], (
            "it may be damaged, and right all the same"
        )
        assert kernel.answered(handle, errno.EIO)[-1:] == ([FAILS] if index == 1 else [])
        kernel.says(index, listed=True)
        assert kernel.blob().complete() and kernel.blob().whole(0, CHUNK * COUNT)
        segment.state[1] = EMPTY
        assert kernel.blob().complete() == (index == 2)
        segment.state[1] = READY
    assert kernel.asked() == [ChunkRun(7, 3, 1)]
    assert kernel.answered(7, errno.EIO) == [FAILS]


def test_who_wants_digests_checked_believes_only_others_who_do(kernel: Kernel) -> None:
    checks = kernel.mount(1, 7)
    kernel.mount(2, 9, ready=ALL)
    assert kernel.read(0) == [PASSES]
    kernel.umount(2)
    kernel.mount(3, 10, ready=ALL)
    kernel.says(1, verifies=True)
    assert kernel.read(0) == [] and kernel.asked() == [ChunkRun(7, 0, 1)]
    checks.state[0] = READY
    assert kernel.answered(7) == [PASSES]


# --- lost writes -----------------------------------------------------------------------------------------------


def test_a_lost_write_is_not_forgotten_when_mounts_come_and_go(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = kernel.mount(1, 7, ready=ALL)
    assert kernel.read(0) == [PASSES]
    with monkeypatch.context() as patch:
        patch.setattr(losses, "has_lost_writes", lambda fd: True)
        assert kernel.read(0) == [] and kernel.asked() == []
    segment.syncing[0], segment.lost[0] = 1, 0  # as a worker does before it doubts
    kernel.mount(2, 9, lists=[])
    assert kernel.front is not None
    kernel.front._known.look(kernel.line.request)
    assert kernel.line.flags == [SYNC | LOST]
    assert kernel.read(1) == []
    segment.doubts[0] += 2
    assert kernel.read(1) == [PASSES]


def test_a_loss_is_heard_of_by_the_file_that_was_open_before_though_a_worker_was_told_already(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's sync has failed, and nothing is doubted yet; files that are opened from now on are not told."""
    segment = kernel.mount(1, 7, ready=ALL)
    assert kernel.read(0) == [PASSES]
    before = {int(number) for number in os.listdir("/proc/self/fd")}
    segment.syncing[0] = 1
    with monkeypatch.context() as patch:
        patch.setattr(losses, "has_lost_writes", lambda fd: fd in before)
        assert kernel.read(1) == []
    segment.doubts[0] += 2
    segment.syncing[0] = segment.lost[0] = 0
    assert kernel.read(1) == [PASSES]


def test_a_successor_relies_on_nothing_until_who_syncs_the_file_is_done(kernel: Kernel) -> None:
    segment = kernel.mount(1, 7, ready=ALL)
    segment.syncing[0] = 1
    assert kernel.read(0) == []
    segment.syncing[0] = 0
    assert kernel.read(1) == [PASSES]


def test_what_was_there_of_a_range_and_is_doubted_while_the_rest_is_fetched_is_asked_for(kernel: Kernel) -> None:
    segment = kernel.mount(1, 7, ready=[0])
    assert kernel.read(0, 2) == [] and kernel.asked() == [ChunkRun(7, 1, 1)]
    segment.state[0], segment.state[1] = VERIFY, READY
    assert kernel.answered(7) == [] and kernel.asked() == [ChunkRun(7, 0, 1)]
    segment.state[0] = READY
    assert kernel.answered(7) == [PASSES]


def test_a_sync_counts_for_nothing_while_another_one_of_the_file_may_have_heard_of_a_loss(kernel: Kernel) -> None:
    kernel.mount(1, 7, ready=ALL)
    other = kernel.mount(2, 9)
    blob = kernel.blob()
    ready = blob.look()
    other.syncing[0] = 1
    assert not blob.synced(ready)
    other.syncing[0] = 0
    assert not blob.is_stored()
    assert blob.synced(ready) and blob.is_stored()


def test_a_file_is_synced_by_another_image_where_one_is_refused(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latest was unmounted while files were open, and the supervisor is another one by now."""
    one = kernel.mount(1, 7, ready=ALL)
    two = kernel.mount(2, 9, ready=ALL)
    blob, syncs = kernel.blob(), Syncs()

    def ask() -> list[ChunkRun]:
        syncs.ask(blob, kernel.line.request)
        return kernel.asked()

    assert ask() == [ChunkRun(9, 0, 1)]
    syncs.answered(1, errno.EIO)
    assert ask() == [ChunkRun(9, 0, 1), ChunkRun(7, 0, 1)]
    syncs.answered(2, errno.EIO)
    assert len(ask()) == 2, "there is no other"
    with monkeypatch.context() as patch:
        patch.setattr(losses, "has_lost_writes", lambda fd: True)
        with pytest.raises(LostWritesError):
            blob.check()
    assert one.lost[0] == two.lost[0] == 1
    assert ask()[-1] == ChunkRun(9, 0, 1), "all of them are asked again"
    syncs.answered(3, errno.EIO)
    assert ask()[-1] == ChunkRun(7, 0, 1)
    for segment in (one, two):
        segment.lost[0] = 0
        segment.doubts[0] += 2
    blob.check()
    syncs.answered(4, 0)
    assert not blob.is_stored()
    assert ask()[-1] == ChunkRun(7, 0, 1) and kernel.line.flags[-1] == SYNC, "the other was refused"
    syncs.answered(5, 0)
    assert blob.is_stored()


# --- the file that is mounted ----------------------------------------------------------------------------------


def test_a_cache_file_that_was_made_anew_before_the_mount_is_not_mounted(tmp_path: Path) -> None:
    path = tmp_path / "blob.data"
    path.write_bytes(b"x")
    number, inode, birth = file_at(str(path))
    for other in ((number, inode + 1, birth), (number, inode, birth + 1)):
        with pytest.raises(MountError, match=r"blob\.data: it was deleted or replaced"):
            session.make(-1, "/nonexistent", [session.Range(str(path), other)], "test")
