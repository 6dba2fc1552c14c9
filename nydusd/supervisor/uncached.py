"""When a cache folder's disk takes or gives nothing: reads of its blobs go on uncached, and it is tried again later.

Part of the supervisor: notes in its tables, no I/O. Data comes through shared memory meanwhile (`BlobCache.uses_slots`). Where
the kernel reads the cache file by itself (`BlobCache.pinned`) there is no other way: reads of what is not there fail, and the
disk is tried again sooner. What holds after SIGKILL: the next supervisor finds out by itself.
"""

from __future__ import annotations

import logging
import time

from nydusd.storage.cache.blob_cache import BlobCache

log = logging.getLogger(__name__)

_RETRY = 30.0
"""Seconds after which a cache folder that is full, or whose disk fails, is tried again."""
_RETRY_PINNED = 1.0
"""The same where reads fail until then: each try may cost a request of the backend, and no more than that."""


def note_room(cache: BlobCache, why_none: str) -> None:
    """Remember whether the cache folder could be used for what was just done there; `why_none` is empty if so."""
    name, folder = cache.spec.info.blob_id, cache.spec.work_dir
    if why_none:
        if not cache.no_room_until:
            log.warning("cache folder %s: %s; blob %s: %s", folder, why_none, name, _what_happens(cache))
        now = time.monotonic()
        cache.no_room_until, cache.no_room_why = now + (_RETRY_PINNED if cache.pinned else _RETRY), why_none
        cache.prefetch_at = max(cache.prefetch_at, now + _RETRY)
    elif cache.no_room_until and not cache.uses_slots:
        cache.no_room_until, cache.no_room_why = 0.0, ""
        log.info("cache folder %s: there is room for blob %s again", folder, name)


def told(cache: BlobCache) -> str:
    """What an operator is told of a blob whose cache folder could not be used the last time."""
    return f"{_what_happens(cache)}: cache folder {cache.spec.work_dir}: {cache.no_room_why}"


def _what_happens(cache: BlobCache) -> str:
    return "reads of what is not cached fail until it can be used" if cache.pinned else "reads go on uncached"


def note_unreadable(cache: BlobCache, first: int, count: int) -> None:
    """The disk did not give these chunks, which are said to be in the cache file: they are not there any more.

    Nor for others who use the file: else they would be taken over from them at once.
    """
    for user in (cache, *cache.others()):
        for chunk in range(first, min(first + count, user.chunk_map.count)):
            user.chunk_map.forget(chunk)
        note_room(user, "chunks cannot be read from the cache file")
