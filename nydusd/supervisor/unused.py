"""Blobs that no image uses any more: each goes when its last job is done and its chunk map is stored.

Runs in the supervisor, whose loop waits for no disk: what is to be removed of cache files that somebody has deleted, a fetch
worker removes, one of them at a time. Whoever collects garbage does so at some time after an umount, so it is looked again now
and then. After SIGKILL the next one does not know them: their segments are removed with what no image has (`strays.py`), their
cache files and stored maps stay for whoever mounts an image with them.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from nydusd import points
from nydusd.storage.cache.requests import Answer, Job, Priority

if TYPE_CHECKING:
    from nydusd.storage.api.factory import BlobFactory
    from nydusd.storage.cache.blob_cache import BlobCache
    from nydusd.storage.cache.prefetch import PrefetchWorker
    from nydusd.supervisor.pool import WorkerPool
    from nydusd.supervisor.router import Router

_AGAIN = 300.0
"""Seconds until it is looked once more for chunk maps that were there."""


class Unused:
    """Those that are on their way out."""

    def __init__(self, factory: BlobFactory, prefetch: PrefetchWorker) -> None:
        self._factory = factory
        self._prefetch = prefetch
        self._leaving: list[BlobCache] = []
        self._tidies = False
        self._look_at = math.inf

    def let_go(self, cache: BlobCache) -> None:
        """Somebody uses a blob no more."""
        cache.users -= 1
        self.look_at(cache)

    def look_at(self, cache: BlobCache) -> None:
        """A blob may have lost its last user."""
        if cache.users <= 0 and cache not in self._leaving:
            self._prefetch.cancel(cache)
            self._leaving.append(cache)

    def collect(self, router: Router, fetch: WorkerPool) -> None:
        """Drop those that nobody uses again and that have nothing under way; called in each turn of the loop."""
        if self._leaving:
            self._drop(router)
        if not self._tidies and (now := time.monotonic()) >= self._look_at:
            self._tidy(fetch, now)

    def _drop(self, router: Router) -> None:
        self._leaving = [cache for cache in self._leaving if cache.users <= 0]
        idle = [cache for cache in self._leaving if router.may_close(cache)]
        if idle:
            self._leaving = [cache for cache in self._leaving if cache not in idle]
            points.reach("mounts: before blobs are dropped")
            for cache in self._factory.gc(idle):
                router.closed(cache)
            self._look_at = 0.0
            points.reach("mounts: blobs dropped")

    def _tidy(self, fetch: WorkerPool, now: float) -> None:
        """Have a worker look which of the maps of those that were dropped were deleted."""
        left, again = self._factory.left, now + _AGAIN
        due = {str(path): path for path, at in left.items() if at <= now}
        left.update(dict.fromkeys(due.values(), again))
        self._look_at = min(left.values(), default=math.inf)
        if not due:
            return

        def done(_job: Job, answer: Answer) -> None:
            self._tidies = False
            for path in map(due.get, answer.get("gone", ())):
                if (
                    path is not None and left.get(path) == again
                ):  # else it was used since, or was so and is to be looked at
                    del left[path]

        self._tidies = True
        fetch.submit(Job("forget_deleted", None, Priority.AHEAD, {"maps": sorted(due)}, done))
