"""GUID partition tables: which byte range of a disk is which partition. Pure parsing; the caller reads.

Runs in fetch workers. A table is believed only if its checksums, its place and its bounds are right; where the primary
one at the start of the disk is not, the backup at its end is taken.
"""

from __future__ import annotations

import itertools
import struct
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple
from zlib import crc32

from nydusd.errors import FormatError

BASIC_DATA = uuid.UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")
SECTOR_SIZES = (512, 4096)
MAX_TABLE = 4 << 20
"""Bytes that a table may have: 32768 partitions of the usual 128 bytes."""

_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
"""Signature, revision, header size, header CRC, zero, this sector, the other header's sector, first and last usable
sector, disk GUID, first sector of the table, number of entries, size of an entry, CRC of the table (UEFI 2.10, 5.3.2)."""
_ENTRY = struct.Struct("<16s16sQQQ72s")
"""Type GUID, partition GUID, first sector, last sector (inclusive), attributes, name in UTF-16 (UEFI 2.10, 5.3.3)."""

ReadAt = Callable[[int, int], bytes]
"""Gives that many bytes at an offset, fewer only at the end of the disk."""


class Partition(NamedTuple):
    """One used entry; `offset` and `size` are bytes."""

    number: int
    kind: uuid.UUID
    guid: uuid.UUID
    name: str
    offset: int
    size: int


class _Table(NamedTuple):
    sector: int
    first_usable: int
    last_usable: int
    entry_size: int
    entries: bytes


def read_partitions(
    where: str, read_at: ReadAt, capacity: int, sector_sizes: Sequence[int] = SECTOR_SIZES
) -> list[Partition]:
    """The used partitions of a disk of `capacity` bytes, by number (from 1).

    `sector_sizes` are tried in order. Raises `FormatError` (naming `where`) if neither table is intact, or if the intact
    one names sectors that are not usable, partitions that overlap or a name that is no text.
    """
    wrong = []
    for which in ("primary", "backup"):
        for sector in sector_sizes:
            try:
                table = _read_table(where, which, read_at, capacity, sector)
            except FormatError as error:
                wrong.append(f"{which} at {sector}-byte sectors: {error.field}: {error.message}")
                continue
            return _partitions(where, table)
    raise FormatError(where, "partition table", f"no intact GPT ({'; '.join(wrong)})")


def _read_table(where: str, which: str, read_at: ReadAt, capacity: int, sector: int) -> _Table:
    """The table that the header in the second or the last sector describes. Raises `FormatError` if it is not intact."""
    sectors = capacity // sector
    if sectors < 6:  # a protective MBR, two headers and two tables of at least one sector, one sector to use
        raise FormatError(where, "size", f"{capacity} bytes are too few for a partition table")
    lba = 1 if which == "primary" else sectors - 1
    raw = read_at(lba * sector, sector)
    if len(raw) < sector:
        raise FormatError(where, "header", f"{len(raw)} bytes at {lba * sector}; {sector} are needed")
    (
        signature, _, header_size, header_crc, _, my_lba, _, first_usable, last_usable, _,
        table_lba, count, entry_size, table_crc,
    ) = _HEADER.unpack_from(raw)  # fmt: skip
    if signature != b"EFI PART":
        raise FormatError(where, "signature", "there is none")
    if not _HEADER.size <= header_size <= sector:
        raise FormatError(where, "header size", f"{header_size}; {_HEADER.size} to {sector} are allowed")
    if crc32(raw[:16] + bytes(4) + raw[20:header_size]) != header_crc:
        raise FormatError(where, "header CRC", f"the header does not have {header_crc:#010x}")
    if my_lba != lba:
        raise FormatError(where, "header sector", f"{my_lba}; the header is in sector {lba}")
    if not 1 < first_usable <= last_usable < sectors - 1:
        raise FormatError(where, "usable sectors", f"{first_usable} to {last_usable} of {sectors}")
    if entry_size < _ENTRY.size or entry_size & (entry_size - 1):
        raise FormatError(where, "entry size", f"{entry_size}; 128 times a power of two is allowed")
    size = count * entry_size
    if not 0 < size <= MAX_TABLE:
        raise FormatError(where, "table size", f"{count} entries of {entry_size} bytes; up to {MAX_TABLE} are allowed")
    end = table_lba + -(-size // sector)
    if table_lba < 2 or end > sectors or (table_lba <= last_usable and end > first_usable):
        raise FormatError(where, "table sector", f"{table_lba} to {end} of {sectors}, inside of what is for partitions")
    entries = read_at(table_lba * sector, size)
    if len(entries) < size or crc32(entries) != table_crc:
        raise FormatError(where, "table CRC", f"the {size} bytes at sector {table_lba} do not have {table_crc:#010x}")
    return _Table(sector, first_usable, last_usable, entry_size, entries)


def _partitions(where: str, table: _Table) -> list[Partition]:
    found = []
    for number, at in enumerate(range(0, len(table.entries), table.entry_size), start=1):
        kind, guid, first, last, _, raw_name = _ENTRY.unpack_from(table.entries, at)
        if not any(kind):
            continue
        field = f"partition {number}"
        if not table.first_usable <= first <= last <= table.last_usable:
            allowed = f"{table.first_usable} to {table.last_usable} are there for partitions"
            raise FormatError(where, field, f"is sectors {first} to {last}; {allowed}")
        name = _name(where, field, raw_name)
        offset, size = first * table.sector, (last - first + 1) * table.sector
        found.append(Partition(number, uuid.UUID(bytes_le=kind), uuid.UUID(bytes_le=guid), name, offset, size))
    by_place = sorted(found, key=lambda partition: partition.offset)
    for left, right in itertools.pairwise(by_place):
        if left.offset + left.size > right.offset:
            raise FormatError(where, f"partition {right.number}", f"overlaps partition {left.number}")
    return found


def _name(where: str, field: str, raw: bytes) -> str:
    """Up to 36 UTF-16 units, ended by a zero."""
    end = next((at for at in range(0, len(raw), 2) if raw[at : at + 2] == b"\0\0"), len(raw))
    try:
        return raw[:end].decode("utf-16-le")
    except UnicodeDecodeError:
        raise FormatError(where, field, f"has a name that is not UTF-16: {raw[:end].hex()}") from None
