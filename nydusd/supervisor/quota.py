"""Quota: keeps the cache folders of a daemon within their bounds. Part of the supervisor; the work is done by fetch workers.

Each folder with a quota is surveyed about once a second while chunks are stored. Above the quota files of unused blobs go
first, then chunks of mounted ones, until `_LOW` of it is taken. What was asked for in the last `cache_keep` seconds stays: a
folder whose readers need more than its quota all the time is over it for so long. Prefetch stops before it would push out what
readers have asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nydusd.ipc.messages import Json
from nydusd.storage.cache.manager import segments_in
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.storage.state.names import inode_of, names

if TYPE_CHECKING:
    from nydusd.config.model import Tuning
    from nydusd.storage.api.factory import BlobFactory
    from nydusd.supervisor.evictions import Evictions
    from nydusd.supervisor.images import Image
    from nydusd.supervisor.kernel_table import KernelTable
    from nydusd.supervisor.pool import WorkerPool

log = logging.getLogger(__name__)

_INTERVAL = 1.0
_REST = 30.0
"""Seconds between surveys of a folder into which nothing was stored."""
_AGAIN = 5.0
"""The same for one that is above its quota with nothing that may go."""
_LOW = 0.9
_KEEP_ORDERED = 2
"""Seconds for which what was asked for stays when an operator orders to make room, if not less is configured."""


@dataclass(slots=True)
class _Folder:
    """A cache folder. `limit` 0: only by order."""

    limit: int = 0
    keep: int = 0
    used: int | None = None
    running: bool = False
    next: float = 0.0
    seen: int = -1
    evicted_chunks: int = 0
    evicted_bytes: int = 0
    removed_blobs: int = 0
    rounds: int = 0
    evicting: int = 0
    orders: list[Json] = field(default_factory=list)


class Quota:
    """`images()` are those mounted now, `pids()` all processes of the daemon.

    `by_kernel()`: the table of what the kernel reads by itself, which has also what was unmounted and is used still.
    """

    def __init__(
        self,
        instance: str,
        factory: BlobFactory,
        images: Callable[[], Iterable[Image]],
        pids: Callable[[], list[int]],
        pools: tuple[WorkerPool, WorkerPool],
        evictions: Evictions,
        by_kernel: Callable[[], KernelTable | None],
    ) -> None:
        self._factory = factory
        self._images = images
        self._pids = pids
        self._fetch, self._decompress = pools
        self._evictions = evictions
        self._by_kernel = by_kernel
        self._folders: dict[str, _Folder] = {}
        self._next = 0.0
        self._left = _segments(instance)

    def tick(self, now: float) -> None:
        """Survey what is due. Called by the supervisor's loop, each turn."""
        if now < self._next:
            return
        self._next = now + _INTERVAL
        self._learn()
        for cache in self._factory.blobs():
            if cache.segment is not None:
                cache.segment.clock[0] = int(now)
        for path, folder in self._folders.items():
            idle = folder.seen == self._decompress.jobs_done and not folder.orders
            if folder.running or (idle and now < folder.next) or not (folder.limit or folder.orders):
                continue
            folder.seen = self._decompress.jobs_done
            folder.next = now + _REST
            self._survey(path, folder, int(now))

    def wait(self, now: float) -> float | None:
        """Seconds until `tick` has something to do; None if nothing needs it."""
        busy = any(folder.limit or folder.orders for folder in self._folders.values())
        return max(0.0, self._next - now) if busy else None

    def _learn(self) -> None:
        """The folders of the images that are mounted. Several quotas for one folder: the smallest."""
        found: dict[str, list[Tuning]] = {}
        for image in self._images():
            for path in {cache.spec.work_dir for cache in image.caches}:
                if path is not None:
                    found.setdefault(path, []).append(image.config.nydusd)
        for path in self._folders.keys() - found.keys():
            del self._folders[path]
        for path, tunings in found.items():
            folder = self._folders.setdefault(path, _Folder())
            folder.limit = min(filter(None, (tuning.cache_quota for tuning in tunings)), default=0)
            folder.keep = min(tuning.cache_keep for tuning in tunings)

    def order(self, target: int | None) -> Json:
        """Remove now all files of unused blobs, and chunks until `target` bytes are taken (None: down to the quota)."""
        self._learn()
        for folder in self._folders.values():
            folder.orders.append({"target": target})
        self._next = 0.0
        return self.facts()

    def _survey(self, path: str, folder: _Folder, now: int) -> None:
        order = folder.orders.pop(0) if folder.orders else None
        target = None if order is None else order["target"]
        # Without any bound there is nothing to be above of.
        limit = folder.limit or 1 << 62 if target is None else target
        folder.running = True
        payload: Json = {
            "folder": path,
            "limit": limit,
            "target": int(limit * _LOW) if target is None else target,
            "unused": order is not None,
            "mounted": self._mounted(path),
            "now": now,
            "keep": folder.keep if target is None else min(folder.keep, _KEEP_ORDERED),
            "strays": self._strays(),
            "pids": self._pids(),
        }

        def done(_job: Job, answer: Answer) -> None:
            folder.running = False
            folder.rounds += 1
            if "error" in answer:
                log.warning("cache folder %s cannot be surveyed: %s", path, answer["error"])
                return
            folder.used = answer["used"]
            folder.removed_blobs += len(answer["removed"])
            self._take_out(folder, answer["victims"])
            if folder.used > limit:
                folder.next = now + _AGAIN

        self._fetch.submit(Job("survey", None, Priority.AHEAD, payload, done))

    def _mounted(self, folder: str) -> Json:
        """The segments of each blob that an image uses, with their handles: of other images and configurations, too.

        One that only the kernel uses, since before our life, has none of ours.
        """
        found: dict[str, list[Json]] = {}
        for cache in self._factory.blobs():
            if cache.spec.work_dir == folder:
                row = {"handle": cache.handle, "segment": cache.spec.segment}
                found.setdefault(cache.spec.info.blob_id, []).append(row)
        for blob_id in () if (table := self._by_kernel()) is None else table.blobs_in(folder):
            found.setdefault(blob_id, [])
        return found

    def _strays(self) -> dict[str, int]:
        """Segments that a life of this daemon before ours has left, and that nobody uses, with their inodes."""
        for cache in self._factory.blobs():
            self._left.pop(cache.spec.segment, None)
        used = set() if (table := self._by_kernel()) is None else table.segments()
        return {name: inode for name, inode in self._left.items() if name not in used}

    def _take_out(self, folder: _Folder, victims: dict[str, list[int]]) -> None:
        for handle, chunks in victims.items():
            cache = self._factory.get(int(handle))
            if cache is None:
                continue
            payload: Json = {"strays": self._strays(), "pids": self._pids()}
            if self._evictions.start(cache, chunks, payload, lambda answer: self._evicted(folder, answer)):
                folder.evicting += 1

    @staticmethod
    def _evicted(folder: _Folder, answer: Answer) -> None:
        folder.evicting -= 1
        folder.evicted_chunks += answer.get("evicted", 0)
        folder.evicted_bytes += answer.get("bytes", 0)
        folder.seen = -1  # look again: perhaps that was not enough

    def allows_prefetch(self) -> bool:
        """Whether there is room for what nobody has asked for."""
        return all(not f.limit or f.used is None or f.used < f.limit * _LOW for f in self._folders.values())

    def facts(self) -> Json:
        """For the API: by folder."""
        return {
            path: {
                "quota": folder.limit,
                "used": folder.used,
                "evicted_chunks": folder.evicted_chunks,
                "evicted_bytes": folder.evicted_bytes,
                "removed_blobs": folder.removed_blobs,
                "rounds": folder.rounds,
                "evicting": folder.evicting,
            }
            for path, folder in self._folders.items()
        }


def _segments(instance: str) -> dict[str, int]:
    """The blob segments of this daemon that there are, with their inodes."""
    prefix = f"/nydusd.{instance}."
    return {name: inode for name in segments_in(names(prefix[1:]), prefix) if (inode := inode_of(name))}
