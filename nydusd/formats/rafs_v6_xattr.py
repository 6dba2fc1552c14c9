"""Extended attributes of a v6 inode, stored inline right after it.

Pure parsing of untrusted bytes, called by front ends for getxattr and listxattr.
"""

from __future__ import annotations

from struct import Struct

from nydusd.errors import FormatError
from nydusd.formats.superblock import MAX_NAME

_HEADER = 12
_SHARED_COUNT_AT = 4
_ENTRY = Struct("<BBH")
"""Length of the name's suffix, index of its prefix, size of the value; then suffix and value; padded to 4."""

_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
_WHOLE_NAMES = (2, 3)


def read_xattrs(area: memoryview, where: str, ino: int) -> dict[bytes, bytes]:
    """The attributes in `area`, by full name. Raises `FormatError` for an entry that breaks the format."""

    def bad(field: str, message: str) -> FormatError:
        return FormatError(where, f"xattr.{field}", f"inode {ino}: {message}")

    if area[_SHARED_COUNT_AT]:
        raise bad("shared_count", f"{area[_SHARED_COUNT_AT]} must be 0: shared xattrs are not used")
    found: dict[bytes, bytes] = {}
    at = _HEADER
    while at < len(area):
        name_len, index, value_size = _ENTRY.unpack_from(area, at)
        at += _ENTRY.size
        if index not in _PREFIXES:
            raise bad("name_index", f"{index} is none of {sorted(_PREFIXES)}")
        if name_len + value_size > len(area) - at:
            raise bad("value_size", f"name {name_len} and value {value_size} exceed the {len(area) - at} bytes left")
        name = _PREFIXES[index] + bytes(area[at : at + name_len])
        if len(name) > MAX_NAME or b"\0" in name or (name_len == 0) != (index in _WHOLE_NAMES):
            raise bad("name", f"{name!r} is no name of an attribute")
        if name in found:
            raise bad("name", f"{name!r} is there twice")
        found[name] = bytes(area[at + name_len : at + name_len + value_size])
        at += (name_len + value_size + 3) & ~3
    return found
