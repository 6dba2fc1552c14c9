"""A front end of the kernel's EROFS that has no file descriptor left: readers wait until there is one.

A socket pair takes the place of the fanotify group.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nydusd.errors import MountError, NydusError, ScarceError
from nydusd.frontends.erofs import left, loop, table
from nydusd.frontends.erofs.device import Blob
from nydusd.frontends.erofs.fanotify import open_group
from nydusd.frontends.erofs.journal import Journal, create
from nydusd.frontends.erofs.known import Known
from nydusd.frontends.erofs.session import Fds
from nydusd.frontends.erofs.table import File, Table
from nydusd.ipc.client import Reply
from nydusd.ipc.messages import SlotRef
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.lock import start_time
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


HOLDER = """
import os, sys
from setproctitle import setproctitle
setproctitle(sys.argv[1])
print("there", flush=True)
sys.stdin.read()
"""


@contextmanager
def holding(fds: Fds, title: str) -> Iterator[int]:
    """A process of that title which has them: its pid."""
    command = [sys.executable, "-c", HOLDER, title]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=fds) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        yield process.pid
        process.kill()


@pytest.fixture
def mounted() -> Iterator[Fds]:
    fds = Fds(open_group(), create(), table.create())
    yield fds
    fds.close()


def test_who_holds_what_is_mounted_and_is_not_noted_is_found_unless_that_cannot_be_told(
    tmp_path: Path, mounted: Fds
) -> None:
    path = tmp_path / "left.json"
    with holding(mounted, "nydusd: erofs 0") as copy:
        left.write(path, [], mounted, 3)
        for spare in range(4):
            with no_fd_left(os.getpid(), spare), pytest.raises(NydusError):
                left.take(path)
        found = left.take(path)
        assert found is not None and found.generation == 4
        assert [(holder.pid, holder.start) for holder in found.noted] == [(copy, start_time(copy))]
        assert [os.fstat(fd) for fd in found.fds] == [os.fstat(fd) for fd in mounted]
        found.fds.close()
        left.let_be(found.holders)
    assert left.take(path) is None, "it has ended"


def test_all_who_hold_what_is_mounted_are_ended_with_what_they_start(tmp_path: Path, mounted: Fds) -> None:
    """A copy that serves, and the guard that it has made: either may be about to start another."""
    path = tmp_path / "left.json"
    with holding(mounted, "nydusd: erofs 0") as copy, holding(mounted, "nydusd: guard") as guard:
        left.write(path, [], mounted, 3)
        found = left.take(path)
        assert found is not None
        assert {holder.pid for holder in found.noted} == {copy, guard}
        assert len(found.holders) == len(found.noted)
        found.fds.close()
        left.let_be(found.holders)


def test_a_noted_holder_that_has_just_been_killed_hides_no_other(tmp_path: Path, mounted: Fds) -> None:
    path = tmp_path / "left.json"
    with subprocess.Popen(["sleep", "60"]) as guard, holding(mounted, "nydusd: erofs 0") as copy:
        left.write(path, [guard.pid], mounted, 3)
        guard.kill()
        os.waitid(os.P_PID, guard.pid, os.WEXITED | os.WNOWAIT)  # it is not gone: nobody has asked for its status
        found = left.take(path)
        assert found is not None
        assert [holder.pid for holder in found.noted] == [copy]
        found.fds.close()
        left.let_be(found.holders)


def test_who_holds_another_journal_or_has_let_go_of_ours_is_not_found(tmp_path: Path, mounted: Fds) -> None:
    path = tmp_path / "left.json"
    others = Fds(mounted.group, create(), mounted.table)
    with holding(others, "nydusd: guard"), holding(mounted, "nydusd: supervisor"):
        left.write(path, [], mounted, 3)
        assert left.take(path) is None
        left.write(path, [], others, 3)
        boot = json.loads(path.read_text())["journal"][0]
        path.write_text(path.read_text().replace(boot, "0" * len(boot)).replace('"check"', '"unchecked"'))
        assert left.take(path) is None, "a number of before the machine was started"
    os.close(others.journal)


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
