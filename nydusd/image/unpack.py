"""Turns an image back into a tar. Runs in the process of the command.

PAX format, so that names, sizes and times have no limits; attributes as `SCHILY.xattr` records, written by hand because
their values may be any bytes. A hard link comes as one file and links to it. Sockets cannot be in a tar and are left out.
"""

from __future__ import annotations

import io
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from nydusd.formats.model import NAME_LEAST, Bootstrap, Inode
from nydusd.image.errors import ImageError, show
from nydusd.image.output import Output
from nydusd.image.reader import ImageReader

log = logging.getLogger(__name__)

_BLOCK = 512
_OCTAL = {8: 8**7 - 1, 12: 8**11 - 1}
_TYPES = {
    stat.S_IFREG: b"0",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}
_MAX_DEPTH = 2048


class Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


def unpack(reader: ImageReader, target: Path) -> int:
    """Write the tar to `target` (a file or a FIFO); the number of members. Raises `NydusError`."""
    with Output(target.parent, target) as out:
        count = write_tar(reader, out)
        out.publish(target)
    return count


def write_tar(reader: ImageReader, out: Sink) -> int:
    """Write the tar of an image into something with `write`; the number of members."""
    first: dict[int, bytes] = {}
    count = 0
    for path, ino in paths(reader.bootstrap):
        inode = reader.bootstrap.inode(ino)
        if stat.S_ISSOCK(inode.mode):
            log.warning("%s: a socket, which no tar can hold: left out", show(path))
            continue
        count += 1
        known = first.setdefault(ino, path) if not stat.S_ISDIR(inode.mode) else path
        if known != path:
            out.write(_header(path, inode, b"1", known, {}, 0))
            continue
        target = reader.bootstrap.readlink(ino) if stat.S_ISLNK(inode.mode) else b""
        size = inode.size if stat.S_ISREG(inode.mode) else 0
        out.write(_header(path, inode, _TYPES[stat.S_IFMT(inode.mode)], target, reader.bootstrap.xattrs(ino), size))
        if size:
            for piece in reader.content(ino):
                out.write(piece)
            out.write(bytes(-size % _BLOCK))
    out.write(bytes(2 * _BLOCK))
    return count


def paths(bootstrap: Bootstrap) -> Iterator[tuple[bytes, int]]:
    """Path and number of every name: each folder followed by what is in it. Raises `ImageError` for a tree that is none."""
    left = bootstrap.length // NAME_LEAST
    yield b"./", bootstrap.root_ino
    seen = {bootstrap.root_ino}
    open_folders = [(b"", bootstrap.readdir(bootstrap.root_ino, 0))]
    while open_folders:
        prefix, entries = open_folders[-1]
        entry = next(entries, None)
        if entry is None:
            open_folders.pop()
        elif entry.name not in (b".", b".."):
            path = prefix + entry.name
            left -= 1
            if left < 0:
                raise ImageError(
                    f"{show(path)}: more names up to it than the metadata has room for: folders share them"
                )
            if not stat.S_ISDIR(bootstrap.inode(entry.ino).mode):
                yield path, entry.ino
                continue
            if entry.ino in seen or len(open_folders) > _MAX_DEPTH:
                raise ImageError(f"{show(path)}: the folder is reached twice, or too deep")
            seen.add(entry.ino)
            yield path + b"/", entry.ino
            open_folders.append((path + b"/", bootstrap.readdir(entry.ino, 0)))


def _header(path: bytes, inode: Inode, kind: bytes, link: bytes, xattrs: dict[bytes, bytes], size: int) -> bytes:
    """A member's header, with an extended one before it for what does not fit."""
    seconds = inode.mtime - (1 << 64) if inode.mtime >> 63 else inode.mtime
    records: list[tuple[bytes, bytes]] = []
    if len(path) > 100:
        records.append((b"path", path))
    if len(link) > 100:
        records.append((b"linkpath", link))
    for key, value, width in ((b"size", size, 12), (b"uid", inode.uid, 8), (b"gid", inode.gid, 8)):
        if value > _OCTAL[width]:
            records.append((key, b"%d" % value))
    if inode.mtime_ns or not 0 <= seconds <= _OCTAL[12]:
        records.append((b"mtime", _time(seconds, inode.mtime_ns)))
    records += [(b"SCHILY.xattr." + name, xattrs[name]) for name in sorted(xattrs)]
    extended = b"".join(_record(key, value) for key, value in records)
    head = b""
    if extended:
        head = _block(b"PaxHeaders/" + os.path.basename(path.rstrip(b"/"))[:80], b"x", 0o644, len(extended))
        head += extended + bytes(-len(extended) % _BLOCK)
    major, minor = os.major(inode.rdev), os.minor(inode.rdev)
    return head + _block(
        path, kind, stat.S_IMODE(inode.mode), size, inode.uid, inode.gid, max(seconds, 0), link, major, minor
    )


def _time(seconds: int, nanoseconds: int) -> bytes:
    total = seconds * 10**9 + nanoseconds
    sign = b"-" if total < 0 else b""
    whole, part = divmod(abs(total), 10**9)
    return sign + b"%d" % whole + (b".%09d" % part).rstrip(b"0") if part else sign + b"%d" % whole


def _record(key: bytes, value: bytes) -> bytes:
    """`length key=value\\n`, where the length counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def _block(
    name: bytes,
    kind: bytes,
    mode: int,
    size: int,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 0,
    link: bytes = b"",
    major: int = 0,
    minor: int = 0,
) -> bytes:
    block = io.BytesIO()
    block.write(name[:100].ljust(100, b"\0"))
    for value, width in ((mode, 8), (uid, 8), (gid, 8), (size, 12), (mtime, 12)):
        block.write(b"%0*o\0" % (width - 1, value if value <= _OCTAL[width] else 0))
    block.write(b" " * 8 + kind + link[:100].ljust(100, b"\0") + b"ustar\x0000")
    block.write(bytes(64))
    for value in (major, minor):
        block.write(b"%07o\0" % (value & 0o7777777))
    raw = block.getvalue().ljust(_BLOCK, b"\0")
    return raw[:148] + b"%06o\0 " % sum(raw) + raw[156:]
