"""How a job ended for each who waited for its chunks. Used by the router; pure but for the tables that it changes.

Runs in the supervisor. After SIGKILL nobody waits in these tables any more: front ends ask the next supervisor again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Job, Request

AGAIN = -1
"""Instead of an errno: the job ended, the chunk is neither there nor broken."""


def outcomes(
    job: Job, cache: BlobCache, failed: Mapping[int, int], has: Callable[[int, int], bool], *, poison: bool
) -> dict[Request, int]:
    """Have nobody wait for the chunks of a job that has ended; gives for whom that is the end: an errno, 0, or AGAIN.

    `failed`: an errno by chunk; `poison`: workers die of them. `has(handle, chunk)`: whether it is in shared memory.
    """
    ended: dict[Request, int] = {}
    for chunk in job.chunks:
        code = failed.get(chunk, 0)
        if code:
            cache.failed(chunk, code, poison=poison)
        elif cache.chunk_map.is_ready(chunk) or has(cache.handle, chunk):
            cache.succeeded(chunk)
        else:
            code = AGAIN
        for request in cache.waiters.pop(chunk, ()):
            request.left.discard(chunk)
            if code > 0 or (code and request not in ended):
                ended[request] = code
            elif not request.left:
                ended.setdefault(request, 0)
    return ended
