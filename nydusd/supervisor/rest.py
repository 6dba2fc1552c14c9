"""Rest: workers that nobody needs end, and are there again when somebody does.

Part of the supervisor. A node with an image a daemon has many daemons, of which few fetch anything at a time: a worker
costs 5 MB, its start by the fork server some 10 ms. One that had no job for a while is killed: it has nothing to lose. Its
place stays, counts as a worker wherever work is divided, and is filled as soon as jobs wait and no worker is idle. While
chunks are prefetched all of them work.

Where there are other daemons, a worker needs a seat (`seats.py`): then workers begin at rest, but for the first of each role in
a takeover, rest sooner, and make room for those of a daemon that waits, also while there is something to do.

What holds after SIGKILL of the supervisor: its successor starts all workers, or as many as there are seats for.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from nydusd.errors import NydusError
from nydusd.nursery import client as nursery
from nydusd.supervisor.pool import WorkerPool

if TYPE_CHECKING:
    from nydusd.supervisor.children import Child
    from nydusd.supervisor.family import Family
    from nydusd.supervisor.seats import Seats

log = logging.getLogger(__name__)

_LOOKS = 4
"""Looks in the time after which a worker rests."""
_WITH_OTHERS = 1.0
"""Seconds after which it rests at the latest where there are other daemons."""
_AT_ONCE = 2
"""Workers that are started in a row: the supervisor waits for each; the others follow when these announce themselves."""


class Rest:
    """`seconds` without a job after which a worker ends, 0: never. `is_prefetching()`: whether all are to work."""

    def __init__(
        self,
        family: Family,
        pools: Mapping[str, WorkerPool],
        seconds: float,
        is_prefetching: Callable[[], bool],
        seats: Seats,
    ) -> None:
        self.seats = seats
        self._family = family
        self._pools = pools
        self._seconds = seconds
        self._is_prefetching = is_prefetching
        self._seen: dict[bytes, tuple[int, float]] = {}
        """Of each worker that has no job: how many it had done, and since when it has been seen like that."""
        self._next_look = 0.0
        self._first = set(pools)
        """Roles of which one worker is to begin though nothing waits for it: who starts a daemon is about to read."""
        if seconds:
            seats.join()
        family.begins_at_rest = self._begins_at_rest

    def _begins_at_rest(self, role: str) -> bool:
        """Whether a worker is started only when it has a seat.

        In a takeover the first of a role is not: like one that was killed it has the seat of a dead one, whether the nursery
        knows of that yet or not. It is counted as soon as anything is said.
        """
        if self._family.inherited and role in self._first:
            self._first.discard(role)
            return False
        return role in self._pools and self.seats.counts

    def due(self) -> list[float]:
        """When to look next (`time.monotonic()`), if ever."""
        return [self._next_look, *self.seats.due()] if self._seconds else []

    def make_room(self, now: float) -> None:
        """Before jobs are given out: let those workers end whose seats others wait for, between two jobs."""
        self.seats.hear(now)
        for role, pool in self._pools.items():
            places = self._places(role)
            wanted = self.seats.wanted_back(role, sum(not child.resting for child in places))
            if not wanted or (pool.queued() and now < self.seats.turn_ends(role, pool.reader_waits())):
                continue
            for child in places:
                # One that has just begun does something first: else there could be turns in which nothing is done.
                of_use = pool.queued() and not pool.facts(child.identity)["jobs"]
                if wanted and not child.resting and not of_use and pool.dismiss(child.identity):
                    wanted -= 1
                    self._have_rest(child)

    def tick(self, now: float) -> None:
        """Wake whom work waits for; from time to time, let those end that had none."""
        for role, pool in self._pools.items():
            if pool.resting or self.seats.counts:
                self._wake(role, pool, now)
        if self._seconds and now >= self._next_look:
            self._look(now)
        if self.seats.joined:
            self.seats.tell({role: self._have(role) for role in self._pools}, now)

    def _places(self, role: str) -> list[Child]:
        return [child for child in self._family.children if child.role == role]

    def _have(self, role: str) -> int:
        """Processes that there are, or that will be there again at once."""
        return sum(child.process is not None or not child.resting for child in self._places(role))

    def _wake(self, role: str, pool: WorkerPool, now: float) -> None:
        places = self._places(role)
        resting = [child for child in places if child.resting]
        pool.resting = len(resting)
        if not resting:
            self._first.discard(role)
        starting = sum(not child.resting and pool.job_of(child.identity) == 0 for child in places)
        needed = len(places) if self._is_prefetching() else max(pool.starved() - starting, int(role in self._first))
        needed = min(needed, len(resting))
        allowed = self.seats.allowed(role, needed, pool.reader_waits(), self._have(role), now)
        allowed = min(allowed, needed, _AT_ONCE)
        for child in resting:
            # One that has still to end is looked at again when it has: that wakes the supervisor.
            if allowed > 0 and child.process is None:
                allowed -= 1
                self.seats.begun(role)
                self._first.discard(role)
                self._next_look = min(self._next_look, now + self._patience() / _LOOKS)
                try:
                    self._family.launch(child)
                except NydusError as e:
                    log.error("%s; trying again", e)
        pool.resting = sum(child.resting for child in places)

    def _have_rest(self, child: Child) -> None:
        """End a worker that has no job, and gets none."""
        child.resting = True
        child.send(signal.SIGKILL)

    def _patience(self) -> float:
        """Seconds without a job after which a worker rests."""
        return min(self._seconds, _WITH_OTHERS) if self.seats.counts else self._seconds

    def _look(self, now: float) -> None:
        self.seats.join()
        if self.seats.was_lost:
            nursery.start_if_useful()
        seconds = self._patience()
        before, self._seen = self._seen, {}
        awake = False
        for role, pool in self._pools.items():
            places = self._places(role)
            for child in places:
                if (
                    not child.resting
                    and not self._is_prefetching()
                    and self._has_idled(child, pool, before, seconds, now)
                    and pool.dismiss(child.identity)
                ):
                    log.debug("%s has nothing to do, and rests", child.name)
                    self._have_rest(child)
            pool.resting = sum(child.resting for child in places)
            awake = awake or pool.resting < len(places)
        self._next_look = now + (seconds if awake else self._seconds) / _LOOKS

    def _has_idled(
        self, child: Child, pool: WorkerPool, before: dict[bytes, tuple[int, float]], seconds: float, now: float
    ) -> bool:
        facts = pool.facts(child.identity)
        if not facts["ready"] or facts["busy"] is not None:
            return False
        known = before.get(child.identity)
        since = known[1] if known is not None and known[0] == facts["jobs"] else now
        self._seen[child.identity] = facts["jobs"], since
        return now - since >= seconds
