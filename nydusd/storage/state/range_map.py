"""RangeMap: the same question as ChunkMap, asked in bytes of the virtual uncompressed blob.

For callers that know addresses and no chunks (blobfs, fscache, fanotify, block export). A range is ready when every chunk
that touches it is. Padding between chunks belongs to none, and reads as zeros.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from nydusd.errors import CacheError
from nydusd.storage.state.chunk_map import ChunkMap
from nydusd.storage.state.segment import RECORD, Segment


class RangeMap:
    """Address ranges over a blob whose chunks are sorted by uncompressed offset."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._chunks = ChunkMap(segment)

    def _place(self, chunk: int) -> tuple[int, int]:
        """Offset and size of a chunk in the uncompressed blob."""
        _coff, uoff, _csize, usize, *_ = RECORD.unpack_from(self._segment.records, chunk * RECORD.size)
        return uoff, usize

    def chunks_of(self, offset: int, size: int) -> tuple[int, int]:
        """(first, count) of the chunks that touch [offset, offset + size). Raises CacheError for a range outside.

        Chunks of 0 bytes between two that touch it are counted in.
        """
        limit = -(-self._segment.identity.size // 4096) * 4096
        if size <= 0 or offset < 0 or offset + size > limit:
            raise CacheError(f"range {offset}+{size} is outside the blob's {limit} bytes")
        ids = range(self._segment.count)
        first = bisect_right(ids, offset, key=lambda chunk: sum(self._place(chunk)))
        end = bisect_left(ids, offset + size, key=lambda chunk: self._place(chunk)[0])
        return first, max(end - first, 0)
