"""BlobMetaInfo: questions about the layout of a blob's chunks, answered from its segment.

Which chunks must be decoded together (a batch, a zran context), and which neighbours are worth taking along.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nydusd.formats.model import ChunkFlag, ChunkRecord
from nydusd.storage.cache.stored import fetch_range, stored_range
from nydusd.storage.state.segment import CHECKABLE, READY, RECORD, Segment

_GROUPED = int(ChunkFlag.BATCH | ChunkFlag.ZRAN)
_UNLISTED = int(ChunkFlag.UNLISTED)
_MANY = 4096
"""Chunks that are looked at or joined at most. Real batches and windows hold fewer; a hostile table may hold chunks of one
byte, and the supervisor must not count millions of them for one read. What is left out is only fetched later."""


class BlobMetaInfo:
    """The chunk table of one blob. Chunk ids are positions in it, sorted by uncompressed offset."""

    def __init__(self, segment: Segment) -> None:
        self._records = segment.records
        self._state = segment.state
        self._contexts = segment.contexts
        self.count = segment.count

    def record(self, chunk: int) -> ChunkRecord:
        return ChunkRecord._make(RECORD.unpack_from(self._records, chunk * RECORD.size))

    def is_listed(self, chunk: int) -> bool:
        """Whether the image's metadata describes the chunk, not the blob's alone."""
        return not self.record(chunk).flags & _UNLISTED

    def is_checkable(self, chunk: int) -> bool:
        """Whether there is something by which the chunk's bytes are told from others."""
        return bool(self.record(chunk).flags & CHECKABLE)

    def unit(self, chunk: int) -> range:
        """The chunks that one decoding of `chunk` gives: its batch, its zran context, or itself."""
        record = self.record(chunk)
        if not record.flags & _GROUPED:
            return range(chunk, chunk + 1)
        key = (record.flags & _GROUPED, record.ctx)
        first = chunk
        while first > max(0, chunk - _MANY) and self._key(first - 1) == key:
            first -= 1
        last = chunk
        while last + 1 < min(self.count, chunk + _MANY) and self._key(last + 1) == key:
            last += 1
        return range(first, last + 1)

    def _key(self, chunk: int) -> tuple[int, int]:
        record = self.record(chunk)
        return record.flags & _GROUPED, record.ctx

    def with_units(self, chunks: Iterable[int]) -> list[int]:
        """`chunks` and all that are decoded with them, sorted."""
        out: set[int] = set()
        for chunk in chunks:
            if chunk not in out:
                out.update(self.unit(chunk))
        return sorted(out)

    def ahead(self, after: int, budget: int) -> tuple[list[int], int]:
        """Chunks that follow `after` and are not ready, up to `budget` compressed bytes of blob past its end.

        Also the last chunk within that budget, ready or not.
        """
        out = []
        spent = 0
        end = after
        for chunk in range(after + 1, min(self.count, after + 1 + _MANY)):
            _coff, _uoff, csize, usize, flags, _ctx, _off, _crc = RECORD.unpack_from(self._records, chunk * RECORD.size)
            # A grouped chunk's csize is its whole group's.
            spent += usize if flags & _GROUPED else csize
            if spent > budget:
                break
            end = chunk
            if self._state[chunk] != READY:
                out.append(chunk)
        return out, end

    def span(self, chunks: Sequence[int]) -> tuple[int, int]:
        """Offset and length in the stored blob of what has to be fetched to decode all of these."""
        return fetch_range([self.record(chunk) for chunk in chunks], self._contexts, 0, len(chunks) - 1)

    def distance(self, first: int, last: int) -> int:
        """Stored bytes from the start of one chunk to the start of another, 0 if they are not in this order."""
        return max(self.record(last).coff - self.record(first).coff, 0)

    def ranges(self, chunks: Sequence[int], limit: int, gap: int) -> list[list[int]]:
        """Cut sorted ids into backend requests: neighbours in the stored blob, with gaps of up to `gap` bytes between them.

        A request has up to `limit` bytes, and one unit if that is more.
        """
        out: list[list[int]] = []
        start = end = 0
        for chunk in chunks:
            record = self.record(chunk)
            low, high = stored_range(record, self._contexts) if record.usize else (end, end)
            joined = max(end, high) - start
            inside = low >= start and high <= end  # of the same unit, or empty: nothing more to fetch
            near = low >= start and low - end <= gap and joined <= limit and len(out[-1]) < _MANY if out else False
            if out and (inside or near):
                out[-1].append(chunk)
                end = max(end, high)
            else:
                out.append([chunk])
                start, end = low, high
        return out

    def plain_bytes(self, chunks: Iterable[int]) -> int:
        return sum(self.record(chunk).usize for chunk in chunks)

    def bytes_of(self, states: memoryview) -> int:
        """Plain bytes of the chunks that are ready."""
        sizes = RECORD.iter_unpack(self._records)
        return sum(record[3] for record, state in zip(sizes, states, strict=True) if state == READY)

    def split(self, chunks: Sequence[int], limit: int) -> list[list[int]]:
        """Cut sorted ids into jobs: each of about `limit` plain bytes, and one unit if that is more."""
        jobs: list[list[int]] = []
        size = 0
        key: tuple[int, int] | None = None
        for chunk in chunks:
            record = self.record(chunk)
            own = (record.flags & _GROUPED, record.ctx)
            joined = bool(own[0]) and own == key
            full = size + record.usize > limit and not joined
            if not jobs or full or len(jobs[-1]) >= _MANY:
                jobs.append([])
                size = 0
            jobs[-1].append(chunk)
            size += record.usize
            key = own
        return jobs
