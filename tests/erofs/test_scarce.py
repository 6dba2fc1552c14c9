"""A front end of the kernel's EROFS that has no file descriptor left: readers wait until there is one.

A socket pair takes the place of the fanotify group.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Collection
from pathlib import Path

import pytest

from nydusd.errors import MountError, ScarceError
from nydusd.frontends.erofs import left, loop
from nydusd.frontends.erofs.device import Blob
from nydusd.frontends.erofs.journal import Journal, create
from nydusd.frontends.erofs.known import Known
from nydusd.frontends.erofs.session import Fds
from nydusd.frontends.erofs.table import File, Table
from nydusd.ipc.client import Reply
from nydusd.ipc.messages import SlotRef
from nydusd.storage.api.io import ChunkRun
from tests.support.scarce import no_fd_left

EVENT = struct.Struct("=IBBHQii BBHIQQ")
ANSWER = struct.Struct("=iI")
RUN = ChunkRun(7, 0, 1)
SECONDS = 60.0


class OneChunk(Blob):
    """A blob that has its chunk once that was asked for; `scarce`: how often its segment cannot be mapped."""

    def __init__(self, path: Path, scarce: int) -> None:
        st = path.stat()
        super().__init__([File(1, "blob", RUN.blob, "", str(path), st.st_dev, st.st_ino)], 0)
        self.scarce = scarce
        self.asked = 0

    def missing(self, offset: int, count: int, held: int, refused: Collection[int] = ()) -> list[ChunkRun]:
        if self.scarce:
            self.scarce -= 1
            raise ScarceError("the segment: Too many open files")
        return [] if self.asked else [RUN]

    def ready(self, run: ChunkRun) -> bool:
        return bool(self.asked)

    def hint(self, offset: int) -> ChunkRun | None:
        return RUN

    def has(self, offset: int, count: int) -> bool:
        return bool(self.asked)

    @property
    def listens(self) -> bool:
        return True

    def check(self) -> None: ...


class OneBlob(Known):
    """It is all that is mounted."""

    def __init__(self, blob: Blob) -> None:
        self.files, self.keys, self.table = {blob.file: (1, blob)}, {1: blob}, Table()

    @property
    def waits(self) -> bool:
        return False

    def refresh(self) -> bool:
        return False

    def passes(self, blob: Blob, offset: int, fd: int) -> bool:
        return False

    def look(self, send: object) -> None: ...

    def answered(self, request: int, code: int) -> bool:
        return False


class Line:
    """A line to a supervisor that fetches at once."""

    def __init__(self, fd: int, blob: OneChunk) -> None:
        self._fd = fd
        self._blob = blob
        self._answers: list[Reply] = []

    def fileno(self) -> int:
        return self._fd

    def request(self, run: ChunkRun, flags: int = 0, number: int | None = None) -> int:
        assert run == RUN
        self._blob.asked += 1
        self._answers.append(Reply(self._blob.asked, 0, None))
        return self._blob.asked

    def replies(self) -> list[Reply]:
        taken, self._answers = self._answers, []
        return taken

    def cancel(self, request: int) -> None: ...

    def pieces(self, slot: SlotRef) -> dict[int, memoryview]:
        return {}

    def release(self, slot: SlotRef) -> None: ...

    def forget_arenas(self) -> None: ...


def test_holders_of_which_it_cannot_be_told_whether_they_live_are_not_taken_for_gone(tmp_path: Path) -> None:
    """Not by what is noted, nor as they are looked at, nor as they are told from others."""
    path = tmp_path / "left.json"
    left.write(path, [os.getpid()], Fds(0, 1, 2), 3)
    noted = path.read_bytes()
    for spare in range(2):
        with no_fd_left(os.getpid(), spare), pytest.raises(ScarceError):
            left.take(path)
    with no_fd_left(os.getpid()), pytest.raises(MountError, match="start time of pid"):
        left.write(path, [os.getpid()], Fds(0, 1, 2), 4)
    assert path.read_bytes() == noted


@pytest.mark.parametrize("inherited", [False, True])
@pytest.mark.parametrize("segment", [0, 2])
def test_a_reader_waits_for_file_descriptors_and_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inherited: bool, segment: int
) -> None:
    for pause in ("ASK_AGAIN", "_REST"):
        monkeypatch.setattr(loop, pause, 0.01)
    path = tmp_path / "blob.data"
    path.write_bytes(b"x")
    blob = OneChunk(path, segment)
    lines = 0
    ours, group = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    until = time.monotonic() + SECONDS

    def connect() -> Line:
        nonlocal lines
        lines += 1
        if lines < 4:
            raise ScarceError("the line to the supervisor: Too many open files")
        return Line(ours.fileno(), blob)

    readv, refused = os.readv, [OSError(errno.EMFILE, "Too many open files")] * 2

    def read(fd: int, buffers: list[memoryview]) -> int:
        if refused:
            raise refused.pop()
        return readv(fd, buffers)

    monkeypatch.setattr(os, "readv", read)
    with ours, group:
        group.setblocking(False)
        ours.setblocking(False)
        answered = b""

        def over() -> bool:
            nonlocal answered
            try:
                answered = ours.recv(ANSWER.size)
            except BlockingIOError:
                return time.monotonic() > until
            return True

        event = os.open(path, os.O_RDONLY)
        packet = EVENT.pack(EVENT.size, 3, 0, 24, 0, event, 0, 6, 0, 24, 0, 0, 1)
        fd = create()
        journal = Journal(fd)
        if inherited:
            journal.buffer[: len(packet)] = packet
            journal = Journal(fd)
        else:
            ours.send(packet)
        os.close(fd)
        loop.FrontEnd(group.fileno(), journal, lambda _: OneBlob(blob), connect, over, inherited={event}).run()
        assert answered == ANSWER.pack(event, 1)
    assert (lines, blob.scarce) == (4, 0)
    assert inherited or not refused
