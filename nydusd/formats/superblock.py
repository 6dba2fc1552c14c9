"""What the superblocks of RAFS v5 and v6 share: flag bits, limits, and the check of where tables may lie.

Pure parsing of untrusted bytes, used by every process that opens a bootstrap. Nothing here outlives a call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from enum import IntFlag
from typing import NamedTuple

from nydusd.errors import FormatError
from nydusd.formats.model import Compressor, Digester

MIN_CHUNK_SIZE = 0x1000
MAX_CHUNK_SIZE = 0x1000000
MAX_NAME = 255
MAX_SYMLINK = 4096
MAX_FILE_SIZE = (1 << 63) - 1

S_IFMT = 0xF000
S_IFDIR = 0x4000
S_IFREG = 0x8000
S_IFLNK = 0xA000
DEVICES = frozenset((0x2000, 0x6000))
FILE_TYPES = frozenset((0x1000, 0x2000, S_IFDIR, 0x6000, S_IFREG, S_IFLNK, 0xC000))
"""Permitted values of `mode & S_IFMT`. Shifted right by 12 each is its d_type."""


class SuperFlag(IntFlag):
    """Flags of the superblock: the same bits in v5 and in the extended superblock of v6."""

    COMPRESSOR_NONE = 0x1
    COMPRESSOR_LZ4 = 0x2
    DIGESTER_BLAKE3 = 0x4
    DIGESTER_SHA256 = 0x8
    EXPLICIT_UID_GID = 0x10
    HAS_XATTR = 0x20
    COMPRESSOR_GZIP = 0x40
    COMPRESSOR_ZSTD = 0x80
    INLINED_CHUNK_DIGEST = 0x100
    TARFS = 0x200
    NOT_ENCRYPTED = 0x01000000
    AES_128_XTS = 0x02000000


_RESERVED_COMPATIBLE = 0xFC000000
_KNOWN = sum(SuperFlag) | _RESERVED_COMPATIBLE

# In the order in which they win when several bits are set.
_COMPRESSORS = (
    (SuperFlag.COMPRESSOR_NONE, Compressor.NONE),
    (SuperFlag.COMPRESSOR_LZ4, Compressor.LZ4_BLOCK),
    (SuperFlag.COMPRESSOR_GZIP, Compressor.GZIP),
    (SuperFlag.COMPRESSOR_ZSTD, Compressor.ZSTD),
)
_COMPRESSOR_BITS = sum(bit for bit, _ in _COMPRESSORS)
_DIGESTER_BITS = SuperFlag.DIGESTER_BLAKE3 | SuperFlag.DIGESTER_SHA256


class Table(NamedTuple):
    """A region of the bootstrap: its name for messages, its first byte and its length, in bytes."""

    name: str
    offset: int
    length: int


Require = Callable[[bool, str, int, str], None]
"""(ok, field, value, rule): raises `FormatError` unless ok."""


def requirer(where: str, prefix: str) -> Require:
    """A `Require` for the fields below `prefix` in the file `where`."""

    def require(ok: bool, field: str, value: int, rule: str) -> None:
        if not ok:
            raise FormatError(where, f"{prefix}.{field}", f"{value:#x} {rule}")

    return require


def check_flags(where: str, flags: int, *, exact: bool) -> None:
    """Refuse unknown bits; with `exact` (v6) also anything but one compressor bit and one digest bit."""
    if flags & ~_KNOWN:
        raise FormatError(where, "superblock.flags", f"{flags:#x} has unknown bits {flags & ~_KNOWN:#x}")
    if exact:
        for name, bits in (("compressor", _COMPRESSOR_BITS), ("digest", int(_DIGESTER_BITS))):
            if (flags & bits).bit_count() != 1:
                raise FormatError(where, "superblock.flags", f"{flags:#x} must have exactly one {name} bit")


def flags_compressor(flags: int) -> Compressor:
    """The compressor that the flags name; lz4 when they name none, as images from before these bits need."""
    return next((value for bit, value in _COMPRESSORS if flags & bit), Compressor.LZ4_BLOCK)


def flags_digester(flags: int) -> Digester:
    """The digest algorithm that the flags name; blake3 when they name both or none."""
    return Digester.SHA256 if flags & _DIGESTER_BITS == SuperFlag.DIGESTER_SHA256 else Digester.BLAKE3


def check_chunk_size(where: str, field: str, size: int) -> None:
    """A chunk size is a power of two from 4 KiB to 16 MiB."""
    if not MIN_CHUNK_SIZE <= size <= MAX_CHUNK_SIZE or size & (size - 1):
        raise FormatError(where, field, f"{size:#x} must be a power of two from 0x1000 to 0x1000000")


def check_tables(where: str, tables: Iterable[Table], floor: int, end: int) -> None:
    """Every table that is not empty lies in [floor, end) and no two share a byte."""
    previous = Table("superblock", 0, floor)
    for table in sorted((t for t in tables if t.length), key=lambda t: t.offset):
        if table.offset < floor or table.offset + table.length > end:
            raise FormatError(
                where,
                f"superblock.{table.name}",
                f"{table.length} bytes at {table.offset} must be within {floor} and the end of the file, {end}",
            )
        if table.offset < previous.offset + previous.length:
            raise FormatError(
                where,
                f"superblock.{table.name}",
                f"{table.length} bytes at {table.offset} overlap the {previous.name}, which ends at "
                f"{previous.offset + previous.length}",
            )
        previous = table


def owner_for_all(flags: int) -> tuple[int, int] | None:
    """Who owns every inode of an image whose stored uid and gid do not count: this process's effective ids."""
    return None if flags & SuperFlag.EXPLICIT_UID_GID else (os.geteuid(), os.getegid())


def name_fault(name: bytes) -> str | None:
    """What is wrong with the name of a directory entry: None when nothing is."""
    if not name:
        return "is empty"
    if len(name) > MAX_NAME:
        return f"is {len(name)} bytes long, the limit is {MAX_NAME}"
    if b"/" in name or b"\0" in name:
        return f"{name!r} holds a slash or a NUL"
    return None


TIMEOUT_FACT = {"secs": 1 << 32, "nanos": 0}
"""The attribute and entry time-out that the reference reports for every image."""
