"""The 80-byte chunk info: what v5 stores after each regular file's inode and v6 in its chunk table.

Pure parsing, used by whoever builds chunk records from a bootstrap and by the v5 parser on every read.
"""

from __future__ import annotations

from struct import Struct

from nydusd.formats.model import RawChunk

CHUNK_INFO_SIZE = 80

CHUNK_INFO = Struct("<32sIIIIQQQII")
"""digest, blob index, flags, compressed size, uncompressed size, compressed offset, uncompressed offset, file offset,
index in the blob, crc: the order of `RawChunk`. Flags: 1 compressed, 2 hole, 4 encrypted, 8 batch, 0x10 has crc."""

CHUNK_PLACE = Struct("<32xI4x4xI8xQQI4x")
"""The same record without what a file read does not need: blob index, uncompressed size and offset, file offset, index."""


def read_chunk_info(buf: memoryview, at: int) -> RawChunk:
    """The chunk info at `at`. The caller has made sure that 80 bytes are there."""
    return RawChunk._make(CHUNK_INFO.unpack_from(buf, at))
