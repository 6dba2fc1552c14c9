"""Several segments over one data file: which there are, and whether their chunk tables may use the file side by side.

A data file has a segment for each bootstrap and each configuration of a backend under which images use its blob, in this daemon
and in others that share the cache folder. Bootstraps of images with a layer in common list different parts of its chunks
(files that upper layers removed or replaced), and what they list they agree on. So chunks that two tables both list, with all
that is said of them, digest included, are the same: whoever fetched and checked such a chunk did it for the other, too.
Tables that contradict each other must not share a file: each would write its own bytes, verified, over those of the other.

Segments are published under the data file's lock (`workers/prepare.py`): whoever holds it sees all that use the file. One
of a daemon that was killed counts as well, for its successor believes it, and its readers may read still; one of a daemon that
is gone for good is removed before chunks are taken out, or where it contradicts (`gone.py`). Runs in workers; `vouches` and
`is_same_place` in the supervisor, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nydusd.errors import CacheError, FormatError, ScarceError, cache_error, is_scarce
from nydusd.formats.model import ChunkFlag
from nydusd.storage.state.names import SHM
from nydusd.storage.state.segment import DIGEST_SIZE, READY, RECORD, Segment, boot_id, file_of

if TYPE_CHECKING:
    from nydusd.storage.cache.chunk_table import ChunkTable

_KIND = int(ChunkFlag.COMPRESSED | ChunkFlag.ENCRYPTED | ChunkFlag.BATCH | ChunkFlag.ZRAN)
_UNLISTED = int(ChunkFlag.UNLISTED)
_PIECE = 1 << 18
"""Bytes that are compared at once."""
_Bytes = bytes | bytearray | memoryview


_known: dict[tuple[str, int], tuple[int, int] | None] = {}
"""By name and inode of what is in shared memory: of which data file it speaks. That never changes; there may be thousands."""


def segments_of(dev: int, ino: int) -> Iterator[Segment]:
    """All segments that speak of this data file, each open until the next is asked for.

    Raises CacheError when they cannot be listed, ScarceError when one cannot be looked at now: it may be of this file.
    """
    for name in _names_of(dev, ino):
        try:
            segment = Segment.open(f"/{name}")
        except ScarceError:
            raise
        except (CacheError, FormatError):
            continue  # one of another version, whose daemon has the file open
        if segment is not None:
            try:
                yield segment
            finally:
                segment.close()


def _names_of(dev: int, ino: int) -> list[str]:
    global _known
    try:
        with os.scandir(SHM) as entries:
            here = [(entry.name, entry.inode()) for entry in entries if entry.name.startswith("nydusd.")]
    except OSError as e:
        raise cache_error(str(SHM), e) from e
    _known = {key: _known[key] if key in _known else _file_of(key[0]) for key in here}
    return [name for (name, _), file in _known.items() if file == (dev, ino)]


def _file_of(name: str) -> tuple[int, int] | None:
    path = SHM / name
    try:
        # What another user has put there is believed in nothing.
        return file_of(path) if path.lstat().st_uid in (0, os.geteuid()) else None
    except OSError as e:
        if is_scarce(e):
            raise cache_error(f"shared memory /{name}", e) from e
        return None


def contradiction(segment: Segment, table: ChunkTable) -> str:
    """Why a table must not use the data file of a segment; "" if both may."""
    if (segment.count, segment.identity.size) != (table.count, table.uncompressed_size):
        return (
            f"{segment.count} chunks in {segment.identity.size} bytes there, "
            f"{table.count} in {table.uncompressed_size} here"
        )
    if not _same(segment.contexts, table.contexts):
        return "other contexts of batches or compressed streams"
    same_digests = _same(segment.digests, table.digests)
    if same_digests and _same(segment.records, table.records):
        return ""
    end = 0
    pairs = zip(RECORD.iter_unpack(segment.records), RECORD.iter_unpack(table.records), strict=True)
    for chunk, (there, here) in enumerate(pairs):
        known = here if here[3] else there
        if known[3]:
            # Each table has its own chunks side by side; both together must have, too.
            if known[1] < end:
                return f"chunk {chunk} lies over the one before it"
            end = known[1] + known[3]
        if not here[3] or not there[3]:
            continue
        if _place(there) != _place(here):
            return f"chunk {chunk} is in another place"
        # Who does not list a chunk never writes it to the file.
        if (there[4] | here[4]) & _UNLISTED:
            continue
        at = slice(chunk * DIGEST_SIZE, (chunk + 1) * DIGEST_SIZE)
        if there != here or (not same_digests and segment.digests[at] != table.digests[at]):
            return f"chunk {chunk} is checked by another digest or checksum"
    return ""


def _same(there: _Bytes, here: _Bytes) -> bool:
    """Whether two areas are equal. Piece by piece, as bytes: views are compared item by item, far more slowly."""
    return len(there) == len(here) and all(
        bytes(there[at : at + _PIECE]) == bytes(here[at : at + _PIECE]) for at in range(0, len(there), _PIECE)
    )


def _place(record: tuple[int, ...]) -> tuple[int, ...]:
    """All of a record but how the chunk is checked."""
    coff, uoff, csize, usize, flags, ctx, ctx_off, _crc = record
    return coff, uoff, csize, usize, flags & _KIND, ctx, ctx_off


def ready_in(segment: Segment, table: Segment | ChunkTable) -> Iterator[int]:
    """Chunks that a segment of the same data file knows as ready, and that are so by another table.

    They were written, and read right for as long as the kernel lives.
    """
    if segment.count != table.count or segment.boot_id != boot_id():
        return
    same = _same(segment.digests, table.digests) and _same(segment.records, table.records)
    for chunk, value in enumerate(bytes(segment.state)):
        if value == READY and (same or vouches(segment, table, chunk)):
            yield chunk


def vouches(segment: Segment, table: Segment | ChunkTable, chunk: int) -> bool:
    """Whether a chunk that is ready by a segment is ready by another table of the same data file, too.

    So it is if both say the same of it; or if the other one does not list it, and so knows nothing to check it by.
    """
    there, here = _record(segment, chunk), _record(table, chunk)
    if here[4] & _UNLISTED:
        return _place(there) == _place(here)
    at = slice(chunk * DIGEST_SIZE, (chunk + 1) * DIGEST_SIZE)
    return there == here and bool(segment.digests[at] == table.digests[at])


def is_same_place(one: Segment, other: Segment, chunk: int) -> bool:
    """Whether a chunk has the same place by two segments of a data file."""
    return _place(_record(one, chunk)) == _place(_record(other, chunk))


def _record(table: Segment | ChunkTable, chunk: int) -> tuple[int, ...]:
    return RECORD.unpack_from(table.records, chunk * RECORD.size)
