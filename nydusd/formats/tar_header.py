"""The 512-byte GNU tar headers inside native blobs. Pure parsing, any process.

A builder writes each header *after* the region that it describes and pads nothing, so a blob is no valid tar: readers
start at the end and walk backwards.
"""

from __future__ import annotations

from typing import NamedTuple

from nydusd.errors import FormatError

TAR_HEADER_SIZE = 512

_GNU_MAGIC = b"ustar  \0"
_CHECKSUM = slice(148, 156)


class TarHeader(NamedTuple):
    """`name` and the length in bytes of the region that ends where the header starts."""

    name: str
    size: int


def is_tar_header(block: bytes | bytearray | memoryview) -> bool:
    """Whether these 512 bytes claim to be a GNU tar header."""
    return len(block) == TAR_HEADER_SIZE and bytes(block[257:265]) == _GNU_MAGIC


def parse_tar_header(block: bytes | bytearray | memoryview, where: str) -> TarHeader:
    """Read one GNU header of a regular file. Raises `FormatError` for anything else, or a wrong checksum."""
    raw = bytes(block)
    if not is_tar_header(raw):
        raise FormatError(where, "tar header", f"no GNU tar header in {len(raw)} bytes (magic 'ustar  ' expected)")
    if raw[156:157] not in (b"0", b"\0"):
        raise FormatError(where, "tar header", f"entry type {raw[156:157]!r}; it must be a regular file ('0')")
    checksum = sum(raw) - sum(raw[_CHECKSUM]) + 8 * ord(" ")
    if _number(raw[_CHECKSUM], where, "checksum") != checksum:
        raise FormatError(where, "tar header", f"checksum field {raw[_CHECKSUM]!r} is not {checksum:o} (octal)")
    name = raw[:100].split(b"\0", 1)[0]
    if not name.isascii():
        raise FormatError(where, "tar header", f"name {name!r} is not ASCII")
    return TarHeader(name.decode("ascii"), _number(raw[124:136], where, "size"))


def _number(field: bytes, where: str, what: str) -> int:
    """Octal digits ended by NUL or space, or (first bit set) a big-endian binary number, as GNU tar writes > 8 GiB."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (len(field) * 8 - 1)) - 1)
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if not digits or digits.strip(b"01234567"):
        raise FormatError(where, "tar header", f"{what} field {field!r} is not an octal number")
    return int(digits, 8)
