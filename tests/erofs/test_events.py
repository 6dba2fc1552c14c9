"""Events of readers that a front end leaves to the next one, the numbers of mounts that they are noted by, and marks."""

from __future__ import annotations

import json
import os
import struct

import pytest

from nydusd.frontends.erofs import table
from nydusd.frontends.erofs.device import Blob
from nydusd.frontends.erofs.fanotify import Event
from nydusd.frontends.erofs.journal import _ENTRY, UNKNOWN, Journal
from nydusd.frontends.erofs.table import Mounted
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.segment import READY
from nydusd.supervisor.kernel_table import KernelTable
from tests.erofs.shared_file import ALL, CHUNK, PASSES, Kernel


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
