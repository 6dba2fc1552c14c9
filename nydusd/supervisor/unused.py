"""Blobs that no image uses any more: each goes when its last job is done and its chunk map is stored.

Runs in the supervisor. After SIGKILL the next one does not know them: their segments are removed with what no image has
(`strays.py`), their cache files and stored maps stay for whoever mounts an image with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nydusd import points

if TYPE_CHECKING:
    from nydusd.storage.api.factory import BlobFactory
    from nydusd.storage.cache.blob_cache import BlobCache
    from nydusd.storage.cache.prefetch import PrefetchWorker
    from nydusd.supervisor.router import Router


class Unused:
    """Those that are on their way out."""

    def __init__(self, factory: BlobFactory, prefetch: PrefetchWorker) -> None:
        self._factory = factory
        self._prefetch = prefetch
        self._leaving: list[BlobCache] = []

    def let_go(self, cache: BlobCache) -> None:
        """Somebody uses a blob no more."""
        cache.users -= 1
        self.look_at(cache)

    def look_at(self, cache: BlobCache) -> None:
        """A blob may have lost its last user."""
        if cache.users <= 0 and cache not in self._leaving:
            self._prefetch.cancel(cache)
            self._leaving.append(cache)

    def collect(self, router: Router) -> None:
        """Drop those that nobody uses again and that have nothing under way; called in each turn of the loop."""
        if not self._leaving:
            return
        self._leaving = [cache for cache in self._leaving if cache.users <= 0]
        idle = [cache for cache in self._leaving if router.may_close(cache)]
        if idle:
            self._leaving = [cache for cache in self._leaving if cache not in idle]
            points.reach("mounts: before blobs are dropped")
            for cache in self._factory.gc(idle):
                router.closed(cache)
            points.reach("mounts: blobs dropped")
