"""One cache file of several mounts, or of one after the other, and the front end that is asked about it.

A socket pair takes the place of the fanotify group; mounts are entries of the table, images segments in shared memory.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from nydusd.formats.model import ChunkFlag
from nydusd.frontends.erofs import table
from nydusd.frontends.erofs.device import Blob
from nydusd.frontends.erofs.journal import Journal, create
from nydusd.frontends.erofs.known import Known
from nydusd.frontends.erofs.loop import FrontEnd
from nydusd.frontends.erofs.table import File, Mounted, Table
from nydusd.ipc.client import Reply
from nydusd.ipc.messages import SlotRef
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.names import remove
from nydusd.storage.state.segment import EMPTY, READY, Identity, Segment
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
