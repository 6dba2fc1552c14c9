"""All FUSE requests but READ, answered straight from the image's metadata.

Runs in a front-end process, called by its loop. A handler gets the node id and the request's body, and gives the reply's
body, an errno (an int greater than 0), or None where the protocol wants no reply. What it raises the loop turns into
an errno (a body that is shorter than its structure raises struct.error). Handlers keep nothing between calls.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from nydusd.errors import FormatError
from nydusd.formats.model import Inode

from . import protocol as p
from .mount import Mount

Handler = Callable[[int, memoryview], "bytes | int | None"]

FOREVER = 1 << 32
"""Seconds that the kernel may keep attributes and entries, absent ones included: an image never changes."""

NAME_MAX = 255
_W_OK = 2
_U64 = (1 << 64) - 1
_U32 = (1 << 32) - 1
_EMPTY = b""

_READ_ONLY = (
    p.SETATTR,
    p.SYMLINK,
    p.MKNOD,
    p.MKDIR,
    p.UNLINK,
    p.RMDIR,
    p.RENAME,
    p.LINK,
    p.WRITE,
    p.SETXATTR,
    p.REMOVEXATTR,
    p.CREATE,
    p.FALLOCATE,
    p.RENAME2,
    p.COPY_FILE_RANGE,
    p.TMPFILE,
)


class Operations:
    """The handlers of one mount. `flags` are those of INIT: they say whether OPEN and OPENDIR may be refused for good.

    `covers` names the folders (inode of the parent, name) in whose place another mount's root is seen, and the index of
    that mount; `root_entry(index)` gives that root.
    """

    def __init__(self, mount: Mount, flags: int, root_entry: Callable[[int], tuple[int, ...]]) -> None:
        self._mount = mount
        self.covers: dict[tuple[int, bytes], int] = {}
        self._entry_of_root = root_entry
        # ENOSYS tells the kernel never to ask again in the whole session, so it is for the image that had it alone.
        self._no_xattr: bytes | int = errno.ENOSYS if mount.index == 0 else errno.ENODATA
        self._bootstrap = mount.bootstrap
        self._xattr = mount.xattr or mount.bootstrap.has_xattr
        keep = p.OPEN_OUT.pack(0, p.FOPEN_KEEP_CACHE, 0)
        keep_dir = p.OPEN_OUT.pack(0, p.FOPEN_KEEP_CACHE | p.FOPEN_CACHE_DIR, 0)
        self._open_reply: bytes | int = errno.ENOSYS if flags & p.NO_OPEN_SUPPORT else keep
        self._opendir_reply: bytes | int = errno.ENOSYS if flags & p.NO_OPENDIR_SUPPORT else keep_dir
        self._statfs = p.STATFS_OUT.pack(0, 0, 0, mount.bootstrap.inode_count & _U64, 0, 512, NAME_MAX, 512, 0)

    def table(self) -> list[Handler]:
        """Handlers by opcode."""
        table = errors_of_a_read_only_mount()
        table[p.LOOKUP] = self._lookup
        table[p.GETATTR] = self._getattr
        table[p.READLINK] = self._readlink
        table[p.OPEN] = self._open
        table[p.OPENDIR] = self._opendir
        table[p.READDIR] = self._readdir
        table[p.READDIRPLUS] = self._readdirplus
        table[p.STATFS] = self._statfs_reply
        table[p.GETXATTR] = self._getxattr
        table[p.LISTXATTR] = self._listxattr
        return table

    def _attr(self, inode: Inode) -> tuple[int, ...]:
        """The fields of ATTR. The three times are all the mtime; those before 1970 travel as two's complement."""
        ino, mode, nlink, uid, gid, size, blocks, mtime, nsec, rdev = inode
        mtime &= _U64
        return (
            self._mount.shown(ino),
            size,
            blocks,
            mtime,
            mtime,
            mtime,
            nsec,
            nsec,
            nsec,
            mode,
            nlink,
            uid,
            gid,
            rdev & _U32,
            p.PAGE,
            0,
        )

    def _entry(self, ino: int) -> tuple[int, ...]:
        """The fields of ENTRY_OUT."""
        return (self._mount.node_of(ino), 0, FOREVER, FOREVER, 0, 0, *self._attr(self._bootstrap.inode(ino)))

    def root_entry(self) -> tuple[int, ...]:
        """The fields of ENTRY_OUT for the root, valid for one use: the image may be unmounted."""
        node, generation, _, *rest = self._entry(self._bootstrap.root_ino)
        return (node, generation, 0, *rest)

    def _lookup(self, node: int, body: memoryview) -> bytes | int:
        name = name_at(body, 0)
        if name is None:
            return errno.EINVAL
        if len(name) > NAME_MAX:
            return errno.ENAMETOOLONG
        ino: int | None = self._mount.ino_of(node)
        assert ino is not None
        if name == b"..":
            ino = self._bootstrap.parent(ino)
        elif name != b".":
            if self.covers and (ino, name) in self.covers:
                return p.ENTRY_OUT.pack(*self._entry_of_root(self.covers[ino, name]))
            ino = self._bootstrap.lookup(ino, name)
        return _ABSENT if ino is None else p.ENTRY_OUT.pack(*self._entry(ino))

    def _getattr(self, node: int, _: memoryview) -> bytes:
        inode = self._bootstrap.inode(self._mount.ino_of(node))
        return p.ATTR_OUT.pack(FOREVER, 0, 0, *self._attr(inode))

    def _readlink(self, node: int, _: memoryview) -> bytes:
        return self._bootstrap.readlink(self._mount.ino_of(node))

    def _open(self, _: int, __: memoryview) -> bytes | int:
        return self._open_reply

    def _opendir(self, _: int, __: memoryview) -> bytes | int:
        return self._opendir_reply

    def _readdir(self, node: int, body: memoryview) -> bytes:
        offset, size, _ = p.READ_FIELDS.unpack_from(body)
        out = bytearray()
        for entry in self._bootstrap.readdir(self._mount.ino_of(node), offset):
            name = entry.name
            if len(out) + padded(p.DIRENT.size + len(name)) > size:
                break
            out += p.DIRENT.pack(self._mount.shown(entry.ino), entry.next_offset, len(name), entry.kind)
            out += name
            out += _PADDING[len(out) & 7]
        return bytes(out)

    def _readdirplus(self, node: int, body: memoryview) -> bytes:
        """Entries with their attributes; written out in one piece, as this is what a walk of an image consists of."""
        offset, size, _ = p.READ_FIELDS.unpack_from(body)
        out = bytearray()
        mount, inode_of, pack = self._mount, self._bootstrap.inode, p.DIRENTPLUS.pack
        folder = mount.ino_of(node)
        for name, ino, kind, next_offset in self._bootstrap.readdir(folder, offset):
            length = len(name)
            if len(out) + ((p.DIRENTPLUS.size + length + 7) & ~7) > size:
                break
            shown = mount.shown(ino)
            try:
                if name in _DOTS or (self.covers and (folder, name) in self.covers):
                    out += pack(*_NO_ENTRY, shown, next_offset, length, kind)
                else:
                    _, mode, links, uid, gid, bytes_, blocks, mtime, nsec, rdev = inode_of(ino)
                    mtime &= _U64
                    out += pack(
                        *(mount.node_of(ino), 0, FOREVER, FOREVER, 0, 0),
                        *(shown, bytes_, blocks, mtime, mtime, mtime, nsec, nsec, nsec),
                        *(mode, links, uid, gid, rdev & _U32, p.PAGE, 0),
                        *(shown, next_offset, length, kind),
                    )
            except FormatError:
                # One bad inode must not hide its whole folder: it is listed, and a stat of it gives EIO.
                out += pack(*_NO_ENTRY, shown, next_offset, length, kind)
            out += name
            out += _PADDING[len(out) & 7]
        return bytes(out)

    def _statfs_reply(self, _: int, __: memoryview) -> bytes:
        return self._statfs

    def _getxattr(self, node: int, body: memoryview) -> bytes | int:
        if not self._xattr:
            return self._no_xattr
        size, _ = p.GETXATTR_IN.unpack_from(body)
        name = name_at(body, p.GETXATTR_IN.size)
        if name is None:
            return errno.EINVAL
        value = self._bootstrap.xattrs(self._mount.ino_of(node)).get(name)
        return errno.ENODATA if value is None else sized(value, size)

    def _listxattr(self, node: int, body: memoryview) -> bytes | int:
        if not self._xattr and self._no_xattr == errno.ENOSYS:
            return errno.ENOSYS
        size, _ = p.GETXATTR_IN.unpack_from(body)
        names = self._bootstrap.xattrs(self._mount.ino_of(node))
        return sized(_EMPTY.join(name + b"\0" for name in names), size)


def errors_of_a_read_only_mount() -> list[Handler]:
    """Handlers by opcode for all that is the same whatever is mounted: what changes something, ends, or is not known.

    READ, and what is not asked of one image (INTERRUPT, FORGET, RELEASE …), is for the loop.
    """
    table: list[Handler] = [_unknown] * p.OPCODES
    for opcode in _READ_ONLY:
        table[opcode] = _read_only
    for opcode in (p.FSYNC, p.FSYNCDIR):
        table[opcode] = _nothing
    table[p.ACCESS] = _access
    table[p.IOCTL] = _ioctl
    return table


def _access(_: int, body: memoryview) -> bytes | int:
    """Permissions are the kernel's work (default_permissions); it asks only where it is told not to."""
    mask, _pad = p.ACCESS_IN.unpack_from(body)
    return errno.EROFS if mask & _W_OK else _EMPTY


def _nothing(_: int, __: memoryview) -> bytes:
    return _EMPTY


def _read_only(_: int, __: memoryview) -> int:
    return errno.EROFS


def _ioctl(_: int, __: memoryview) -> int:
    return errno.ENOTTY


def _unknown(_: int, __: memoryview) -> int:
    return errno.ENOSYS


_DOTS = (b".", b"..")
"""Listed without an entry, as the protocol has it."""
_PADDING = [bytes(-length % 8) for length in range(8)]
_NO_ENTRY = (0,) * 22
_ABSENT = p.ENTRY_OUT.pack(0, 0, FOREVER, 0, *(0,) * 18)
"""A negative entry: the kernel remembers that the name is not there, where ENOENT would be asked again."""


def name_at(body: memoryview, at: int) -> bytes | None:
    """The NUL-terminated name at `at`; None when its end is missing."""
    name, nul, _ = bytes(body[at:]).partition(b"\0")
    return name if nul else None


def padded(length: int) -> int:
    return (length + 7) & ~7


def sized(value: bytes, size: int) -> bytes | int:
    """An xattr answer: its length when asked with size 0, the value when it fits, else ERANGE."""
    if size == 0:
        return p.GETXATTR_OUT.pack(len(value), 0)
    return errno.ERANGE if len(value) > size else value
