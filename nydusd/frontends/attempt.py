"""A read that could not be done at once: what it is to ask the supervisor for, each time that it still cannot be done.

Nothing is asked for because a file descriptor or memory is lacking (`ScarceError`): the blob is as good as ever, for others
too. Such a read is tried again a moment later, as often as its deadline allows.

Runs in the front ends that read cache files themselves (FUSE, block export). Nothing here waits or sends: who waits is with
them. It dies with the process: a successor begins a read anew, and counts anew.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from nydusd.errors import CacheError, EvictedError, StaleCacheError, UnreadableError
from nydusd.formats.model import Extent
from nydusd.ipc.messages import LOST, UNREADABLE
from nydusd.storage.api.device import Pieces
from nydusd.storage.api.io import BlobIoVec, ChunkRun

LATER = 0.1
"""Seconds after which a read that lacked a file descriptor or memory is tried again."""
_ANEW_MOST = 4
"""How often the chunks of one read may be lost or unreadable: the blob may have to be opened anew more than once."""


class Chunks(Protocol):
    """What an attempt uses of `nydusd.storage.api.device.BlobDevice`."""

    def missing(self, vec: BlobIoVec, again: bool = False) -> list[ChunkRun]: ...
    def settled(self, vec: list[Extent]) -> list[Extent]: ...
    def runs(self, vec: list[Extent]) -> list[ChunkRun]: ...
    def evictions(self, vec: BlobIoVec) -> int: ...
    def refresh(self, vec: BlobIoVec) -> None: ...


class Ask(NamedTuple):
    """What is to be asked for (`blob` is the image's index of it), with which flags of `ipc/messages.py`."""

    runs: list[ChunkRun]
    flags: int


class Attempt:
    """The pieces `vec` of blobs of `device`, on their way to a reader. What is taken away again is asked for again."""

    __slots__ = ("_anew", "_asked", "_evictions", "device", "unsent", "vec")

    def __init__(self, device: Chunks, vec: list[Extent]) -> None:
        self.device = device
        self.vec = vec
        self._anew = 0
        self._asked = False
        self._evictions = 0
        self.unsent: Ask | None = None
        """What was to be asked for when there was no file descriptor for the line to the supervisor."""

    def ask(self, runs: list[ChunkRun], flags: int = 0) -> Ask:
        """To ask for just this."""
        self._asked = True
        self._evictions = self.device.evictions(self.vec)
        return Ask(runs, flags)

    def begin_anew(self, device: Chunks) -> None:
        """Nothing of it was asked for yet of `device`, which has the same blobs."""
        self.device = device
        self._asked = False

    def check(self, pieces: Pieces) -> Ask | None:
        """All that was asked for has come, it is said: in the cache file, or as `pieces`. None: it has, read now.

        If nothing was asked for yet, what lacks is. Raises StaleCacheError when it was said too often and is not true,
        CorruptChunkError and ScarceError as `missing` does.
        """
        absent = self._absent(pieces)
        if not absent:
            return None
        settled = self._is_settled_now()
        if self._asked and not settled and self.device.evictions(self.vec) == self._evictions:
            # Nothing was taken away. So the supervisor means another file than the one that is open here, or is wrong.
            self.device.refresh(self.vec)
            absent = self._absent(pieces)
            if not absent:
                return None
            if not self._is_settled_now():
                return self._ask_anew(
                    LOST, StaleCacheError("chunks were reported as fetched, again and again, and are not there")
                )
        return self.ask(absent)

    def failed(self, error: CacheError) -> Ask:
        """All was there, and reading it has failed. Raises `error` when that was so too often."""
        if isinstance(error, EvictedError):
            return self.ask(self.device.runs(self.vec))
        return self._ask_anew(UNREADABLE if isinstance(error, UnreadableError) else LOST, error)

    def _ask_anew(self, why: int, error: CacheError) -> Ask:
        self._anew += 1
        if self._anew > _ANEW_MOST:
            raise error
        return self.ask(self.device.runs(self.vec), why)

    def _is_settled_now(self) -> bool:
        """Whether more is known of the pieces than before: then the chunks that they lack were never asked for."""
        settled = self.device.settled(self.vec)
        changed = settled is not self.vec
        self.vec = settled
        return changed

    def _absent(self, pieces: Pieces) -> list[ChunkRun]:
        """The runs of which a chunk is neither ready nor among `pieces`."""
        return [
            run
            for run in self.device.missing(self.vec, again=True)
            if any((run.blob, chunk) not in pieces for chunk in range(run.first, run.first + run.count))
        ]
