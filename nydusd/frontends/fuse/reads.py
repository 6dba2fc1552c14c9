"""READ: a hit is answered at once, a miss is parked until its chunks are there. Runs in a front-end process.

Nothing here outlives it. What it has parked is in the lane's journal (`journal.py`).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable

from nydusd import points
from nydusd.errors import EvictedError, StaleCacheError, UnreadableError
from nydusd.frontends.attempt import Ask
from nydusd.ipc.inflight import InflightRow

from . import protocol as p
from .answers import Answers
from .complaints import Complaints
from .journal import Journal
from .mount import INODE_BITS
from .namespace import Namespace
from .parking import Client, Parked, Parking
from .stats import OPERATION, Tally


class Reads:
    """Answers what programs read of the files of all mounts."""

    def __init__(
        self,
        views: Namespace,
        answers: Answers,
        tally: Tally,
        complaints: Complaints,
        journal: Journal,
        connect: Callable[[], Client],
        patience: float,
        board: InflightRow | None,
    ) -> None:
        self._views = views
        self._answers = answers
        self._tally = tally
        self._complaints = complaints
        self.parking = Parking(journal, connect, patience, self._finish, board)

    def read_known(self, unique: int, node: int, offset: int, size: int) -> bool:
        """READ within a chunk of which `read` has read before. False: nothing was done, it is to be read like any other."""
        view = self._views[node >> INODE_BITS]
        shift, mount = view.chunk_shift, view.mount
        chunk = view.known.get((node, offset >> shift))
        if chunk is None or mount is None:
            return False
        started = time.monotonic_ns()
        within = offset & (1 << shift) - 1
        if within + size > chunk.length:
            size = chunk.length - within
            if chunk.length == 1 << shift or size <= 0:
                return False  # it goes on in the next chunk; one that is shorter is the file's last
        part = self._answers.parts.get(size) or self._answers.part(size)
        if not chunk.read(within, size, part[0]):
            return False
        self._answers.data_of(unique, part, size)
        if mount.device.hints:
            self.parking.hint(mount.device.hints)
        if mount.stats is not None:
            self._tally.count_read(mount.stats, chunk.ino, size, started)
        return True

    def read(self, request: memoryview, unique: int, node: int, pid: int, place: int = -1) -> None:
        """READ. A hit is answered here and now, and passes through no other process."""
        offset, size, flags = p.READ_FIELDS.unpack_from(request, p.REQUEST.size)
        view = self._views[node >> INODE_BITS]
        mount = view.mount
        if mount is None:
            self._answers.fail(unique, errno.EISDIR)
            return
        started = time.monotonic_ns()
        device, ino = mount.device, mount.ino_of(node)
        vec = mount.bootstrap.extents(ino, offset, size if size <= p.MAX_READ else p.MAX_READ)
        missing = device.missing(vec)
        if mount.trace is not None:
            mount.trace.note(ino, vec, bool(missing))
        failed: EvictedError | StaleCacheError | UnreadableError | None = None
        if not missing:
            try:
                got = device.read_into(vec, self._answers.data)
                self._answers.data_of(unique, self._answers.part(got), got)
                if device.hints:
                    self.parking.hint(device.hints)
                if mount.stats is not None:
                    self._tally.count_read(mount.stats, ino, got, started)
                if len(vec) == 1 and got < vec[0].chunk_len:
                    view.learn(node, offset)
                return
            except (EvictedError, StaleCacheError, UnreadableError) as e:
                failed = e
        if unique & p.UNIQUE_RESEND:
            self.parking.forget(unique ^ p.UNIQUE_RESEND)
        read = Parked(unique, vec, pid, bool(flags & os.O_DIRECT), mount, place, ino, started)
        self.parking.park(read, read.ask(missing) if failed is None else self._after(read, failed))

    def _finish(self, read: Parked, code: int) -> None:
        """The wait of a parked read is over: answer it, or let it wait for chunks that the cache file lost."""
        try:
            if not code and self._retry(read):
                return
        except Exception as e:
            code = self._complaints.errno_of(e, p.READ, read.ino, read.mount.name)
        if code and code not in (errno.EINTR, errno.ESTALE):
            where = read.device.describe(read.vec)
            self._complaints.log("a read failed: %s (%s)", os.strerror(code), where, subject=read.mount.name)
            read.device.count_errors(read.vec)
        if code:
            self._answers.fail(read.unique, code)
            if read.mount.stats is not None:
                self._tally.count(read.mount.stats, OPERATION[p.READ], read.ino, True)
        self.parking.let_go(read)

    def _retry(self, read: Parked) -> bool:
        """Read and answer what was fetched. True when the read is parked once more. Raises CacheError."""
        pieces = self.parking.pieces(read)
        ask = read.check(pieces)
        if ask is None:
            try:
                length = read.device.read_into(read.vec, self._answers.data, pieces or None)
            except (EvictedError, StaleCacheError, UnreadableError) as e:
                ask = self._after(read, e)
        if ask is not None:
            self.parking.again(read, ask)
            return True
        points.reach("fuse: before a miss is answered")
        self._answers.data_of(read.unique, self._answers.part(length), length)
        if read.mount.stats is not None:
            self._tally.count_read(read.mount.stats, read.ino, length, read.started)
        return False

    def _after(self, read: Parked, error: EvictedError | StaleCacheError | UnreadableError) -> Ask:
        """What to ask for after reading what was there has failed. Raises `error` when that was so too often."""
        ask = read.failed(error)
        if ask.flags:
            self._complaints.log("%s: fetching it again", error, subject=read.mount.name)
        return ask
