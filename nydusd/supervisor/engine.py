"""Engine: what serves requests, from the moment that the sockets are bound: pools of workers, the router, room, quota, rest.

Part of the supervisor. It is all there or not at all: a daemon that waits to take over, or has failed before, has none. Its
loop calls `take`, `tick` and `due`; nothing in here waits for a disk or a network.

What holds after SIGKILL of the supervisor: nothing of these tables; front ends ask again, state bytes are in shared memory.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nydusd import points
from nydusd.ipc.messages import Json
from nydusd.storage.api.factory import BlobFactory
from nydusd.storage.cache.prefetch import PrefetchWorker
from nydusd.supervisor.children import Child
from nydusd.supervisor.family import Family
from nydusd.supervisor.mounts import Mounts
from nydusd.supervisor.pool import WorkerPool
from nydusd.supervisor.quota import Quota
from nydusd.supervisor.rest import Rest
from nydusd.supervisor.router import Reply, Router
from nydusd.supervisor.runtime import Runtime
from nydusd.supervisor.slots import SlotTable
from nydusd.supervisor.sockets import Sockets
from nydusd.supervisor.staff import Staff
from nydusd.supervisor.traffic import Traffic

if TYPE_CHECKING:
    from nydusd.config import Config

_SHORTEST = 0.05
"""Seconds that the loop waits at least for what is due by a clock of its own: it is not turned for each of them."""
_STOP_PATIENCE, _REST_PATIENCE, _LAST_TURN = 10.0, 1.0, 0.05
"""Seconds that a stop waits for the last checkpoint, a hand-over for those under way, and of one turn of the loop meanwhile."""


class Engine:
    """`reply(client, number, errno, slot)` answers who asked for chunks, `control(request, answer)` the API process."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        family: Family,
        factory: BlobFactory,
        mounts: Mounts,
        prefetch: PrefetchWorker,
        sockets: Sockets,
        reply: Reply,
        control: Callable[[Json, Callable[[Json], object]], None],
    ) -> None:
        self._family = family
        self._factory = factory
        self._mounts = mounts
        self._prefetch = prefetch
        self._interval = config.nydusd.checkpoint_interval
        self._next_checkpoint = time.monotonic() + self._interval
        size = config.nydusd.arena_size
        self.slots, self.stage = SlotTable(runtime.arena, size, runtime.first), SlotTable(runtime.stage, size)
        self.fetch = WorkerPool("fetch", sockets.send_job, lambda: None, self._has_others)
        self.decompress = WorkerPool("decompress", sockets.send_job, self._prefetch_more)
        self.pools = {"fetch": self.fetch, "decompress": self.decompress}
        self.router = Router(
            factory,
            self.fetch,
            self.decompress,
            self.slots,
            self.stage,
            prefetch,
            reply,
            deadline=config.nydusd.read_deadline,
        )
        self.staff = Staff(family, self.pools, sockets.send_job, factory, runtime)
        self._traffic = Traffic(
            *(sockets, self.router, self.fetch, self.decompress, family.live), control, self.staff.guests
        )
        idle = config.nydusd.worker_idle
        self.rest = Rest(family, self.pools, idle, lambda: not prefetch.idle(), family.seats())
        mounts.start(self.fetch, self.router)
        pools = self.fetch, self.decompress
        self.quota = Quota(
            *(runtime.instance, factory, mounts.images.values, self._pids, pools, self.router.evictions),
            by_kernel=lambda: None if mounts.kernel is None else mounts.kernel.table,
        )

    def take(self, events: Mapping[Any, int]) -> None:
        """Take in what has come at the sockets."""
        self._traffic.take(events)

    def ended(self, child: Child, identity: bytes) -> None:
        """A process has ended: its work goes to others."""
        self.router.drop_client(identity)
        for pool in self.pools.values():
            pool.worker_died(identity, killed=not child.crashed)

    def tick(self, now: float, stopping: bool) -> None:
        """What is done in each turn of the loop, when it is time: jobs go out, and all that is looked at now and then."""
        if now >= self._next_checkpoint:
            self._next_checkpoint = now + self._interval
            self.router.checkpoint()
            for table in (self.slots, self.stage):
                table.trim()
        if not self._mounts.coming:  # what is of an image that is not known yet must not be taken for nobody's
            self._mounts.unused.collect(self.router, self.fetch)
            self.quota.tick(now)
        self.router.tick()
        if not stopping:
            self.rest.make_room(now)
        # In this order: an idle decompress worker may have prefetch want a blob opened.
        self.decompress.pump()
        self.fetch.pump()
        if not stopping:
            self.rest.tick(now)

    def due(self, now: float) -> list[float]:
        """When the loop must turn, whatever happens (`time.monotonic()`)."""
        router = self.router
        waits = self._prefetch, self.quota, router.outages, router.checkpoints, self.staff
        until = [now + max(wait, _SHORTEST) for part in waits if (wait := part.wait(now)) is not None]
        return [self._next_checkpoint, *self.rest.due(), *until]

    def arena_bytes(self) -> int:
        """Shared memory that is in use now."""
        return self.slots.in_use() + self.stage.in_use()

    def store_all(self, turn: Callable[[float], None]) -> None:
        """The last checkpoint, after which the daemon ends; `turn(seconds)` is a turn of its loop."""
        points.reach("stop: unmounted")
        deadline = time.monotonic() + _STOP_PATIENCE
        # A server that does not answer must not keep the worker that is to store what is here.
        stuck = self.fetch.refuse("fetch")
        for child in self._family.children:
            if child.role == "fetch" and child.identity in stuck:
                child.send(signal.SIGKILL)
        # One that leaves is given no job any more: where the others rest, one of these is to be there.
        fetchers = [child for child in self._family.children if child.role == "fetch" and not child.leaving]
        while self.router.checkpoint() and time.monotonic() < deadline:
            if fetchers and not any(child.pid for child in fetchers):
                self._family.launch(fetchers[0])
            turn(_LAST_TURN)
        points.reach("stop: maps stored")

    def come_to_rest(self, turn: Callable[[float], None]) -> None:
        """Before all is left to the next one: until nobody syncs a file, or takes something out of it. Reads are served on.

        Who is ended in that stays until the disk has answered, and the next one must wait for him; and what somebody was to
        sync is doubted then.
        """
        deadline = time.monotonic() + _REST_PATIENCE
        while (self.fetch.refuse("checkpoint") or self.fetch.doing("evict")) and time.monotonic() < deadline:
            turn(_LAST_TURN)
        points.reach("handover: nobody syncs")

    def close(self) -> None:
        """Remove the shared memory."""
        self.slots.close()
        self.stage.close()

    def _pids(self) -> list[int]:
        """All processes of the daemon."""
        return [os.getpid(), *self._family.fork_server.pids, *(child.pid for child in self._family.children)]

    def _has_others(self, server: str) -> bool:
        """Whether blobs of other servers than this one are in use."""
        return any(cache.server not in ("", server) and cache.users > 0 for cache in self._factory.blobs())

    def _prefetch_more(self) -> None:
        if self.quota.allows_prefetch():
            self.router.prefetch()
