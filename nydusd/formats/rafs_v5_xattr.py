"""Extended attributes of a v5 inode, stored after its name and symlink target.

Pure parsing of untrusted bytes, called by front ends for getxattr and listxattr.
"""

from __future__ import annotations

from struct import Struct

from nydusd.errors import FormatError
from nydusd.formats.superblock import MAX_NAME

_PAIR = Struct("<I")


def read_xattrs(area: memoryview, where: str, ino: int) -> dict[bytes, bytes]:
    """The attributes in `area`, by full name: pairs of a u32 length and as many bytes, name, NUL and value.

    A pair without NUL has no value and no meaning and is passed over. Raises `FormatError` for what breaks the format.
    """
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(area):
        left = len(area) - at - _PAIR.size
        length = _PAIR.unpack_from(area, at)[0] if left >= 0 else 0
        if not 0 < length <= left:
            raise FormatError(
                where, "xattr.pair_size", f"inode {ino}: {length} must be 1 to the {max(left, 0)} bytes left"
            )
        at += _PAIR.size
        name, separator, value = bytes(area[at : at + length]).partition(b"\0")
        at += length
        if not separator:
            continue
        if not 0 < len(name) <= MAX_NAME:
            raise FormatError(where, "xattr.name", f"inode {ino}: {len(name)} bytes must be 1 to {MAX_NAME}")
        if name in found:
            raise FormatError(where, "xattr.name", f"inode {ino}: {name!r} is there twice")
        found[name] = value
    return found
