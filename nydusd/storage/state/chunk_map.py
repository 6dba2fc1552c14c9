"""ChunkMap: which chunks of a blob are in the cache file, and who is fetching the others.

The live map is one byte a chunk in the blob's segment. The supervisor claims (EMPTY to PENDING) under the segment's lock; a
worker that wrote a chunk stores READY, one byte, no lock; readers load the byte and then read the file. What is
stored on disk is another thing: `map_file.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from nydusd import points
from nydusd.storage.state.segment import EMPTY, FAILED, PENDING, READY, VERIFY, Segment

_COUNTED = {"empty": EMPTY, "pending": PENDING, "ready": READY, "failed": FAILED, "verify": VERIFY}


class ChunkMap:
    """The state of a blob's chunks. Indexes are chunk ids, 0 <= id < count."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._state = segment.state
        self.count = segment.count

    def is_ready(self, chunk: int) -> bool:
        return bool(self._state[chunk] == READY)

    def states(self) -> memoryview:
        """The state bytes themselves, to be looked at."""
        return self._state

    def check_ready_and_mark_pending(self, chunks: Sequence[int]) -> list[int]:
        """Claim those of `chunks` that are neither ready nor claimed; gives the ids the caller now owns.

        All in one step under the lock: nobody holds a part and waits for another.
        """
        with self._segment.lock():
            owned = [i for i in chunks if self._state[i] not in (PENDING, READY)]
            for chunk in owned:
                self._state[chunk] = PENDING
                points.reach("claim: one chunk")
        return owned

    def claim_ready(self, chunks: Sequence[int]) -> int:
        """Claim chunks that are ready, in order to take them out of the cache file. Only the supervisor claims.

        Gives how often all was doubted before: what is claimed is not doubted.
        """
        doubts: int = self._segment.doubts[0]
        with self._segment.lock():
            for chunk in chunks:
                self._state[chunk] = PENDING
        return doubts

    def keep_claimed(self, chunk: int, doubts: int) -> None:
        """Nothing was taken out of what was claimed by `claim_ready`, which gave `doubts`."""
        if self._state[chunk] == PENDING:
            if self._segment.doubts[0] == doubts:
                self._state[chunk] = READY
            if self._segment.doubts[0] != doubts:  # before, or just now
                self._state[chunk] = self._segment.doubted(chunk)

    def set_ready(self, chunk: int) -> None:
        """The chunk's bytes are in the cache file, as another segment of the same file tells."""
        self._segment.dirty[0] = 1  # before: it may be in the page cache alone
        self._state[chunk] = READY

    def doubt(self, chunk: int) -> None:
        """The cache file may hold the chunk's bytes: its digest is to be checked before it is fetched."""
        if self._state[chunk] in (EMPTY, FAILED):
            self._state[chunk] = VERIFY

    def clear_pending(self, chunk: int, to: int = EMPTY) -> None:
        """End a claim without data. A chunk that became ready meanwhile stays ready."""
        if self._state[chunk] == PENDING:
            self._state[chunk] = to

    def taken_out(self, chunk: int) -> None:
        """The cache file has lost what was claimed by `claim_ready`, and what another image would have checked there."""
        if self._state[chunk] in (PENDING, VERIFY):
            self._state[chunk] = EMPTY

    def end_claims(self) -> None:
        """End all claims: whoever made them is dead, and so is every worker that had a job for one."""
        state = bytes(self._state)
        chunk = state.find(PENDING)
        while chunk >= 0:
            self._state[chunk] = EMPTY
            chunk = state.find(PENDING, chunk + 1)

    def forget(self, chunk: int) -> None:
        """The cache file has lost this chunk's bytes (truncated by somebody): fetch it again."""
        if self._state[chunk] == READY:
            self._state[chunk] = EMPTY

    def ready_count(self) -> int:
        return bytes(self._state).count(READY)

    def counts(self) -> dict[str, int]:
        """How many chunks are in each state, by its name."""
        state = bytes(self._state)
        return {name: state.count(value) for name, value in _COUNTED.items()}

    def is_all_ready(self) -> bool:
        return bool(self.ready_count() == self.count)
