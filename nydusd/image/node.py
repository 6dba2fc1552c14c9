"""The tree of an image that is being built: one `Node` an inode, whatever it comes from. Plain data, in memory.

Names of a hard link share their node. Trees may be deeper than Python's recursion limit, so every walk here is a loop.
All that a builder keeps in memory grows with the number of names and chunks alone, so nodes are kept small: no path, no
collections of their own for what most of them have not, and chunks as the packed records that images have.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple, cast

from nydusd.formats.chunk_info import CHUNK_INFO
from nydusd.formats.model import RawChunk

Segment = tuple[int, int, int]
"""Bytes of a tar member: offset in the file, length, position in the tar. What no segment covers is zero."""

NO_XATTRS: Mapping[bytes, bytes] = MappingProxyType({})
_NO_CHILDREN = cast("dict[bytes, Node]", MappingProxyType({}))
_FILE_OFFSET_AT = 64
_S_IFMT, _S_IFDIR, _S_IFREG, _S_IFLNK = 0xF000, 0x4000, 0x8000, 0xA000


class Node:
    """One inode. `name` and `parent` are where it was met first; a root has neither.

    Data of a regular file comes from the host, where it is to be found under `path` with this size and mtime; from
    `segments` of a tar, if these are not None; or it is there already: chunks of known blobs. Other kinds have no chunks.
    Only folders have `children`; one that is `implied` is in its layer for what is in it alone, and its attributes are
    nobody's. `number` is that of the first name in the order of `names`, once `number_all` was called.
    """

    __slots__ = (
        "children",
        "gid",
        "implied",
        "mode",
        "mtime",
        "mtime_ns",
        "name",
        "nlink",
        "number",
        "packed",
        "parent",
        "rdev",
        "segments",
        "size",
        "target",
        "uid",
        "xattrs",
    )

    def __init__(
        self,
        name: bytes,
        parent: Node | None,
        mode: int,
        *,
        uid: int = 0,
        gid: int = 0,
        mtime: int = 0,
        mtime_ns: int = 0,
        rdev: int = 0,
        xattrs: Mapping[bytes, bytes] = NO_XATTRS,
    ) -> None:
        self.name = name
        self.parent = parent
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime = mtime
        self.mtime_ns = mtime_ns
        self.rdev = rdev
        self.size = 0
        self.target = b""
        self.xattrs = xattrs or NO_XATTRS
        self.children: dict[bytes, Node] = {} if mode & _S_IFMT == _S_IFDIR else _NO_CHILDREN
        self.segments: tuple[Segment, ...] | None = None
        self.packed = b""
        self.implied = False
        self.nlink = 1
        self.number = 0

    @property
    def path(self) -> bytes:
        """Of the first name, without a leading slash; empty for the root."""
        parts = []
        node = self
        while node.parent is not None:
            parts.append(node.name)
            node = node.parent
        return b"/".join(reversed(parts))

    @property
    def is_folder(self) -> bool:
        return self.mode & _S_IFMT == _S_IFDIR

    @property
    def is_file(self) -> bool:
        return self.mode & _S_IFMT == _S_IFREG

    @property
    def is_symlink(self) -> bool:
        return self.mode & _S_IFMT == _S_IFLNK

    @property
    def chunks(self) -> list[RawChunk]:
        """The chunks of a file, made anew from `packed` each time."""
        return [RawChunk._make(record) for record in CHUNK_INFO.iter_unpack(self.packed)]

    def set_chunks(self, chunks: Iterable[RawChunk]) -> None:
        self.packed = b"".join(CHUNK_INFO.pack(*chunk) for chunk in chunks)


def with_file_offset(record: bytes, offset: int) -> bytes:
    """The record of a chunk, for a file that has it at another offset."""
    return record[:_FILE_OFFSET_AT] + offset.to_bytes(8, "little") + record[_FILE_OFFSET_AT + 8 :]


class Name(NamedTuple):
    """A name in the tree: its node, the folder it is in (the root's own for the root), its number from 1."""

    name: bytes
    node: Node
    parent: Node
    number: int


class Folder(NamedTuple):
    """A folder of the tree, the folder that it is in (itself for the root), and its entries sorted by name."""

    node: Node
    parent: Node
    entries: list[tuple[bytes, Node]]


def folders(root: Node) -> Iterator[Folder]:
    """Every folder: the root, then for each of its folders that folder and all below it, by name."""
    todo = [(root, root)]
    while todo:
        node, parent = todo.pop()
        entries = sorted(node.children.items())
        yield Folder(node, parent, entries)
        todo += [(child, node) for _, child in reversed(entries) if child.mode & _S_IFMT == _S_IFDIR]


def names(root: Node) -> Iterator[Name]:
    """Every name once, in the order in which formats want them: the root, then what is in each of `folders`."""
    number = 1
    yield Name(b"/", root, root, number)
    for folder in folders(root):
        for name, child in folder.entries:
            number += 1
            yield Name(name, child, folder.node, number)


def number_all(root: Node) -> int:
    """Set `number` and `nlink` of every node from the names in the tree; the number of names."""
    for folder in folders(root):
        for _, child in folder.entries:
            child.number = 0
    root.number, root.nlink = 1, 2
    count = 1
    for folder in folders(root):
        for _, child in folder.entries:
            count += 1
            if child.mode & _S_IFMT == _S_IFDIR:
                child.number, child.nlink = count, 2
                folder.node.nlink += 1
            elif child.number:
                child.nlink += 1
            else:
                child.number, child.nlink = count, 1
    return count


def find(root: Node, path: bytes) -> Node | None:
    """The node at a path below `root`; links are not followed."""
    node = root
    for part in path.split(b"/"):
        if part in (b"", b"."):
            continue
        child = node.children.get(part)
        if child is None:
            return None
        node = child
    return node


@contextlib.contextmanager
def growing_trees() -> Iterator[None]:
    """Python's collector does not run meanwhile: nothing of a tree that grows is garbage, and it would look at all of it again
    and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
