"""READ: a hit is answered at once, a miss is parked until its chunks are there. Runs in a front-end process.

When no file descriptor is left for what a read needs, those of other images' blobs are given up, which are opened again when
they are read. If that is not enough, the read waits until there is one.

Nothing here outlives it. What it has parked is in the lane's journal (`journal.py`).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import NamedTuple

from nydusd import points
from nydusd.errors import (
    CacheError,
    EvictedError,
    NydusError,
    ScarceError,
    StaleCacheError,
    SyncingError,
    UnreadableError,
)
from nydusd.frontends.attempt import LATER, Ask
from nydusd.ipc.inflight import InflightRow
from nydusd.ipc.killed import is_killed

from . import protocol as p
from .answers import Answers
from .complaints import Complaints
from .journal import Journal
from .mount import INODE_BITS
from .namespace import Namespace
from .parking import Client, Parked, Parking
from .stats import OPERATION, Tally

_AGAIN = (EvictedError, ScarceError, StaleCacheError, UnreadableError)
"""Why what is said to be there may not be read all the same: it is asked for again, or tried again."""


def _lacks(error: CacheError) -> bool:
    """Whether what was lacking may be there when blobs of others are closed."""
    return isinstance(error, ScarceError) and not isinstance(error, SyncingError)


class _Unopened(NamedTuple):
    """A READ of an image that could not be opened yet; `place`: in the journal, the others as of a parked read."""

    request: bytes
    place: int
    deadline: float
    interrupted: bool = False


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
        self._journal = journal
        self._patience = patience
        self.parking = Parking(journal, connect, patience, self._finish, self._complain, board)
        self.unopened: dict[int, _Unopened] = {}
        """By `unique`, those that wait for their image to be opened."""
        self._next_try = 0.0

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
        failed: CacheError | None = None
        try:
            missing = device.missing(vec)
            if mount.trace is not None:
                mount.trace.note(ino, vec, bool(missing))
            if not missing:
                got = device.read_into(vec, self._answers.data)
                self._answers.data_of(unique, self._answers.part(got), got)
                if device.hints:
                    self.parking.hint(device.hints)
                if mount.stats is not None:
                    self._tally.count_read(mount.stats, ino, got, started)
                if len(vec) == 1 and got < vec[0].chunk_len:
                    view.learn(node, offset)
                return
        except _AGAIN as e:
            if _lacks(e) and self._views.let_go(mount):
                self.read(request, unique, node, pid, place)
                return
            failed = e
        if unique & p.UNIQUE_RESEND:
            self.parking.forget(unique ^ p.UNIQUE_RESEND)
        read = Parked(unique, vec, pid, bool(flags & os.O_DIRECT), mount, place, ino, started)
        self.parking.park(read, read.ask(missing) if failed is None else self._after(read, failed))

    def put_off(self, request: memoryview, unique: int, error: ScarceError, place: int = -1) -> None:
        """A READ of an image that cannot be opened now is tried again, until its time is over."""
        self._complain(error)
        if place < 0:
            place = self._journal.keep()
        if not self.unopened:
            self._next_try = time.monotonic() + LATER
        kept = bytes(request[: p.READ_REQUEST.size])
        self.unopened[unique] = _Unopened(kept, place, time.monotonic() + self._patience)

    def interrupt(self, unique: int) -> bool:
        """The reader got a signal, as for `Parking.interrupt`. False when the read does not wait here."""
        waiting = self.unopened.get(unique)
        if waiting is None:
            return self.parking.interrupt(unique)
        self.unopened[unique] = waiting._replace(interrupted=True)
        self._journal.interrupted(waiting.place)
        return True

    def service(self) -> float:
        """Try again what waits for an image to be opened. Gives the seconds until it must be called again."""
        now = time.monotonic()
        if self.unopened and now >= self._next_try:
            self._next_try = now + LATER
            closed: dict[int, ScarceError] = {}
            for unique, waiting in list(self.unopened.items()):
                self._try_again(unique, waiting, now, closed)
        return max(0.0, self._next_try - now) if self.unopened else LATER

    def _try_again(self, unique: int, waiting: _Unopened, now: float, closed: dict[int, ScarceError]) -> None:
        """`closed`: images that could not be opened in this round, and are not tried twice: that closes what others opened."""
        _, _, _, node, pid = p.REQUEST.unpack_from(waiting.request)
        try:
            if waiting.interrupted and is_killed(pid):
                self._answers.fail(unique, errno.EINTR)
            elif node >> INODE_BITS in closed:
                raise closed[node >> INODE_BITS]
            else:
                self.read(memoryview(waiting.request), unique, node, pid, waiting.place)
        except ScarceError as e:
            closed[node >> INODE_BITS] = e
            if now < waiting.deadline:
                return
            self._complaints.log("a read failed: %s", e)
            self._answers.fail(unique, errno.ETIMEDOUT)
        except Exception as e:
            self._answers.fail(unique, self._complaints.errno_of(e, p.READ, node, None))
        del self.unopened[unique]
        if unique not in self.parking.reads:
            self._journal.drop(waiting.place)
        elif waiting.interrupted:
            self.parking.interrupt(unique)

    def _complain(self, error: NydusError) -> None:
        self._complaints.log("%s: who needs it waits", error)

    def _finish(self, read: Parked, code: int) -> None:
        """The wait of a parked read is over: answer it, or let it wait for chunks that the cache file lost."""
        try:
            if code == errno.ESTALE and self._goes_on(read):
                self.parking.again(read, None)
                return
            if not code and self._retry(read):
                return
        except Exception as e:
            code = self._complaints.errno_of(e, p.READ, read.ino, read.mount.name)
        if code and code != errno.EINTR and (code != errno.ESTALE or self._views.knows(read.mount.index)):
            where = read.device.describe(read.vec)
            self._complaints.log("a read failed: %s (%s)", os.strerror(code), where, subject=read.mount.name)
            read.device.count_errors(read.vec)
        if code:
            self._answers.fail(read.unique, code)
            if read.mount.stats is not None:
                self._tally.count(read.mount.stats, OPERATION[p.READ], read.ino, True)
        self.parking.let_go(read)

    def _goes_on(self, read: Parked) -> bool:
        """The supervisor does not know the handle of a blob (ESTALE): whether that is because the read's is of an older table.

        An image may have been mounted anew, with the same metadata and another configuration: the read is of that one now.
        """
        mount = read.mount
        if self._views.is_current:
            if not self._views.knows(mount.index):
                return False
            try:
                mount = self._views[mount.index].mount or mount
            except ScarceError as e:
                self._complain(e)
            else:
                if mount is read.mount:
                    return False
        read.move(mount)
        return True

    def _retry(self, read: Parked) -> bool:
        """Read and answer what was fetched. True when the read is parked once more. Raises CacheError."""
        pieces = self.parking.pieces(read)
        try:
            ask = read.check(pieces)
            if ask is None:
                length = read.device.read_into(read.vec, self._answers.data, pieces or None)
        except _AGAIN as e:
            if _lacks(e) and self._views.let_go(read.mount):
                return self._retry(read)
            self.parking.again(read, self._after(read, e))
            return True
        if ask is not None:
            self.parking.again(read, ask)
            return True
        points.reach("fuse: before a miss is answered")
        self._answers.data_of(read.unique, self._answers.part(length), length)
        if read.mount.stats is not None:
            self._tally.count_read(read.mount.stats, read.ino, length, read.started)
        return False

    def _after(self, read: Parked, error: CacheError) -> Ask | None:
        """What to ask for after reading what was there has failed; None: nothing, it is to be tried again.

        Raises `error` when it has failed too often.
        """
        if isinstance(error, ScarceError):
            if not isinstance(error, SyncingError):
                self._complain(error)
            return None
        ask = read.failed(error)
        if ask.flags:
            self._complaints.log("%s: fetching it again", error, subject=read.mount.name)
        return ask
