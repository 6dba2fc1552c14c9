"""Reads of the export: put together from metadata, zeros and blobs; what is missing is asked for and waited for.

Runs in the front end. All of it dies with the process: its successor begins anew what clients have asked for (`kept.py`).
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from nydusd.errors import EvictedError, NydusError, ScarceError, StaleCacheError, SyncingError, UnreadableError
from nydusd.formats.model import Extent
from nydusd.frontends.arrived import Arrived
from nydusd.frontends.attempt import LATER, Ask, Attempt
from nydusd.frontends.blobfs.device import RangeDevice
from nydusd.frontends.fuse.complaints import Complaints
from nydusd.frontends.fuse.parking import ASK_AGAIN, Client
from nydusd.ipc.inflight import InflightRow
from nydusd.ipc.messages import AHEAD
from nydusd.storage.api.device import Pieces
from nydusd.storage.api.io import ChunkRun

from . import kept
from .connection import Connection
from .layout import METADATA, NOTHING, Layout
from .protocol import Request

if TYPE_CHECKING:
    from nydusd.ipc.client import Reply  # loads ZeroMQ

log = logging.getLogger(__name__)


class _Waiting(Attempt):
    """A read: what it needs of blobs, what it has asked for, and where it is shown that it waits (`shown`)."""

    __slots__ = ("arrived", "asked", "connection", "deadline", "pending", "repeated", "shown")

    def __init__(
        self, connection: Connection, asked: Request, device: RangeDevice, vec: list[Extent], deadline: float
    ) -> None:
        super().__init__(device, vec)
        self.connection = connection
        self.asked = asked
        self.deadline = deadline
        self.shown = -1
        self.pending: dict[int, tuple[ChunkRun, int]] = {}
        self.repeated: set[int] = set()
        """Requests that were sent more than once: each may be answered once more."""
        self.arrived = Arrived()


class Reads:
    """`connect` makes the line to the supervisor, at the first miss. A read waits `patience` seconds at most.

    `board`: where it is shown meanwhile.
    """

    def __init__(
        self,
        layout: Layout,
        device: RangeDevice,
        connect: Callable[[], Client],
        patience: float,
        board: InflightRow | None = None,
    ) -> None:
        self._layout = layout
        self._device = device
        self._connect = connect
        self._patience = patience
        self._board = board
        self.client: Client | None = None
        self._waiting: dict[int, _Waiting] = {}
        self._owners: dict[int, _Waiting] = {}
        self._complaints = Complaints("nbd")
        self._tick = self._next_try = 0.0
        self._later: dict[int, _Waiting] = {}
        """Those that lacked a file descriptor or memory: at `_next_try` they are tried again."""

    def begin(self, connection: Connection, asked: Request) -> None:
        """Answer a read now, or when what it needs is there."""
        connection.reserve(asked.length)
        vec: list[Extent] = []
        for piece in self._layout.pieces(asked.offset, asked.length):
            if piece.blob >= 0:
                vec += self._device.extents(piece.blob, piece.start, piece.length)
        waiting = _Waiting(connection, asked, self._device, vec, time.monotonic() + self._patience)
        self._proceed(waiting, first=True)

    def _put_off(self, waiting: _Waiting, error: ScarceError) -> None:
        """Try a read again a moment later: a file descriptor may be free then."""
        if not isinstance(error, SyncingError):
            self._complaints.log("%s: who needs it waits", error)
        if not self._later:
            self._next_try = time.monotonic() + LATER
        self._later[id(waiting)] = waiting
        self._wait(waiting)

    def _wait(self, waiting: _Waiting) -> None:
        if not self._waiting:
            self._tick = time.monotonic() + ASK_AGAIN
        self._waiting[id(waiting)] = waiting
        waiting.arrived.keep(self.client, self._device, waiting.vec)
        if self._board is not None and waiting.shown < 0:
            unique = waiting.connection.number * kept.SLOTS + waiting.asked.slot
            waiting.shown = self._board.begin(unique, 0)  # a disk has no inodes

    def _try_again(self) -> None:
        reads, self._later = self._later, {}
        for waiting in reads.values():
            ask, waiting.unsent = waiting.unsent, None
            if ask is None:
                self._proceed(waiting)
                continue
            try:
                self._ask(waiting, ask)
            except ScarceError as e:
                self._put_off(waiting, e)

    def _proceed(self, waiting: _Waiting, first: bool = False) -> None:
        """Ask for what a read lacks, or answer it."""
        pieces = waiting.arrived.pieces(self.client, self._device, waiting.vec)
        try:
            if first:
                missing = self._device.missing(waiting.vec)
                ask = waiting.ask(missing) if missing else None
            else:
                ask = waiting.check(pieces)
            if ask is None:
                try:
                    self._finish(waiting, 0, self._put_together(waiting, pieces))
                except (EvictedError, StaleCacheError, UnreadableError) as e:
                    ask = waiting.failed(e)
                    if ask.flags:
                        self._complaints.log("%s: fetching it again", e)
            if ask is not None:
                self._ask(waiting, ask)
        except ScarceError as e:
            self._put_off(waiting, e)
        except NydusError as e:
            self._fail(waiting, e.errno, str(e))
        if self._device.hints and self.client is not None:
            for run in self._device.hints:
                self.client.request(run, AHEAD)
        self._device.hints.clear()

    def _put_together(self, waiting: _Waiting, pieces: Pieces) -> memoryview:
        """The answer. `missing` has just said that all of it is there, and no other look may come between: it would hide that
        something was taken away since. Raises StaleCacheError, EvictedError, UnreadableError.
        """
        out = memoryview(bytearray(waiting.asked.length))
        at = 0
        for blob, start, length in self._layout.pieces(waiting.asked.offset, waiting.asked.length):
            if blob == METADATA:
                out[at : at + length] = self._layout.metadata[start : start + length]
            elif blob != NOTHING:
                vec = self._device.cut(blob, start, length)
                self._device.read_into(vec, out[at : at + length], pieces or None)
            at += length
        return out

    def _ask(self, waiting: _Waiting, ask: Ask) -> None:
        """Raises ScarceError when there is no line to the supervisor and none can be made now: then this is `unsent`."""
        if self.client is None:
            waiting.unsent = ask
            self.client = self._connect()
            waiting.unsent = None
        self._wait(waiting)
        for blob, first, count in ask.runs:
            run = ChunkRun(self._device.handle(blob), first, count)
            number = self.client.request(run, ask.flags)
            waiting.pending[number] = (run, ask.flags)
            self._owners[number] = waiting

    def service(self) -> float | None:
        """Take in replies and what became due; gives the seconds until it must be called again, None for never."""
        self._take_replies()
        now = time.monotonic()
        if self._later and now >= self._next_try:
            self._try_again()
        if now >= self._tick:
            self._tick = now + ASK_AGAIN
            for waiting in list(self._waiting.values()):
                if waiting.connection.closed:
                    self._drop(waiting)
                elif now >= waiting.deadline:
                    self._fail(waiting, errno.ETIMEDOUT, "nobody has fetched it in time")
                elif self.client is not None:
                    for number, (run, flags) in waiting.pending.items():
                        self.client.request(run, flags, number)
                    waiting.repeated.update(waiting.pending)
        self._take_replies()  # again: what was asked for here may hide that there are some
        if not self._waiting:
            return None
        return max(0.0, (min(self._tick, self._next_try) if self._later else self._tick) - now)

    def _take_replies(self) -> None:
        """Until there is none: what is asked for meanwhile may hide that another has come."""
        while self.client is not None and (replies := self.client.replies()):
            for reply in replies:
                self._take(reply, self.client)

    def _take(self, reply: Reply, client: Client) -> None:
        waiting = self._owners.pop(reply.request, None)
        if waiting is None:
            if reply.slot is not None:
                client.release(reply.slot)
            return
        del waiting.pending[reply.request]
        if reply.slot is not None:
            waiting.arrived.add(reply.slot)
        if reply.errno:
            self._fail(waiting, reply.errno, os.strerror(reply.errno))
        elif not waiting.pending:
            del self._waiting[id(waiting)]
            self._proceed(waiting)
        else:
            waiting.arrived.keep(client, self._device, waiting.vec)

    def _fail(self, waiting: _Waiting, code: int, why: str) -> None:
        self._device.count_errors(waiting.vec)
        self._complaints.log("a read of %d bytes at %d failed: %s", waiting.asked.length, waiting.asked.offset, why)
        self._finish(waiting, code, None)

    def _finish(self, waiting: _Waiting, code: int, data: memoryview | None) -> None:
        self._drop(waiting)
        if not waiting.connection.closed:
            waiting.connection.answer(waiting.asked, code, data)

    def _drop(self, waiting: _Waiting) -> None:
        """Nothing is to be done for a read any more."""
        self._waiting.pop(id(waiting), None)
        if self._board is not None:
            self._board.end(waiting.shown)
            waiting.shown = -1
        self._later.pop(id(waiting), None)
        if self.client is not None:
            for number in waiting.pending:
                self._owners.pop(number, None)
                self.client.cancel(number)
            # What comes once more to a repeated request is of no use; told last, when nothing of the first answer is used.
            waiting.arrived.give_back(self.client)
            for number in waiting.repeated.difference(waiting.pending):
                self.client.cancel(number)
        waiting.pending.clear()
        waiting.repeated.clear()
