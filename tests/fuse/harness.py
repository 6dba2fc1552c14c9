"""`Stage`: a real mount with real front-end processes, while the test itself plays the supervisor and the workers.

The test's thread may touch the mount only where the answer needs nobody but a front end that lives: what may wait for
a chunk is read by a `Reader`, a child process that can be killed.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import zmq

from nydusd.frontends.fuse.session import Lane, Session
from nydusd.ipc.arena import Arena
from nydusd.ipc.messages import ANSWER, ANSWER_BODY, CANCEL, NUMBER, RELEASE, REQUEST, REQUEST_BODY
from nydusd.ipc.spec import write_spec
from nydusd.storage.state.names import remove
from nydusd.storage.state.segment import EMPTY, READY, RECORD, Identity, Segment
from nydusd.supervisor.mount_table import MountTable
from tests.fuse.tree import CHUNK, Tree, sample
from tests.support.discipline import discipline, is_running, wait_until

REPO = Path(__file__).resolve().parents[2]
HANDLE = 7
SECONDS = 60.0
"""How long an event may take before the test fails."""


class Asked(NamedTuple):
    """A request of a front end for chunks."""

    who: bytes
    number: int
    first: int
    length: int
    flags: int


class Stage:
    """The mount, its cache file, its segment, its front ends. A context manager: it leaves nothing."""

    def __init__(
        self,
        folder: Path,
        *,
        lanes: int = 1,
        filled: bool = True,
        deadline: float = 30.0,
        place: str | None = "/",
        program: str = "tests.fuse.serve",
        cached: bool = True,
    ) -> None:
        """`program` are the front ends; unless `cached`, the segment is that of a blob that has no cache file."""
        self.folder = folder
        self.program = program
        self.cached = cached
        self.tree: Tree = sample()
        self.deadline = deadline
        self.name = f"/nydusd.test-{uuid.uuid4().hex[:12]}"
        self.mountpoint = folder / "mnt"
        self.mountpoint.mkdir()
        self.data = folder / "blob.data"
        self.log = discipline.log_folder / f"fuse-{self.name[13:]}.log"
        self.log.touch()
        discipline.logs.watch(self.log)
        (folder / "bootstrap").write_bytes(b"x")
        with open(self.data, "wb") as file:
            file.truncate(len(self.tree.blob))
        self.segment = self._segment()
        if filled:
            self.fill(range(self.segment.count))
        self.arena: Arena | None = None
        self._context = zmq.Context()
        self.front = f"ipc://{folder}/front"
        self._router = self._bind()
        self._seen: set[Asked] = set()
        self.cancelled: list[int] = []
        self.released: list[int] = []
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.session: Session | None = None
        self.lanes: list[Lane] = []
        self.table = MountTable(folder / "mounts", f"{self.name}.mounts")
        try:
            self.table.add((), self.image_spec())
            self.session = Session.mount(str(self.mountpoint))
            self.lanes = self.session.open_lanes(lanes)
            for index in range(lanes):
                self.start(index)
        except BaseException:
            self.close()
            raise

    def _bind(self) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        router.setsockopt(zmq.LINGER, 0)
        router.bind(self.front)
        return router

    def replace_supervisor(self) -> None:
        """What was sent and not answered is known to nobody any more."""
        self._router.close()
        self._router = self._bind()

    def replace_cache(self) -> None:
        """A new, empty cache file and a new segment take the place of the old ones."""
        self.data.unlink()
        with open(self.data, "wb") as file:
            file.truncate(len(self.tree.blob))
        self.segment.close()
        remove(self.name)
        self.segment = self._segment()

    def _segment(self) -> Segment:
        lengths = self.tree.chunk_lengths()
        records = b"".join(RECORD.pack(0, i * CHUNK, n, n, 0, 0, 0, 0) for i, n in enumerate(lengths))
        fd = os.open(self.data, os.O_RDONLY)
        identity = Identity.of(fd, len(self.tree.blob)) if self.cached else Identity(0, 0, len(self.tree.blob))
        os.close(fd)
        return Segment.create(
            self.name,
            generation=1,
            identity=identity,
            records=records,
            digests=bytes(32 * len(lengths)),
            contexts=b"",
            dict_offset=0,
            dict_size=0,
            state=bytes(len(lengths)),
        )

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.session is not None:
            self.session.unmount()
            self.session.close()
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait(SECONDS)
        discipline.logs.end(self.log)
        self._router.close()
        self._context.term()
        if self.arena is not None:
            name = self.arena.name
            self.arena.close()
            remove(name)
        self.segment.close()
        remove(self.name)
        self.table.close()
        remove(f"{self.name}.mounts")

    def image_spec(self, place: str = "/") -> dict[str, object]:
        """The sample image as the supervisor would describe it, mounted at `place`."""
        return {
            "id": place,
            "bootstrap": str(self.folder / "bootstrap"),
            "path_id": None,
            "extracted": False,
            "xattr": False,
            "blobs": [{"blob_id": "sample", "handle": HANDLE, "segment": self.name, "data": str(self.data)}],
        }

    def start(self, index: int, program: str = "", crashed: bool = False) -> subprocess.Popen[bytes]:
        """Start the front end of a lane; its predecessor must be gone."""
        assert self.session is not None
        lane = self.lanes[index]
        siblings = [other.interrupt_out for other in self.lanes if other is not lane]
        spec_fd = write_spec(
            {
                "index": index,
                "session_fd": lane.fd,
                "journal_fd": lane.journal,
                "crashed": crashed,
                "init_flags": self.session.negotiated.flags,
                "interrupt_in": lane.interrupt_in,
                "interrupt_out": siblings,
                "front": self.front,
                "read_deadline": self.deadline,
                "log": {"level": "info", "file": str(self.log)},
                "mounts": self.table.spec(),
            }
        )
        process = subprocess.Popen(
            [sys.executable, "-m", program or self.program, "--spec-fd", str(spec_fd)],
            cwd=REPO,
            pass_fds=(spec_fd, lane.fd, lane.journal, lane.interrupt_in, *siblings),
            stdin=subprocess.DEVNULL,
        )
        os.close(spec_fd)
        self.processes[index] = process
        return process

    def kill(self, index: int) -> None:
        """SIGKILL a front end, and wait until it is dead."""
        self.processes[index].kill()
        self.processes[index].wait(SECONDS)

    def fill(self, chunks: Sequence[int]) -> None:
        """What a worker does: write the chunks into the cache file, then mark them ready."""
        with open(self.data, "r+b") as file:
            for chunk in chunks:
                file.seek(chunk * CHUNK)
                file.write(self.tree.blob[chunk * CHUNK : (chunk + 1) * CHUNK])
        for chunk in chunks:
            self.segment.state[chunk] = READY

    def empty(self, chunks: Sequence[int]) -> None:
        for chunk in chunks:
            self.segment.state[chunk] = EMPTY

    def chunks_of(self, path: str) -> range:
        node = self.tree.find(path.encode())
        return range(node.first, node.first + -(-node.size // CHUNK))

    def asked(self) -> Asked:
        """The next new request of a front end. What was cancelled or released meanwhile is noted in the lists."""
        while (request := self.asked_again()) in self._seen:
            pass
        self._seen.add(request)
        return request

    def asked_again(self) -> Asked:
        """The next request, though it be a repetition: front ends repeat what is not answered within a second."""
        request = self._message(SECONDS)
        assert request is not None, f"no request within {SECONDS:g} s"
        return request

    def quiet(self) -> list[Asked]:
        """What new was asked so far and not yet taken; does not wait."""
        found = []
        while (request := self._message(0)) is not None:
            if request not in self._seen:
                self._seen.add(request)
                found.append(request)
        return found

    def _message(self, seconds: float) -> Asked | None:
        while self._router.poll(int(seconds * 1000)):
            who, kind, body = self._router.recv_multipart()
            if kind == REQUEST:
                number, handle, first, count, flags = REQUEST_BODY.unpack(body)
                assert handle == HANDLE
                return Asked(who, number, first, count, flags)
            {CANCEL: self.cancelled, RELEASE: self.released}[kind].append(NUMBER.unpack(body)[0])
        return None

    def answer(self, request: Asked, code: int = 0, slot: dict[str, object] | None = None) -> None:
        frames = [request.who, ANSWER, ANSWER_BODY.pack(request.number, code)]
        self._router.send_multipart(frames + ([json.dumps(slot).encode()] if slot else []))

    def serve(self, request: Asked) -> None:
        """Fill what was asked for, and say so."""
        self.fill(range(request.first, request.first + request.length))
        self.answer(request)

    def reader(
        self, path: str, *, offset: int = 0, size: int = 4096, direct: bool = False, drop: bool = True
    ) -> Reader:
        return Reader(self.mountpoint / path, offset=offset, size=size, direct=direct, drop=drop)


class Reader:
    """A child that reads `size` bytes at `offset` of a file; `result` gives them, or the errno as an int.

    `handled` counts on SIGUSR1, which it handles without SA_RESTART. It never touches the mount before `go`.
    """

    CODE = """
import errno, mmap, os, signal, sys
path, offset, size, flags, drop = sys.argv[1], *map(int, sys.argv[2:6])
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.siginterrupt(signal.SIGUSR1, True)
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open(path, os.O_RDONLY | flags)
buf = mmap.mmap(-1, size)
if drop: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED); os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
address = ctypes.addressof(ctypes.c_char.from_buffer(buf))
libc.pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
os.write(1, b"r")
n = libc.pread(fd, address, size, offset)
code = ctypes.get_errno()
if n < 0: sys.exit(code)
out = memoryview(bytes(buf[:n]))
while out: out = out[os.write(1, out):]
"""

    def __init__(
        self, path: Path, *, offset: int = 0, size: int = 4096, direct: bool = False, drop: bool = True
    ) -> None:
        flags = os.O_DIRECT if direct else 0
        self.process = subprocess.Popen(
            [sys.executable, "-IS", "-c", self.CODE, str(path), str(offset), str(size), str(flags), str(int(drop))],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            bufsize=0,
        )
        assert self.process.stdout is not None
        self.pipe = self.process.stdout
        assert select.select([self.pipe], [], [], SECONDS)[0], "the reader did not start"
        assert self.pipe.read(1) == b"r"

    def wait_blocked(self) -> None:
        """Until it waits for the kernel's answer."""
        names = ("request_wait_answer", "folio_wait")
        wait_until(lambda: any(name in self._wchan() for name in names), "the reader to block", SECONDS)

    def _wchan(self) -> str:
        return Path(f"/proc/{self.process.pid}/wchan").read_text()

    @property
    def done(self) -> bool:
        return not is_running(self.process.pid)

    def result(self) -> bytes | int:
        """What it read, or its errno (negative: the signal that ended it)."""
        found = b""
        while True:
            assert select.select([self.pipe], [], [], SECONDS)[0], "the reader still waits"
            piece = self.pipe.read(1 << 16)
            if not piece:
                break
            found += piece
        code = self.process.wait(SECONDS)
        self.pipe.close()
        return code if code else found

    def kill(self) -> None:
        self.process.kill()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
