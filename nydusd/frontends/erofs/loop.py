"""The loop of the front end: take events of the group, let readers pass whose range is there, have the rest fetched.

One process for all mounts, for two that read one group would mix up its events. It never waits for one miss with all others.
A reader passes only after all chunks of its range are marked ready, which a worker does after the bytes are in the cache
file; for whatever goes wrong its read is refused, so it gets EIO and never a hole.

What holds after SIGKILL: the group and the journal live on in the supervisor and the guard; readers wait, and a successor
answers first what the journal has.

When no file descriptor is left for what a reader needs, it waits until there is one; the kernel refuses it at once when there
is none for its event.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import select
import time
from collections.abc import Callable

from nydusd import points
from nydusd.errors import CacheError, LostWritesError, NydusError, ScarceError, SyncingError
from nydusd.frontends.attempt import LATER
from nydusd.frontends.fuse.complaints import Complaints
from nydusd.frontends.fuse.parking import ASK_AGAIN, Client
from nydusd.ipc.inflight import InflightRow
from nydusd.ipc.messages import AHEAD, LOST
from nydusd.storage.api.io import ChunkRun

from . import fanotify
from .device import Blob, OutsideError
from .group import Group
from .journal import Journal
from .known import Known
from .waiting import Waiting

log = logging.getLogger(__name__)

_SPIN = 24
"""How often the group is asked again before the loop sleeps, as in the FUSE front end, and for the same reason."""
_ROUNDS = 4
"""How often chunks may be reported as fetched and not be there: the blob may be opened anew meanwhile."""
_LOOK = 0.5
"""Seconds between looks whether blobs are complete, while some are not."""
_LOOK_SOON, _LOOK_SHARE = 0.05, 10
"""The same after what may have made one complete, at least; and how many times as long as the last look took."""
_REST = 2.0
"""Seconds between looks whether anybody uses the file system still."""


class FrontEnd:
    """Serves the events of `group`. `inherited`: numbers of a predecessor's events that `journal.reserve` occupies.

    `make_known(complain)` gives what is mounted; `orphaned()`: whether the supervisor is gone; `alone`: it stays so, and
    what is missing cannot be fetched. A reader waits `patience` seconds at most. `board`: where it is shown meanwhile.
    `look` is called every `_REST`.
    """

    def __init__(
        self,
        group: int,
        journal: Journal,
        make_known: Callable[[Callable[[str], None]], Known],
        connect: Callable[[], Client],
        orphaned: Callable[[], bool],
        *,
        inherited: set[int],
        patience: float = 30.0,
        alone: bool = False,
        board: InflightRow | None = None,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self._journal = journal
        self._connect = connect
        self._client: Client | None = None
        self._orphaned = orphaned
        self._look = look
        self._inherited = {kept.event.fd for kept in journal.left}
        """Numbers that stand for no file here."""
        self._own_numbers = self._inherited - inherited
        self._patience = patience
        self._alone = alone
        self._board = board
        self._waiting: dict[int, Waiting] = {}
        self._owners: dict[int, Waiting] = {}
        self._complaints = Complaints("erofs")
        self._group = Group(group, self._complaints)
        self._known = make_known(lambda text: self._complaints.log("%s", text))
        self._next_ask = self._next_look = self._look_soon = self._next_rest = 0.0
        self._next_try = math.inf
        """When those are looked at again who wait for the end of a sync."""
        self._over = False

    def run(self) -> None:
        """Serve until the file system is gone. Raises OSError when the group cannot be read."""
        self._recover()
        buffer = [self._journal.buffer]
        tries = 0
        poll = select.poll()
        while not self._over:
            spins = not self._waiting and tries < _SPIN
            # However many events there are: only `_service` has marks removed, without which they never become fewer.
            if not spins or time.monotonic() >= self._next_look:
                timeout = self._service()
                if self._over:
                    return
            if spins:
                if length := self._group.read(buffer):
                    self._take(length)
                    tries = 0
                else:
                    tries += 1
                    os.sched_yield()
                continue
            poll.register(self._group.fd, 0 if self._journal.full else select.POLLIN)
            if self._client is not None:
                poll.register(self._client.fileno(), select.POLLIN)
            if any(ready == self._group.fd for ready, _ in poll.poll(math.ceil(timeout * 1000))):
                if length := self._group.read(buffer):
                    self._take(length)
                tries = 0

    def _take(self, length: int) -> None:
        """Answer the events in the first `length` bytes of the buffer, or have them wait."""
        known = self._known
        # Each mount that has asked is in the table; what has gone since may have left its file's number to another file.
        known.refresh()
        words = self._journal.words
        for event in fanotify.events(self._journal.buffer):
            try:
                st = os.fstat(event.fd)
                key, blob = known.files[st.st_dev, st.st_ino]
                words[event.word] = ~key
                if not blob.listens:
                    blob.listen(event.fd)
                runs = blob.missing(event.offset, event.length, st.st_size)
                if not runs and not known.passes(blob, event.offset, event.fd):
                    blob = known.current(blob)
                    blob.check()
                    if not blob.has(event.offset, event.length):  # it was doubted meanwhile
                        runs = blob.missing(event.offset, event.length, st.st_size)
            except (KeyError, OSError):
                self._group.refuse(
                    event.fd, errno.EIO, "an event for a file that is no cache file of an image that is mounted"
                )
                os.close(event.fd)
                continue
            except ScarceError as e:
                place = self._journal.keep(event, key)
                waiting = Waiting(event.fd, place, event.offset, event.length, [blob], self._deadline())
                self._put_off(waiting, e)
                continue
            except NydusError as e:
                self._group.refuse(event.fd, e.errno, str(e))
                os.close(event.fd)
                continue
            if not runs:
                self._group.answer(event.fd, 0)
                os.close(event.fd)
            else:
                points.reach("fanotify: event looked at")
                place = self._journal.keep(event, key)
                points.reach("fanotify: event kept")
                waiting = Waiting(event.fd, place, event.offset, event.length, [blob], self._deadline())
                self._wait(waiting, [(blob, run) for run in runs])
                points.reach("fanotify: event asked for")
            hint = blob.hint(event.offset)
            if hint is not None and not self._alone:
                with contextlib.suppress(ScarceError):
                    self._line().request(hint, AHEAD)
        self._journal.settled(length)

    def _recover(self) -> None:
        """Answer, or have wait again, what a predecessor had taken and not answered."""
        everything = [blob for _, blob in self._known.files.values()]
        for place, event, key, hopeless in self._journal.left:
            points.reach("fanotify: successor takes up an event")
            # Who has come by a mount that is gone may have come by another as well that has the same file.
            blobs = [self._known.keys[key]] if key in self._known.keys else everything
            waiting = Waiting(event.fd, place, event.offset, event.length, blobs, self._deadline())
            if hopeless or not event.length or not blobs:
                self._end(waiting, errno.EIO, "front ends die of this event: its reader is refused")
                continue
            self._look_at(waiting)

    def _look_at(self, waiting: Waiting) -> None:
        """Answer a reader for whom nothing was asked, or have fetched what it needs."""
        try:
            runs = self._needs(waiting)
        except ScarceError as e:
            self._put_off(waiting, e)
        except NydusError as e:
            self._end(waiting, e.errno, str(e))
        else:
            if runs:
                self._wait(waiting, runs)
            else:
                self._end(waiting, 0)

    def _needs(self, waiting: Waiting) -> list[tuple[Blob, ChunkRun]]:
        """What must be fetched for a reader. Where it is not known of which blob, the range of each that has it."""
        waiting.blobs = [self._known.current(blob) for blob in waiting.blobs]
        needed = []
        outside: OutsideError | None = None
        inside = False
        for blob in waiting.blobs:
            try:
                runs = blob.missing(waiting.offset, waiting.count, blob.held(), waiting.refused)
            except OutsideError as e:
                outside = e
                continue
            inside = True
            needed += [(blob, run) for run in runs]
        if not inside and outside is not None:
            raise outside
        if not needed:
            self._check_disk(waiting)
            if not self._has_all(waiting):  # it was doubted meanwhile
                return self._needs(waiting)
        return needed

    @staticmethod
    def _has_all(waiting: Waiting) -> bool:
        return all(blob.has(waiting.offset, waiting.count) for blob in waiting.blobs)

    def _check_disk(self, waiting: Waiting) -> None:
        """Raises as `Blob.check` does."""
        for blob in waiting.blobs:
            blob.check()

    # --- waiting ----------------------------------------------------------------------------------------------

    def _line(self) -> Client:
        """The line to the supervisor, made at the first miss."""
        if self._client is None:
            self._client = self._connect()
        return self._client

    def _deadline(self) -> float:
        return time.monotonic() + (0.0 if self._alone else self._patience)

    def _wait(self, waiting: Waiting, runs: list[tuple[Blob, ChunkRun]], flags: int = 0) -> None:
        """Have a reader wait until these are fetched."""
        if self._passes_alone(waiting):
            return
        self._keep(waiting, runs)
        if self._alone:
            return
        try:
            line = self._line()
        except ScarceError as e:
            self._put_off(waiting, e)
            return
        for _, run in runs:
            number = line.request(run, flags)
            waiting.pending[number] = (run, flags)
            self._owners[number] = waiting

    def _put_off(self, waiting: Waiting, error: ScarceError) -> None:
        """Have a reader wait until it is looked at again."""
        if self._passes_alone(waiting):
            return
        self._keep(waiting, [])
        if isinstance(error, SyncingError | LostWritesError):
            self._next_look = min(self._next_look, self._look_soon)  # which has it synced
        if isinstance(error, SyncingError):
            self._next_try = min(self._next_try, time.monotonic() + LATER)
        else:
            self._complaints.log("%s: who needs it waits", error)

    def _passes_alone(self, waiting: Waiting) -> bool:
        """Whether a reader passes, because what it reads is on the disk: nobody else says that any more of what is in doubt.

        Others wait meanwhile, as long as the disk takes.
        """
        if not self._alone or len(waiting.blobs) != 1:
            return False
        if not waiting.blobs[0].is_on_disk(waiting.offset, waiting.count):
            return False
        self._end(waiting, 0)
        return True

    def _keep(self, waiting: Waiting, runs: list[tuple[Blob, ChunkRun]]) -> None:
        if not self._waiting:
            self._next_ask = time.monotonic() + ASK_AGAIN
        self._waiting[waiting.number] = waiting
        waiting.runs = runs
        if self._board is not None and waiting.slot < 0:
            inode = waiting.blobs[0].file[1] if len(waiting.blobs) == 1 else 0
            waiting.slot = self._board.begin(waiting.number, inode)

    def _service(self) -> float:
        """Take in replies and what became due; gives the seconds until it must be called again."""
        self._take_replies()
        now = time.monotonic()
        if now >= self._next_try:
            self._next_try = math.inf
            for waiting in [each for each in self._waiting.values() if not each.pending]:
                self._look_at(waiting)
        if self._waiting and now >= self._next_ask:
            self._next_ask = now + ASK_AGAIN
            for waiting in list(self._waiting.values()):
                if now >= waiting.deadline:
                    self._end(waiting, errno.ETIMEDOUT, "nobody has fetched it in time")
                    continue
                if not waiting.pending:
                    self._look_at(waiting)
                    continue
                for number, (run, flags) in waiting.pending.items():
                    self._line().request(run, flags, number)
        if now >= self._next_look:
            self._known.look(None if self._alone else lambda run, flags: self._line().request(run, flags))
            took = time.monotonic() - now
            self._look_soon = now + max(_LOOK_SOON, took * _LOOK_SHARE)
            self._next_look = max(now + _LOOK, self._look_soon)
        if now >= self._next_rest:
            self._next_rest = now + _REST
            self._look_around()
        self._take_replies()  # again: what was asked for here may hide that there are some
        until = [self._next_rest, self._next_try]
        if self._known.waits:
            until.append(self._next_look)
        if self._waiting:
            until.append(self._next_ask)
        return max(0.0, min(until) - now)

    def _take_replies(self) -> None:
        """Until there is none: what is asked for meanwhile may hide that another has come."""
        while self._client is not None and (replies := self._client.replies()):
            for reply in replies:
                self._reply(reply.request, reply.errno, reply.slot is not None)
                if reply.slot is not None:
                    self._client.release(reply.slot)

    def _reply(self, request: int, code: int, in_memory: bool) -> None:
        waiting = self._owners.pop(request, None)
        if waiting is None:
            if self._known.answered(request, code):
                self._next_look = min(self._next_look, self._look_soon)
            return
        run, _ = waiting.pending.pop(request)
        if code == errno.ENOSPC or (in_memory and not code):
            self._end(waiting, errno.ENOSPC, "the cache folder cannot be used")
        elif code:
            self._ask_others(waiting, run.blob, code)
        elif not waiting.pending:
            self._check(waiting)

    def _ask_others(self, waiting: Waiting, handle: int, code: int) -> None:
        """Chunks cannot be had by this handle: its image is gone, or its backend fails. Ask by those of other images."""
        self._known.refresh()
        waiting.refused.add(handle)
        try:
            runs = self._needs(waiting)
        except ScarceError as e:
            self._cancel(waiting)
            self._put_off(waiting, e)
            return
        except NydusError:
            self._end(waiting, code, os.strerror(code))
            return
        if any(run.blob in waiting.refused for _, run in runs):
            self._end(waiting, code, os.strerror(code))
            return
        self._cancel(waiting)
        if runs:
            self._wait(waiting, runs)
        else:
            self._end(waiting, 0)

    def _cancel(self, waiting: Waiting) -> None:
        """Want nothing any more of what was asked for a reader."""
        for number in waiting.pending:
            self._owners.pop(number, None)
            self._line().cancel(number)
        waiting.pending.clear()

    def _check(self, waiting: Waiting) -> None:
        """All that was asked for has come, it is said."""
        if any(self._known.current(blob) is not blob for blob in waiting.blobs):
            self._look_at(waiting)
            return
        try:
            lost = [(blob, run) for blob, run in waiting.runs if not blob.ready(run)]
            if not lost:
                self._check_disk(waiting)
                if self._has_all(waiting):
                    self._end(waiting, 0)
                else:
                    self._look_at(waiting)  # what was there before was doubted meanwhile
            elif waiting.rounds == _ROUNDS:
                self._end(waiting, errno.EIO, f"chunks were reported as fetched, {_ROUNDS} times, and are not there")
            else:
                waiting.rounds += 1
                self._wait(waiting, lost, LOST if waiting.rounds == 2 else 0)
        except ScarceError as e:
            self._put_off(waiting, e)
        except NydusError as e:
            self._end(waiting, e.errno, str(e))

    def _end(self, waiting: Waiting, code: int, why: str = "") -> None:
        """Answer a reader that waited."""
        if code:
            self._group.refuse(waiting.number, code, why, waiting.blobs)
        else:
            points.reach("fanotify: before an answer")
            if waiting.number not in self._inherited and len(waiting.blobs) == 1:
                with contextlib.suppress(CacheError):
                    self._known.passes(waiting.blobs[0], waiting.offset, waiting.number)
            self._group.answer(waiting.number, 0)
            self._next_look = min(self._next_look, self._look_soon)
        points.reach("fanotify: answered")
        self._waiting.pop(waiting.number, None)
        self._cancel(waiting)
        if self._board is not None:
            self._board.end(waiting.slot)
            waiting.slot = -1
        self._journal.drop(waiting.place)
        points.reach("fanotify: dropped")
        # Only now may the kernel use the number again.
        self._inherited.discard(waiting.number)
        if waiting.number not in self._own_numbers:
            with contextlib.suppress(OSError):
                os.close(waiting.number)

    # --- now and then -----------------------------------------------------------------------------------------

    def _look_around(self) -> None:
        """Whether anybody uses what is mounted, and the daemon was not stopped."""
        self._known.refresh()
        known = self._known.table
        if (known.ended or self._orphaned()) and not known.alive():
            self._over = True
            return
        self._look()
        if known.ended and not self._alone:
            self._alone = True
            for waiting in list(self._waiting.values()):
                self._end(waiting, errno.EIO, "the daemon was stopped")
