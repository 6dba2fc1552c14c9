"""Rest: workers that nobody needs end, and are there again when somebody does.

Part of the supervisor. A node with an image a daemon has many daemons, of which few fetch anything at a time: a worker
costs 5 MB, its start by the fork server some 10 ms. One that had no job for a while is killed: it has nothing to lose. Its
place stays, counts as a worker wherever work is divided, and is filled as soon as jobs wait and no worker is idle. While
chunks are prefetched all of them work.

What holds after SIGKILL of the supervisor: its successor starts all workers.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from nydusd.errors import NydusError
from nydusd.supervisor.pool import WorkerPool

if TYPE_CHECKING:
    from nydusd.supervisor.children import Child
    from nydusd.supervisor.family import Family

log = logging.getLogger(__name__)

_LOOKS = 4
"""Looks in the time after which a worker rests."""
_AT_ONCE = 2
"""Workers that are started in a row: the supervisor waits for each; the others follow when these announce themselves."""


class Rest:
    """`seconds` without a job after which a worker ends, 0: never. `is_prefetching()`: whether all are to work."""

    def __init__(
        self, family: Family, pools: Collection[WorkerPool], seconds: float, is_prefetching: Callable[[], bool]
    ) -> None:
        self._family = family
        self._pools = pools
        self._seconds = seconds
        self._is_prefetching = is_prefetching
        self._seen: dict[bytes, tuple[int, float]] = {}
        """Of each worker that has no job: how many it had done, and since when it has been seen like that."""
        self._next_look = 0.0

    def due(self) -> list[float]:
        """When to look next (`time.monotonic()`), if ever."""
        return [self._next_look] if self._seconds else []

    def tick(self, now: float) -> None:
        """Wake whom work waits for; from time to time, let those end that had none."""
        for pool in self._pools:
            if pool.resting:
                self._wake(pool)
        if self._seconds and now >= self._next_look:
            self._next_look = now + self._seconds / _LOOKS
            self._look(now)

    def _wake(self, pool: WorkerPool) -> None:
        places = [child for child in self._family.children if child.role == pool.role]
        starting = sum(not child.resting and pool.job_of(child.identity) == 0 for child in places)
        wanted = min(len(places) if self._is_prefetching() else pool.starved() - starting, _AT_ONCE)
        for child in places:
            # One that has still to end is looked at again when it has: that wakes the supervisor.
            if wanted > 0 and child.resting and child.process is None:
                wanted -= 1
                try:
                    self._family.launch(child)
                except NydusError as e:
                    log.error("%s; trying again", e)
        pool.resting = sum(child.resting for child in places)

    def _look(self, now: float) -> None:
        before, self._seen = self._seen, {}
        if self._is_prefetching():
            return
        for pool in self._pools:
            places = [child for child in self._family.children if child.role == pool.role]
            for child in places:
                if not child.resting and self._has_idled(child, pool, before, now) and pool.dismiss(child.identity):
                    log.debug("%s has nothing to do, and rests", child.name)
                    child.resting = True
                    child.send(signal.SIGKILL)
            pool.resting = sum(child.resting for child in places)

    def _has_idled(self, child: Child, pool: WorkerPool, before: dict[bytes, tuple[int, float]], now: float) -> bool:
        facts = pool.facts(child.identity)
        if not facts["ready"] or facts["busy"] is not None:
            return False
        known = before.get(child.identity)
        since = known[1] if known is not None and known[0] == facts["jobs"] else now
        self._seen[child.identity] = facts["jobs"], since
        return now - since >= self._seconds
