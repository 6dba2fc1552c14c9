"""Openings: blobs that are being prepared by a worker, and the requests that wait for that. Used by the router alone; no I/O.

What holds after SIGKILL of the supervisor: a segment is either absent or complete, and clients send their requests again.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable

from nydusd.errors import NydusError, ScarceError
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Answer, Job, Priority, Request
from nydusd.supervisor.outages import Outages
from nydusd.supervisor.pool import WorkerPool
from nydusd.supervisor.uncached import note_room

log = logging.getLogger(__name__)


class Openings:
    """`serve(request)` is called for each that waited when its blob is open, `finish(request, errno)` when it cannot be.

    `spare()` is called when something is lacking for that: shared memory that is not in use is to be given back.
    """

    def __init__(
        self,
        fetch: WorkerPool,
        outages: Outages,
        serve: Callable[[Request], None],
        finish: Callable[[Request, int], None],
        spare: Callable[[], None],
    ) -> None:
        self._fetch = fetch
        self._outages = outages
        self._serve = serve
        self._finish = finish
        self._spare = spare

    def open(self, cache: BlobCache) -> None:
        """Have the blob prepared, unless that is done, under way, or failed too recently."""
        if not cache.may_open():
            return
        cache.state = "preparing"
        self._fetch.submit(Job("prepare", cache, Priority.USER, {}, self._opened))

    def wait_for(self, request: Request) -> None:
        """Have a request wait for its blob, which is not open; it fails if that was tried too recently."""
        cache = request.cache
        if cache.state == "failed" and not cache.may_open():
            self._refuse(request)
        else:
            cache.waiting.append(request)
            self.open(cache)

    def _opened(self, job: Job, answer: Answer) -> None:
        cache = job.cache
        assert cache is not None
        if job.cancelled:
            return
        name = cache.spec.info.blob_id
        error, retry_after = answer.get("error"), answer.get("retry_after")
        cache.scarce = answer.get("type") == ScarceError.__name__
        if error is None:
            try:
                cache.opened()
                self._outages.over(cache)
                self._outages.supplied(cache)
                note_room(cache, answer.get("uncached", ""))
                log.info("blob %s: %d of %d chunks are in the cache", name, answer["ready"], answer["count"])
            except (NydusError, OSError) as e:
                error = str(e)
                cache.scarce = isinstance(e, ScarceError)
        if error is not None:
            if cache.scarce:
                retry_after = 0.0
                self._spare()
            cache.open_failed(error, retry_after)
            level = logging.WARNING if cache.unreachable else logging.ERROR
            log.log(level, "blob %s cannot be opened: %s", name, error)
        waiting, cache.waiting = cache.waiting, []
        for request in waiting:
            if cache.state == "failed":
                self._refuse(request)
            else:
                self._serve(request)

    def _refuse(self, request: Request) -> None:
        """The blob could not be opened. If its backend was not there, the reader waits until that is tried again."""
        cache = request.cache
        wait = max(cache.retry_at - time.monotonic(), 0.0)
        if not (cache.unreachable and self._outages.put_off(request, wait, str(cache.reason), lacks=cache.scarce)):
            self._finish(request, errno.EIO)
