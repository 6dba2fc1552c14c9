"""The folders that lead to mount points and are in no image: `/` of a daemon without an image, `/a` of a mount at `/a/b`.

Runs in a front-end process. Unlike an image, this tree changes: so the kernel is told to keep nothing of it. Names are
looked up anew at each use (an entry is valid for 0 seconds, absent ones are not remembered), and a listing that the kernel
has kept is dropped as soon as the folder's mtime is another, for which it asks at each open (attributes are valid for 0
seconds). Who holds a folder of an image open pays nothing of that.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from nydusd.errors import UnmountedError

from . import protocol as p
from .mount import INODE_BITS, INODE_MAX, PSEUDO_INDEX
from .ops import NAME_MAX, Handler, errors_of_a_read_only_mount, name_at, padded, sized

ROOT = 1
"""The number of the root folder."""
_BASE = PSEUDO_INDEX << INODE_BITS
_MODE = 0o40755
_DT_DIR = 4
_NO_ENTRY = (0,) * 22


@dataclass(slots=True)
class Place:
    """A folder of the tree, by its number; a mount point if `index` names an image. `changed`: ns since 1970."""

    number: int
    parent: int
    name: bytes
    changed: int
    index: int | None
    revision: int
    children: dict[bytes, Place] = field(default_factory=dict)

    @property
    def node(self) -> int:
        return p.ROOT_ID if self.number == ROOT else _BASE | self.number


def tree_of(rows: Iterable[tuple[int, int, str, int, int | None, int]]) -> dict[int, Place]:
    """The places of a table as `supervisor.mount_table` writes it, parents before children; the root is always there."""
    places: dict[int, Place] = {}
    for number, parent, name, changed, index, revision in rows:
        place = Place(number, parent, bytes.fromhex(name), changed, index, revision)
        places[number] = place
        if number != ROOT:
            places[parent].children[place.name] = place
    return places


class PseudoFs:
    """The handlers of the tree. `root_entry(index)` gives the fields of ENTRY_OUT for the root of an image."""

    def __init__(self, flags: int, root_entry: Callable[[int], tuple[int, ...]]) -> None:
        self.places: dict[int, Place] = {}
        self._root_entry = root_entry
        self._open = errno.ENOSYS if flags & p.NO_OPENDIR_SUPPORT else p.OPEN_OUT.pack(0, 0, 0)

    def table(self) -> list[Handler]:
        """Handlers by opcode."""
        table = errors_of_a_read_only_mount()
        table[p.LOOKUP] = self._lookup
        table[p.GETATTR] = self._getattr
        table[p.OPENDIR] = lambda _node, _body: self._open
        table[p.READDIR] = self._readdir
        table[p.READDIRPLUS] = self._readdirplus
        table[p.STATFS] = lambda _node, _body: p.STATFS_OUT.pack(0, 0, 0, len(self.places), 0, 512, NAME_MAX, 512, 0)
        table[p.GETXATTR] = lambda _node, _body: errno.ENODATA
        table[p.LISTXATTR] = lambda _node, body: sized(b"", p.GETXATTR_IN.unpack_from(body)[0])
        return table

    def _place(self, node: int) -> Place:
        number = node & INODE_MAX
        place = self.places.get(number)
        if place is None:
            raise UnmountedError(f"folder {number} leads to no mount any more")
        return place

    def _attr(self, place: Place) -> tuple[int, ...]:
        seconds, nanoseconds = divmod(place.changed, 1_000_000_000)
        times = (seconds,) * 3 + (nanoseconds,) * 3
        folders = sum(child.index is None for child in place.children.values())
        owner = (os.geteuid(), os.getegid())
        return (_BASE | place.number, 0, 0, *times, _MODE, 2 + folders, *owner, 0, p.PAGE, 0)

    def _lookup(self, node: int, body: memoryview) -> bytes | int:
        place = self._place(node)
        name = name_at(body, 0)
        if name is None:
            return errno.EINVAL
        if len(name) > NAME_MAX:
            return errno.ENAMETOOLONG
        found = place.children.get(name)
        if name == b".":
            found = place
        elif name == b"..":
            found = self.places.get(place.parent, place)
        if found is None:
            return errno.ENOENT
        if found.index is not None:
            return p.ENTRY_OUT.pack(*self._root_entry(found.index))
        return p.ENTRY_OUT.pack(found.node, 0, 0, 0, 0, 0, *self._attr(found))

    def _getattr(self, node: int, _: memoryview) -> bytes:
        return p.ATTR_OUT.pack(0, 0, 0, *self._attr(self._place(node)))

    def _entries(self, place: Place) -> list[tuple[bytes, int]]:
        """(name, inode number) of a listing."""
        parent = self.places.get(place.parent, place)
        entries = [(b".", _BASE | place.number), (b"..", _BASE | parent.number)]
        return entries + [(name, _BASE | child.number) for name, child in sorted(place.children.items())]

    def _readdir(self, node: int, body: memoryview) -> bytes:
        return self._listing(node, body, b"")

    def _readdirplus(self, node: int, body: memoryview) -> bytes:
        """Without entries: listing a thousand mount points must not open their images."""
        return self._listing(node, body, p.ENTRY_OUT.pack(*_NO_ENTRY))

    def _listing(self, node: int, body: memoryview, before: bytes) -> bytes:
        offset, size, _ = p.READ_FIELDS.unpack_from(body)
        out = bytearray()
        for at, (name, ino) in enumerate(self._entries(self._place(node))[offset:], offset + 1):
            if len(out) + padded(len(before) + p.DIRENT.size + len(name)) > size:
                break
            out += before + p.DIRENT.pack(ino, at, len(name), _DT_DIR) + name
            out += bytes(-len(out) % 8)
        return bytes(out)
