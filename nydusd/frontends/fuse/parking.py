"""Reads that wait for chunks: who waits for which request to the supervisor, until when, and how waiting ends.

Runs in a front-end process, driven by its loop; nothing here blocks. All of it dies with the process, but each parked read
is in the lane's journal until it is answered: after a SIGKILL the successor parks them anew.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from nydusd import points
from nydusd.errors import ScarceError
from nydusd.formats.model import Extent
from nydusd.frontends.arrived import Arrived, Source
from nydusd.frontends.attempt import LATER, Ask, Attempt
from nydusd.ipc.killed import is_killed
from nydusd.ipc.messages import AHEAD
from nydusd.storage.api.device import Pieces
from nydusd.storage.api.io import ChunkRun

from .journal import Journal
from .mount import Device, Mount

if TYPE_CHECKING:
    from nydusd.ipc.client import Reply  # loads ZeroMQ
    from nydusd.ipc.inflight import InflightRow

ASK_AGAIN = 1.0
"""Seconds after which an unanswered request is repeated: the supervisor may have been replaced, and repeating is harmless."""


class Client(Source, Protocol):
    """What the front end uses of `nydusd.ipc.client.ChunkClient`."""

    def fileno(self) -> int: ...
    def request(self, run: ChunkRun, flags: int = 0, number: int | None = None) -> int: ...
    def replies(self) -> list[Reply]: ...
    def cancel(self, request: int) -> None: ...
    def forget_arenas(self) -> None: ...


class Parked(Attempt):
    """One read that waits since `started` (monotonic ns). `direct`: the file was opened with O_DIRECT; `pid`: who reads.

    `place`: where it is in the journal; -1 while it is in the request buffer alone.
    """

    __slots__ = (
        "arrived",
        "deadline",
        "direct",
        "ino",
        "interrupted",
        "mount",
        "pending",
        "pid",
        "place",
        "repeated",
        "slot",
        "started",
        "unique",
    )

    device: Device

    def __init__(
        self, unique: int, vec: list[Extent], pid: int, direct: bool, mount: Mount, place: int, ino: int, started: int
    ) -> None:
        super().__init__(mount.device, vec)
        self.ino = ino
        self.started = started
        self.slot = -1
        self.mount = mount
        self.unique = unique
        self.pid = pid
        self.direct = direct
        self.place = place
        self.deadline = 0.0
        self.pending: dict[int, tuple[ChunkRun, int]] = {}
        """Unanswered requests: number -> (run with the supervisor's handle, flags)."""
        self.repeated: set[int] = set()
        """Requests that were sent more than once: each may be answered once more."""
        self.arrived = Arrived()
        self.interrupted = False

    def move(self, mount: Mount) -> None:
        """It is one of this mount from now on: the same metadata, perhaps other handles of the blobs."""
        self.mount = mount
        self.begin_anew(mount.device)


class Parking:
    """The parked reads of one front end. `finish(read, errno)` is called when a read's wait is over.

    `finish` may call `again` to send a read back into waiting; once it is answered it must call `let_go`.
    `complain(error)` is told that there is no file descriptor for the line to the supervisor.
    """

    def __init__(
        self,
        journal: Journal,
        connect: Callable[[], Client],
        patience: float,
        finish: Callable[[Parked, int], None],
        complain: Callable[[ScarceError], None],
        board: InflightRow | None = None,
    ) -> None:
        self._journal = journal
        self._board = board
        self._connect = connect
        self._patience = patience
        self._finish = finish
        self._complain = complain
        self._client: Client | None = None
        self.reads: dict[int, Parked] = {}
        """What is parked, by `unique`; a plain dict, because the loop asks for its emptiness before every request."""
        self._interval = min(ASK_AGAIN, patience)
        self._owners: dict[int, Parked] = {}
        self._later: dict[int, Parked] = {}
        """Those that lacked a file descriptor or memory: at `_next_try` they are tried again."""
        self._tick = self._next_try = 0.0

    @property
    def client(self) -> Client | None:
        """The line to the supervisor, made at the first miss: a front end that has all it needs never loads ZeroMQ.

        None while there is no file descriptor for it.
        """
        if self._client is None:
            try:
                self._client = self._connect()
            except ScarceError as e:
                self._complain(e)
        return self._client

    def fileno(self) -> int:
        """To be polled for input; -1 while there is no line to the supervisor."""
        return -1 if self._client is None else self._client.fileno()

    def park(self, read: Parked, ask: Ask | None) -> None:
        """Ask for what is missing and remember the read, which is tried again a moment later if there is nothing to ask for.

        A second copy of a read (after a kill) replaces the first.
        """
        self.forget(read.unique)
        if read.place < 0:
            read.place = self._journal.keep()
            points.reach("fuse: miss kept")
        now = time.monotonic()
        read.deadline = now + self._patience
        if not self.reads:
            self._tick = now + self._interval
        self.again(read, ask)
        points.reach("fuse: miss asked for")

    def hint(self, hints: list[ChunkRun]) -> None:
        """Tell the supervisor where sequential readers are; empties the list."""
        if (client := self.client) is not None:
            for run in hints:
                client.request(run, AHEAD)
        hints.clear()

    def again(self, read: Parked, ask: Ask | None) -> None:
        """What a read has got was not enough: have it wait once more, for this, or (None) until it is tried again."""
        self.reads[read.unique] = read
        read.arrived.keep(self._client, read.device, read.vec)
        if self._board is not None and read.slot < 0:
            read.slot = self._board.begin(read.unique, read.ino)
        if ask is not None:
            self._ask(read, ask)
        else:
            self._put_off(read)

    def _put_off(self, read: Parked) -> None:
        if not self._later:
            self._next_try = time.monotonic() + LATER
        self._later[read.unique] = read

    def forget(self, unique: int) -> None:
        """Give up a parked read without an answer, if there is such a one."""
        read = self.reads.get(unique)
        if read is not None:
            self._unpark(read)
            self.let_go(read)

    def interrupt(self, unique: int) -> bool:
        """The reader got a signal. False when the read is not parked here.

        A direct read ends with EINTR. A read for the page cache ends only when the signal kills: EINTR would be a SIGBUS
        to whoever faults in a mapped page, and a surprise to whoever reads a plain file (Go programs get signals all
        the time). The kernel reports one interrupt a read, so later ticks look again for a SIGKILL.
        """
        read = self.reads.get(unique)
        if read is None:
            return False
        read.interrupted = True
        self._journal.interrupted(read.place)
        self._end_if_killed(read)
        return True

    def end_all(self, device: Device, code: int) -> None:
        """End the reads of an image that is gone."""
        for read in [read for read in self.reads.values() if read.device is device]:
            self._end(read, code)

    def ask_successor(self) -> None:
        """Another supervisor has taken over, which knows of no request: send them again, at once."""
        if self._client is None:
            return
        for reply in self._client.replies():  # what it had still answered
            self._take(reply)
        for read in self.reads.values():
            self._repeat(read, self._client)
        self._client.forget_arenas()

    @staticmethod
    def _repeat(read: Parked, client: Client) -> None:
        for number, (run, flags) in read.pending.items():
            client.request(run, flags, number)
        read.repeated.update(read.pending)

    def service(self) -> float:
        """Take in the replies and what became due. Gives the seconds until it must be called again."""
        self._take_replies()
        now = time.monotonic()
        if self._later and now >= self._next_try:
            self._try_again()
        if now >= self._tick:
            self._tick = now + self._interval
            for read in list(self.reads.values()):
                if now >= read.deadline:
                    self._end(read, errno.ETIMEDOUT)
                elif not (read.interrupted and self._end_if_killed(read)) and self._client is not None:
                    self._repeat(read, self._client)
        self._take_replies()  # again: what was asked for here may hide that there are some
        return max(0.0, (min(self._tick, self._next_try) if self._later else self._tick) - now)

    def _take_replies(self) -> None:
        """Until there is none: what is asked for meanwhile may hide that another has come."""
        while self._client is not None and (replies := self._client.replies()):
            for reply in replies:
                self._take(reply)

    def _try_again(self) -> None:
        """Those that lacked something may have it now. Who does not is put off again."""
        reads, self._later = self._later, {}
        for unique, read in reads.items():
            if self.reads.get(unique) is not read:
                continue
            ask, read.unsent = read.unsent, None
            if ask is not None:
                self._ask(read, ask)
            else:
                self._end(read, 0)

    def pieces(self, read: Parked) -> Pieces:
        """The chunks of a read that came in shared memory. Drop them before `let_go`."""
        return read.arrived.pieces(self._client, read.device, read.vec)

    def let_go(self, read: Parked) -> None:
        """A read is answered: take it off the journal, give the leases of its slots back.

        What comes once more to a repeated request nobody looks for, if no other read waits: that is told last, when nothing
        of the first answer is used any more.
        """
        points.reach("fuse: miss answered")
        self._journal.drop(read.place)
        points.reach("fuse: miss dropped")
        if read.arrived.give_back(self._client):
            points.reach("fuse: slot given back")
        if self._client is not None:
            for number in read.repeated:
                self._client.cancel(number)
        read.repeated.clear()

    def _ask(self, read: Parked, ask: Ask) -> None:
        client = self.client
        if client is None:
            read.unsent = ask
            self._put_off(read)
            return
        for blob, first, count in ask.runs:
            run = ChunkRun(read.device.handle(blob), first, count)
            number = client.request(run, ask.flags)
            read.pending[number] = (run, ask.flags)
            self._owners[number] = read

    def _take(self, reply: Reply) -> None:
        read = self._owners.pop(reply.request, None)
        if read is None:
            if reply.slot is not None and self._client is not None:
                self._client.release(reply.slot)
            return
        points.reach("fuse: reply came")
        del read.pending[reply.request]
        if reply.slot is not None:
            read.arrived.add(reply.slot)
        if reply.errno:
            self._end(read, reply.errno)
        elif not read.pending:
            self._end(read, 0)
        else:
            read.arrived.keep(self._client, read.device, read.vec)

    def _end_if_killed(self, read: Parked) -> bool:
        if not (read.direct or is_killed(read.pid)):
            return False
        self._end(read, errno.EINTR)
        return True

    def _end(self, read: Parked, code: int) -> None:
        self._unpark(read)
        self._finish(read, code)

    def _unpark(self, read: Parked) -> None:
        self.reads.pop(read.unique, None)
        self._later.pop(read.unique, None)
        if self._board is not None:
            self._board.end(read.slot)
            read.slot = -1
        for number in read.pending:
            del self._owners[number]
            if self._client is not None:
                self._client.cancel(number)
        read.repeated.difference_update(read.pending)
        read.pending.clear()
