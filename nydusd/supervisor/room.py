"""Room: gives requests their place in shared memory, whole and in turn. Used by the router for chunks that are not stored.

A request gets all regions that it needs at once, those of the jobs that are still to run included, and keeps them until it is
answered. So no two requests wait for each other, and nothing that was fetched for one is given up for another before that one
had it. Who finds no room waits in line; a big request at its head is not overtaken by small ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from nydusd.errors import CacheError
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Request
from nydusd.supervisor.slots import SlotTable

Submit = Callable[[BlobCache, list[int], tuple[int, int]], None]
Cut = Callable[[BlobCache, Sequence[int]], list[tuple[list[int], int]]]


class Room:
    """`cut(cache, chunks)` says what is filled by one job each, and how long a region it needs; `submit(cache, chunks,
    (offset, length))` starts it."""

    def __init__(self, slots: SlotTable, cut: Cut, submit: Submit) -> None:
        self._slots = slots
        self._cut = cut
        self._submit = submit
        self._line: deque[Request] = deque()

    def enter(self, request: Request, missing: Sequence[int]) -> list[int] | None:
        """Hold what the request needs and start its jobs; gives the chunks to wait for, None if it stands in line now.

        Raises CacheError when it needs more than there ever is, or shared memory is full.
        """
        left = self._grant(request, missing)
        if left is None and not self._line and self._slots.clear_unused():
            left = self._grant(request, missing)  # nobody holds anything: the arena was only in pieces
            if left is None:
                raise CacheError(
                    f"a read needs more than {self._slots.size} bytes of shared memory: raise nydusd.arena_size"
                )
        if left is None:
            self._line.append(request)
        return left

    def leave(self, request: Request) -> None:
        """End all holds of a request."""
        for region in request.held:
            self._slots.drop(region)
        request.held.clear()

    def call(self, serve: Callable[[Request], None]) -> None:
        """Something was given back: `serve` those in line, in order, until one has to wait on."""
        line, self._line = self._line, deque()
        while line and not self._line:
            serve(line.popleft())
        self._line.extend(line)

    def _grant(self, request: Request, missing: Sequence[int]) -> list[int] | None:
        cache = request.cache
        regions: set[int] = set()
        left: list[int] = []
        fetch: list[int] = []
        for chunk in missing:
            region = self._slots.where(cache.handle, chunk)
            if region is None:
                left.append(chunk)
                job = cache.jobs.get(chunk)
                if job is None:
                    fetch.append(chunk)
                elif job.slot is not None:
                    region = job.slot[0]
            if region is not None:
                regions.add(region)
        if fetch and self._line:
            return None
        for region in regions:
            self._slots.hold(region)
        request.held = list(regions)
        granted = False
        try:
            granted = self._start(request, fetch)
        finally:
            if not granted:
                self.leave(request)
        return left if granted else None

    def _start(self, request: Request, chunks: Sequence[int]) -> bool:
        cache = request.cache
        parts = self._cut(cache, chunks)
        offsets = self._slots.reserve([length for _part, length in parts])
        if offsets is None:
            return False
        for (part, length), offset in zip(parts, offsets, strict=True):
            self._slots.hold(offset)
            request.held.append(offset)
            self._submit(cache, part, (offset, length))
        return True
