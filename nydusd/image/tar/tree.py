"""Puts the members of a tar into a tree, as an unpacking container engine would leave it on the disk. Pure but for the tar.

A later member replaces an earlier one of its name; folders keep what is in them. Names are relative to the root of the
image, whatever they begin with; one that climbs out of it is refused. A folder that has no member of its own is there
all the same, as an implied one: root's, with mode 0755 and time 0. A symlink on the way to a name is followed inside
the image, as the engine would when it unpacks the member.
"""

from __future__ import annotations

import os

from nydusd.formats.superblock import MAX_NAME, S_IFDIR, S_IFLNK, S_IFREG
from nydusd.image.errors import ImageError, show
from nydusd.image.node import NO_XATTRS, Node
from nydusd.image.tar.members import (
    BLOCK_DEVICE,
    CHAR,
    FIFO,
    FOLDER,
    HARD_LINK,
    REGULAR,
    SYMLINK,
    Member,
    members,
)

_MODES = {REGULAR: S_IFREG, FOLDER: S_IFDIR, SYMLINK: S_IFLNK, CHAR: 0x2000, BLOCK_DEVICE: 0x6000, FIFO: 0x1000}
_STARGZ = (b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark")
"""Files of estargz layers that are about the layer, not in the image."""
_MAX_PATH = 4095
_MAX_LINKS = 40
_FOLLOWED, _FOLLOWED_BY_EACH = 1_000_000, 64
"""Steps of symlinks' targets that are gone in all, and more for each member: a short tar must not take hours."""
_MAX_DEPTH = 2047
"""Deepest folder: readers follow no deeper ones. Names are not that long, but symlinks on the way add to them."""


def read_tree(fd: int, size: int, where: str, *, owners: bool, stargz: bool = False) -> Node:
    """The tree of a tar. `owners` False leaves user and group 0; of a `stargz` layer the files about it are left out.

    Raises `ImageError` with the member's name.
    """
    return _Tree(where, owners, _STARGZ if stargz else ()).read(fd, size)


def _implied(name: bytes, parent: Node | None) -> Node:
    node = Node(name, parent, S_IFDIR | 0o755)
    node.implied = True
    return node


class _Tree:
    def __init__(self, where: str, owners: bool, left_out: tuple[bytes, ...]) -> None:
        self._where = where
        self._left_out = left_out
        self._owners = owners
        self._root = _implied(b"", None)
        self._may_follow = _FOLLOWED

    def read(self, fd: int, size: int) -> Node:
        for member in members(fd, size, self._where):
            self._may_follow += _FOLLOWED_BY_EACH
            self._add(member)
        return self._root

    def _bad(self, name: bytes, message: str) -> ImageError:
        return ImageError(f"{self._where}: {show(name)}: {message}")

    def _parts(self, name: bytes, owner: bytes) -> list[bytes]:
        """The steps of a name from the root. Raises `ImageError` for one that no file could have."""
        if len(name) > _MAX_PATH:
            raise self._bad(owner[:200], f"a path of {len(name)} bytes; at most {_MAX_PATH} are possible")
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        for part in parts:
            if part == b"..":
                raise self._bad(owner, f"the path {show(name)} leads out of the image")
            if len(part) > MAX_NAME or b"\0" in part:
                raise self._bad(owner, f"a name of {len(part)} bytes; 1 to {MAX_NAME} bytes without NUL are possible")
        return parts

    def _add(self, member: Member) -> None:
        parts = self._parts(member.name, member.name)
        if not parts:
            if member.kind != FOLDER:
                raise self._bad(member.name, "the root of the image must be a folder")
            self._fill(self._root, member)
            return
        if len(parts) == 1 and parts[0] in self._left_out and member.kind == REGULAR:
            return
        folder = self._folder(parts[:-1], member.name)
        name = parts[-1]
        if member.kind == HARD_LINK:
            folder.children[name] = self._link_target(member)
            return
        known = folder.children.get(name)
        if member.kind == FOLDER and known is not None and known.is_folder:
            self._fill(known, member)
            return
        node = Node(name, folder, _MODES[member.kind])
        self._fill(node, member)
        folder.children[name] = node

    def _fill(self, node: Node, member: Member) -> None:
        node.implied = False
        node.mode = _MODES[member.kind] | member.mode
        if self._owners:
            node.uid, node.gid = member.uid, member.gid
        node.mtime, node.mtime_ns = member.mtime, member.mtime_ns
        node.xattrs = member.xattrs or NO_XATTRS
        if member.kind == REGULAR:
            node.size, node.segments = member.size, member.segments
        elif member.kind == SYMLINK:
            if not member.link or b"\0" in member.link:
                raise self._bad(member.name, "a symlink without target, or with a NUL in it")
            node.target = member.link
        elif member.kind in (CHAR, BLOCK_DEVICE):
            if not 0 <= member.major < 1 << 12 or not 0 <= member.minor < 1 << 20:
                raise self._bad(member.name, f"device {member.major}:{member.minor}; at most 4095:1048575 fits")
            node.rdev = os.makedev(member.major, member.minor)

    def _link_target(self, member: Member) -> Node:
        parts = self._parts(member.link, member.name)
        target = None
        if parts:
            folder = self._find_folder(parts[:-1], member.name)
            target = folder.children.get(parts[-1]) if folder is not None else None
        if target is None:
            raise self._bad(member.name, f"a hard link to {show(member.link)}, which is not in the tar before it")
        if target.is_folder:
            raise self._bad(member.name, f"a hard link to the folder {show(member.link)}")
        return target

    def _folder(self, parts: list[bytes], owner: bytes) -> Node:
        """The folder at a path, made with what is missing on the way."""
        found = self._walk(parts, owner, make=True)
        assert found is not None
        return found

    def _find_folder(self, parts: list[bytes], owner: bytes) -> Node | None:
        return self._walk(parts, owner, make=False)

    def _walk(self, parts: list[bytes], owner: bytes, *, make: bool) -> Node | None:
        way = [self._root]
        todo = parts[::-1]
        links = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":  # in a symlink's target only; the root's parent is the root
                if len(way) > 1:
                    way.pop()
                continue
            child = way[-1].children.get(part)
            if child is None:
                if not make:
                    return None
                child = _implied(part, way[-1])
                way[-1].children[part] = child
            if child.is_symlink:
                links += 1
                if links > _MAX_LINKS:
                    raise self._bad(owner, "more than 40 symlinks on the way to it")
                if child.target.startswith(b"/"):
                    way = way[:1]
                steps = child.target.split(b"/")
                self._may_follow -= len(steps)
                if self._may_follow < 0:
                    raise self._bad(
                        owner, "the symlinks on the ways to it and to the members before it are too many steps"
                    )
                todo += steps[::-1]
                if len(todo) > 1 << 14:
                    raise self._bad(owner, "the symlinks on the way to it make a path that is too long")
            elif child.is_folder:
                way.append(child)
                if len(way) > _MAX_DEPTH:
                    raise self._bad(owner, f"it is more than {_MAX_DEPTH} levels deep")
            elif make:
                raise self._bad(owner, f"{show(child.path)} is on the way to it and no folder")
            else:
                return None
        return way[-1]
