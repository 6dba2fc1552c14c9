"""Outages: requests whose chunks cannot be had now, and that are served again while their readers have time.

Used by the router alone. A server that cannot be reached, fails, or wants fewer requests costs its readers a delay: each
request is put off for as long as the server said, or for a back-off of its own, and then starts over as if it had just come.
So it is when file descriptors or memory are lacking for a job, in a worker or in the supervisor.
It holds nothing meanwhile: no worker, no shared memory, no claim on chunks. That servers are not hammered is not seen to
here: fetch workers count failures of a host together, and do not ask one that is down.

What holds after SIGKILL of the supervisor: front ends ask their requests again, and their deadlines are their own.
"""

from __future__ import annotations

import logging
import random
import time

from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Request

log = logging.getLogger(__name__)

_FIRST, _MOST = 0.1, 2.0
"""Seconds of the first pause and of the longest, if the server names none."""
_LAST_TRY = 0.1
"""Seconds that must be left for another try."""
_CUT = 5.0
"""A pause is cut by so many seconds at most to end before the reader's time does: the server may be there by then."""


def awaited(cache: BlobCache) -> str:
    """What readers of a blob with an `outage` wait for."""
    return "file descriptors or memory" if cache.lacks else "the backend"


class Outages:
    """`deadline` is how long readers wait for a request (seconds); they are answered a little earlier."""

    def __init__(self, deadline: float) -> None:
        self._patience = deadline - min(1.0, deadline / 10)
        self._due: dict[Request, float] = {}

    def begin(self, request: Request) -> None:
        """A request has come: note until when it may be put off."""
        request.until = time.monotonic() + self._patience

    def put_off(self, request: Request, retry_after: float, why: str, *, lacks: bool = False) -> bool:
        """Have a request wait. False if its reader will not wait so long.

        `retry_after` is how long the backend wants to be left alone (seconds, 0: it did not say). `lacks`: it has done nothing
        wrong, file descriptors or memory are lacking.
        """
        now = time.monotonic()
        left = request.until - now - _LAST_TRY
        if left <= 0 or retry_after > left + _CUT:
            return False
        pause = max(retry_after, min(_FIRST * 2 ** min(request.put_off, 10), _MOST)) * random.uniform(1.0, 1.25)
        request.put_off += 1
        request.rounds = 0  # it may start over until its time is over
        self._due[request] = now + min(pause, left)
        cache = request.cache
        if not cache.outage:
            cache.outage, cache.lacks = why, lacks
            log.warning("readers wait for %s: %s", awaited(cache), why)
        return True

    def leave(self, request: Request) -> None:
        """The request waits no more."""
        self._due.pop(request, None)

    @staticmethod
    def over(cache: BlobCache) -> None:
        """The backend has given something of this blob."""
        if cache.outage and not cache.lacks:
            cache.outage = ""
            log.warning("blob %s: the backend answers again", cache.spec.info.blob_id)

    @staticmethod
    def supplied(cache: BlobCache) -> None:
        """Something of this blob was done: file descriptors and memory were there."""
        if cache.lacks:
            cache.outage, cache.lacks = "", False
            log.warning("blob %s: file descriptors and memory are there again", cache.spec.info.blob_id)

    def due(self) -> list[Request]:
        """Those whose pause is over; they do not wait here any more."""
        now = time.monotonic()
        found = [request for request, at in self._due.items() if at <= now]
        for request in found:
            del self._due[request]
        return found

    def waits(self, request: Request) -> bool:
        """Whether a request is put off."""
        return request in self._due

    def wait(self, now: float) -> float | None:
        """Seconds until a request is due; None if none is put off."""
        return max(0.0, min(self._due.values()) - now) if self._due else None
