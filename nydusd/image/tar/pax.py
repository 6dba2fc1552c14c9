"""PAX extended headers: records whose values may hold any byte, newlines and NULs included. Pure."""

from __future__ import annotations

import base64
import binascii
import urllib.parse
from collections.abc import Iterator

from nydusd.image.errors import ImageError
from nydusd.image.tar.numbers import decimal

MAX_SIZE = 16 << 20
"""Bytes of one extended header: room for 255 attributes of 64 KiB."""

_SCHILY = b"SCHILY.xattr."
_LIBARCHIVE = b"LIBARCHIVE.xattr."
_SELINUX = b"RHT.security.selinux"

Records = list[tuple[bytes, bytes]]
"""Key and value in the order of the file: sparse maps repeat keys."""


def parse(data: bytes, where: str) -> Records:
    """The records of a header. Each begins with its own length, so nothing in a value can end it.

    Raises `ImageError` for a header that is not made of whole records.
    """
    records = []
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 21)
        if space < 0:
            raise ImageError(f"{where}: extended header: a record without length at byte {at}")
        length = decimal(data[at:space], f"{where}: extended header: length of a record")
        end = at + length
        record = data[space + 1 : end]
        key, equals, value = record.partition(b"=")
        if end > len(data) or not record.endswith(b"\n") or not equals or not key:
            raise ImageError(f"{where}: extended header: the record at byte {at} is no `length key=value` line")
        records.append((key, value[:-1]))
        at = end
    return records


def xattrs(records: Records, where: str) -> dict[bytes, bytes]:
    """The extended attributes among the records, by the names that Linux has for them."""
    found = {}
    for key, value in records:
        if key.startswith(_SCHILY):
            found[key[len(_SCHILY) :]] = value
        elif key.startswith(_LIBARCHIVE):
            name = urllib.parse.unquote_to_bytes(key[len(_LIBARCHIVE) :])
            try:
                decoded = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
            except binascii.Error as error:
                raise ImageError(f"{where}: attribute {name!r} is no base64") from error
            found.setdefault(name, decoded)  # bsdtar writes both forms; the other one is not encoded
        elif key == _SELINUX:
            found.setdefault(b"security.selinux", value)
    return found


def sparse_map(records: Records) -> Iterator[tuple[bytes, bytes]]:
    """The pairs (offset, length) of the two old PAX forms of a sparse file, as text."""
    joined = dict(records).get(b"GNU.sparse.map")
    if joined is not None:
        numbers = joined.split(b",") if joined else []
        yield from zip(numbers[::2], numbers[1::2], strict=False)
        return
    offset = None
    for key, value in records:
        if key == b"GNU.sparse.offset":
            offset = value
        elif key == b"GNU.sparse.numbytes" and offset is not None:
            yield offset, value
            offset = None
