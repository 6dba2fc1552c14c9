"""Where the stored bytes of chunks are in their blob: what has to be fetched to decode them.

Pure, and light: used by the supervisor, which must not load the codecs, and by workers.
"""

from __future__ import annotations

from collections.abc import Sequence

from nydusd.formats.blob_meta import zran_context
from nydusd.formats.model import ChunkFlag, ChunkRecord

Buffer = bytes | bytearray | memoryview

_ZRAN = int(ChunkFlag.ZRAN)


def stored_range(record: ChunkRecord, contexts: Buffer) -> tuple[int, int]:
    """First byte and end of what has to be fetched from the blob to decode this chunk."""
    if record.flags & _ZRAN:
        ctx = zran_context(contexts, record.ctx)
        return ctx.in_offset, ctx.in_offset + ctx.in_len
    return record.coff, record.coff + record.csize


def fetch_range(records: Sequence[ChunkRecord], contexts: Buffer, first: int, last: int) -> tuple[int, int]:
    """Offset and length in the stored blob of all that is needed to decode `records[first]` to `records[last]`.

    Whole batches and whole zran contexts. Chunks of 0 bytes need nothing; (0, 0) if there are no others.
    """
    start, end = -1, 0
    for index in range(first, last + 1):
        record = records[index]
        if record.usize:
            low, high = stored_range(record, contexts)
            start = low if start < 0 else min(start, low)
            end = max(end, high)
    return (start, end - start) if start >= 0 else (0, 0)
