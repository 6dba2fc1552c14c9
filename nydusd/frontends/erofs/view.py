"""A blob as one image's metadata describes it: which of its chunks that lists, and which are in the cache file, by its segment.

Runs in the front end. Images that have a blob in common use one cache file, each with a segment of its own. What two of them
list they agree on (`storage/state/sharing.py`); of a chunk that one does not list its segment may say that it is there, and
nobody has checked it.

After SIGKILL nothing is lost: segments outlive us.
"""

from __future__ import annotations

from array import array

from nydusd.formats.model import ChunkFlag
from nydusd.storage.state.segment import RECORD, RETIRED, Identity, Segment

from .table import File

_UNLISTED = int(ChunkFlag.UNLISTED)


class View:
    """`handle` is how the supervisor calls it, for as long as there are front ends; `row`: in which the front end counts.

    What else there is, is there while `segment` is. `listed` has a byte for each chunk: 1 if the image lists it. `closed`: no
    file of it refers to any other one, for sure.
    """

    def __init__(self, file: File, row: int) -> None:
        self.handle = file.handle
        self.describe(file)
        self._name = file.segment
        self._row = row
        self.segment: Segment | None = None

    def describe(self, file: File) -> None:
        """It is this of a mount."""
        self.verifies = file.verifies
        self.closed = file.listed

    def open(self, file: tuple[int, int, int | None]) -> bool:
        """Map the segment, unless that is done; False if there is none of this cache file: device, inode, birth.

        Raises FormatError for what is no segment, CacheError when it cannot be mapped, ScarceError when it cannot now.
        """
        if self.segment is not None:
            if self.segment.epoch[0] != RETIRED:
                return True
            self.close()
        fresh = Segment.open(self._name)
        if fresh is None:
            return False
        if not is_same(fresh.identity, file):
            fresh.close()
            return False
        self.segment = fresh
        self.epoch, self.states = fresh.epoch, fresh.state
        self.counters = fresh.counters(self._row)
        self.starts, self.ends = array("Q"), array("Q")
        listed = bytearray()
        for _, start, _, size, flags, *_ in RECORD.iter_unpack(fresh.records):
            self.starts.append(start)
            self.ends.append(start + size)
            listed.append(bool(size) and not flags & _UNLISTED)
        self.listed = bytes(listed)
        return True

    @property
    def doubts(self) -> bool:
        """Whether who has the file synced by it doubts first what is ready."""
        return self.segment is not None and bool(self.segment.lost[0] or self.segment.syncing[0])

    def close(self) -> None:
        if self.segment is not None:
            self.counters.release()
            self.segment.close()
            self.segment = None


def is_same(identity: Identity, file: tuple[int, int, int | None]) -> bool:
    """Whether a segment speaks of this file; birth None: of it, as far as is known."""
    return identity.file[:2] == file[:2] and file[2] in (None, identity.birth)
