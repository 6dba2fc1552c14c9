"""An inode's record in a RAFS v5 bootstrap: decoded, and checked in each field, when it is used for the first time.

Pure parsing of untrusted bytes, for `RafsV5`, which keeps what comes out.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from nydusd.errors import FormatError
from nydusd.formats.chunk_info import CHUNK_INFO_SIZE
from nydusd.formats.model import Inode
from nydusd.formats.superblock import (
    DEVICES,
    FILE_TYPES,
    MAX_FILE_SIZE,
    MAX_SYMLINK,
    S_IFDIR,
    S_IFLNK,
    S_IFMT,
    S_IFREG,
)

ROOT_INO = 1
MAX_STORED_NAME = 256  # old builders stored the size rounded up, with the NULs

_MAX_XATTRS = 1 << 24  # ours: far above what Linux lets a file have, and they are decoded in memory
_U64 = Struct("<Q")
_RECORD = Struct("<32xQQIIIIQQQIIIHHIIQ8x")
"""parent, ino, uid, gid, projid, mode, size, blocks, flags, nlink, child index, child count, name size, symlink size,
rdev, mtime nanoseconds, mtime. The digest in front is not used."""
RECORD_SIZE = _RECORD.size
_FLAG_XATTR = 4
_FLAG_HOLES = 8


class Node(NamedTuple):
    """A decoded inode. `target` is where a symlink's target begins, `xattr` where the xattrs do (0: none) and `chunks`
    where the chunk infos do. `first` is the slot of the first child and `number` counts the children, or chunks."""

    inode: Inode
    parent: int
    first: int
    number: int
    target: int
    target_size: int
    xattr: int
    chunks: int
    holes: bool


def inode_error(where: str, ino: int, field: str, message: str) -> FormatError:
    """What is wrong with a field of an inode of the file `where`."""
    return FormatError(where, field, f"inode {ino}: {message}")


def read_inode(
    buf: memoryview, where: str, at: int, ino: int, entries: int, chunk_size: int, owner: tuple[int, int] | None
) -> Node:
    """The inode of slot `ino`, whose record is at `at`: 128 bytes are there. Raises FormatError.

    `entries` are the slots of the table; `owner` is who owns all files, None for who is stored.
    """
    end = len(buf)
    (
        parent,
        stored_ino,
        uid,
        gid,
        _,
        mode,
        size,
        blocks,
        flags,
        nlink,
        first,
        count,
        name_size,
        target_size,
        rdev,
        mtime_ns,
        mtime,
    ) = _RECORD.unpack_from(buf, at)
    if stored_ino != ino:
        raise inode_error(where, ino, "inode.ino", f"{stored_ino} must be the slot in the table")
    if nlink == 0:
        raise inode_error(where, ino, "inode.nlink", "0 must be at least 1")
    kind = mode & S_IFMT
    if kind not in FILE_TYPES:
        raise inode_error(where, ino, "inode.mode", f"{mode:#o} is no known type of file")
    if size > MAX_FILE_SIZE:
        raise inode_error(where, ino, "inode.size", f"{size} must be at most {MAX_FILE_SIZE}")
    if ino != ROOT_INO and ((parent >= ino and (kind == S_IFDIR or nlink == 1)) or not 0 < parent <= entries):
        raise inode_error(where, ino, "inode.parent", f"{parent} must be 1 to {ino - 1}")
    if not 0 < name_size <= MAX_STORED_NAME:
        raise inode_error(where, ino, "inode.name_size", f"{name_size} must be 1 to {MAX_STORED_NAME}")
    target = at + RECORD_SIZE + (name_size + 7 & ~7)
    xattr = target
    if kind == S_IFLNK:
        if not 0 < target_size <= MAX_SYMLINK:
            raise inode_error(where, ino, "inode.symlink_size", f"{target_size} must be 1 to {MAX_SYMLINK}")
        xattr += target_size + 7 & ~7
    after = xattr
    if flags & _FLAG_XATTR:
        after = _after_xattrs(buf, where, ino, xattr)
    else:
        xattr = 0
    if after > end:
        raise inode_error(
            where, ino, "inode.name_size", f"the record ends at {after}, beyond the end of the file, {end}"
        )
    if kind == S_IFREG:
        needed = -(-size // chunk_size)
        holes = bool(flags & _FLAG_HOLES)
        if count < needed and not holes:
            raise inode_error(
                where, ino, "inode.child_count", f"{count} chunks must be at least {needed} for {size} bytes"
            )
        if after + CHUNK_INFO_SIZE * count > end:
            raise inode_error(where, ino, "inode.child_count", f"{count} chunks at {after} are beyond the end, {end}")
    else:
        holes = False
        if kind == S_IFDIR and count and (first <= ino or first + count - 1 > entries):
            rule = f"must be slots from {ino + 1} to {entries}"
            raise inode_error(where, ino, "inode.child_index", f"{count} children from {first} {rule}")
    if owner:
        uid, gid = owner
    inode = Inode(ino, mode, nlink, uid, gid, size, blocks, mtime, mtime_ns, rdev if kind in DEVICES else 0)
    return Node(inode, parent, first, count, target, target_size, xattr, after, holes)


def _after_xattrs(buf: memoryview, where: str, ino: int, at: int) -> int:
    """What follows the xattrs at `at`: u64 size, then that many bytes, padded to 8."""
    end = len(buf)
    if at + 8 > end:
        raise inode_error(where, ino, "xattr.size", f"its place {at} is beyond the end of the file, {end}")
    size: int = _U64.unpack_from(buf, at)[0]
    after = at + 8 + (size + 7 & ~7)
    if size > _MAX_XATTRS:
        raise inode_error(where, ino, "xattr.size", f"{size} must be at most {_MAX_XATTRS}")
    if after > end:
        raise inode_error(where, ino, "xattr.size", f"{size} bytes at {at + 8} are beyond the end of the file, {end}")
    return after
