"""Syncs: has the cache files synced of which ranges are complete, for only of what is on its disk may nobody be asked any more.

A chunk is ready when its bytes are in the page cache. If the disk then does not take them, the kernel drops them at some time,
and gives zeros to whoever reads there. A worker hears of that when it syncs the file: it doubts all that is ready, and says so
in the segment (`Segment.doubts`). So the mark of a range stays until a sync that began after the range was complete has
succeeded, with no doubt since.

Runs in the front end. After SIGKILL nothing is known: what is marked stays so until the successor has asked again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from nydusd.errors import CacheError
from nydusd.ipc.messages import LOST, SYNC
from nydusd.storage.api.io import ChunkRun

from .device import Blob, Ready

_AGAIN = 10.0
"""Seconds after which it is asked again, if there was no answer (the supervisor was replaced) or the sync failed, or said
nothing of this file."""

_SOON = 0.5
"""The same if somebody else syncs it meanwhile, or was killed at that."""

Send = Callable[[ChunkRun, int], int]
"""Asks the supervisor for a run of chunks, with these flags; gives the number of the request."""

_KEPT = 8
"""Requests of a blob of which the answer counts, however late it comes."""


class Syncs:
    """One request a blob at a time, unless it is not answered in time."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[Blob, Ready]] = {}
        """By number of the request, in the order in which they were sent."""
        self._next: dict[Blob, float] = {}
        self._next_lost: dict[Blob, float] = {}
        """The same if some of it is lost."""
        self._refused: dict[Blob, set[int]] = {}
        """Handles by which it could not be synced: the supervisor does not know them, or knows of no cache file."""

    def ask(self, blob: Blob, send: Send) -> None:
        """Have a blob synced, unless that was asked for a moment ago; sooner again if some of it is lost."""
        now, flags = time.monotonic(), SYNC | (LOST if blob.is_suspect() else 0)
        if now < (self._next_lost if flags & LOST else self._next).get(blob, 0.0):
            return
        self._next[blob] = now + _AGAIN
        if flags & LOST:
            self._next_lost[blob] = now + _SOON
        with contextlib.suppress(CacheError):
            ready = blob.look(self._refused.get(blob, ()))
            # Of a chunk that is there: a supervisor of another release fetches what it is asked for.
            self._asked[send(ready.run, flags)] = blob, ready
            self._drop(self._of(blob)[:-_KEPT])

    def answered(self, request: int, code: int) -> bool:
        """The answer to a request, if it was one of these; whether it has said what is on the disk."""
        if request not in self._asked:
            return False
        blob, ready = self._asked[request]
        before = self._of(blob)
        before = before[: before.index(request)]
        del self._asked[request]
        if code:
            refused = self._refused.setdefault(blob, set())
            refused.add(ready.run.blob)
            if blob.handles <= refused:
                del self._refused[blob]
            else:
                self._next.pop(blob, None)
                self._next_lost.pop(blob, None)
            return False
        if blob.is_being_synced():
            self._next[blob] = time.monotonic() + _SOON
            return False
        if not blob.synced(ready):
            return False
        self._drop(before)
        self._next.pop(blob, None)
        return True

    def forget(self, blob: Blob) -> None:
        self._drop(self._of(blob))
        self._next.pop(blob, None)
        self._next_lost.pop(blob, None)
        self._refused.pop(blob, None)

    def _of(self, blob: Blob) -> list[int]:
        return [number for number, (asked, _) in self._asked.items() if asked is blob]

    def _drop(self, numbers: list[int]) -> None:
        for number in numbers:
            del self._asked[number]
