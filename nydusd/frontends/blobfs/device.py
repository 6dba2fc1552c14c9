"""The blobs of an image as address ranges, for a file system whose files they are: which chunks a range is made of.

Runs in a FUSE front end. Between the chunks of a blob there may be padding, which belongs to no chunk and reads as zeros: it is
an extent of its own, of the chunk before it, marked by its chunk length. As long as a blob is not opened nothing is known of
its chunks: then the whole range is one extent, with another mark, and its first chunk is asked for; who has it has the blob
opened.
"""

from __future__ import annotations

from nydusd.errors import ScarceError, StaleCacheError
from nydusd.formats.model import Extent
from nydusd.storage.api.device import BlobDevice, Pieces
from nydusd.storage.api.io import BlobIoVec, ChunkRun
from nydusd.storage.state.range_map import RangeMap
from nydusd.storage.state.segment import RECORD

_UNKNOWN, _PADDING = -1, -2
"""Instead of a chunk's length: not cut into chunks yet, and between chunks."""


class RangeDevice(BlobDevice):
    """A `BlobDevice` that is asked for ranges."""

    def size(self, blob: int) -> int | None:
        """Bytes of the uncompressed blob, None while it is not opened."""
        return self._views[blob].segment.identity.size if self._is_open(blob) else None  # type: ignore[union-attr]

    def extents(self, blob: int, offset: int, length: int) -> list[Extent]:
        """The pieces of a range of a blob, in order, as far as the blob reaches."""
        try:
            if self._is_open(blob):
                return self.cut(blob, offset, length)
        except ScarceError:
            pass  # `missing` will say so, to who can wait
        return [Extent(blob, 0, offset, 0, length, _UNKNOWN)]

    def missing(self, vec: BlobIoVec, again: bool = False) -> list[ChunkRun]:
        for extent in vec:
            if extent.chunk_len == _UNKNOWN and not self._is_open(extent.blob):
                return [ChunkRun(extent.blob, 0, 1)]
        pieces = self._known(vec)
        chunks = [piece for piece in pieces if piece.chunk_len != _PADDING]
        if len(chunks) < len(pieces):  # a blob may have no chunk in it, and is to be looked at all the same
            for blob in {piece.blob for piece in pieces}:
                self._is_open(blob)
        return super().missing(chunks, again)

    def settled(self, vec: list[Extent]) -> list[Extent]:
        if not any(map(self._can_be_cut, vec)):
            return vec
        return [
            piece
            for extent in vec
            for piece in (self.cut(extent.blob, extent.uoff, extent.length) if self._can_be_cut(extent) else [extent])
        ]

    def read_into(self, vec: BlobIoVec, buf: memoryview, pieces: Pieces | None = None) -> int:
        known = self._known(vec)
        if pieces is None:
            if all(self._views[extent.blob].fd >= 0 for extent in known):
                return super().read_into(known, buf)  # the cache file has zeros between the chunks: one read for all
            pieces = {}
        done = 0
        for extent in known:
            if extent.chunk_len == _PADDING:
                buf[done : done + extent.length] = bytes(extent.length)
                done += extent.length
            else:
                done += super().read_into([extent], buf[done:], pieces)
        return done

    def _known(self, vec: BlobIoVec) -> list[Extent]:
        """The pieces of `vec`, all of whose blobs are open. Raises StaleCacheError when one is not."""
        pieces = []
        for extent in vec:
            if extent.chunk_len == _UNKNOWN:
                pieces += self.cut(extent.blob, extent.uoff, extent.length)
            else:
                pieces.append(extent)
        return pieces

    def cut(self, blob: int, offset: int, length: int) -> list[Extent]:
        """The same as `extents`, for those who are between `missing` and `read_into`: it takes no look that hides an eviction.

        Raises StaleCacheError when the blob is not open.
        """
        segment = self._views[blob].segment
        if segment is None:
            raise StaleCacheError(f"blob {self._views[blob].blob_id}: no cache file is open")
        end = min(offset + length, segment.identity.size)
        if offset >= end:
            return []
        first, count = RangeMap(segment).chunks_of(offset, end - offset)
        pieces = []
        at = offset
        for chunk in range(first, first + count):
            _, start, _, size, *_ = RECORD.unpack_from(segment.records, chunk * RECORD.size)
            if start > at:
                pieces.append(Extent(blob, max(chunk - 1, 0), at, 0, start - at, _PADDING))
                at = start
            stop = min(start + size, end)
            if stop > at:
                pieces.append(Extent(blob, chunk, start, at - start, stop - at, 0))
                at = stop
        if at < end:
            pieces.append(Extent(blob, max(first + count - 1, 0), at, 0, end - at, _PADDING))
        return pieces

    def _can_be_cut(self, extent: Extent) -> bool:
        return extent.chunk_len == _UNKNOWN and self._views[extent.blob].segment is not None

    def _is_open(self, blob: int) -> bool:
        """To be asked before `missing` only: it notes how often chunks were taken away."""
        return self._views[blob].look()
