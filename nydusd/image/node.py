"""The tree of an image that is being built: one `Node` an inode, whatever it comes from. Plain data, in memory.

Names of a hard link share their node. Trees may be deeper than Python's recursion limit, so every walk here is a loop.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from nydusd.formats.model import RawChunk

Segment = tuple[int, int, int]
"""Bytes of a tar member: offset in the file, length, position in the tar. What no segment covers is zero."""


@dataclass(eq=False, slots=True)
class Node:
    """One inode. `path` is the first name it was met under, without a leading slash: for messages only.

    Data of a regular file comes from `source` (a path of the host, to be checked against `size` and `changed`, the mtime
    in nanoseconds), from `segments` of the tar, or it is there already: `chunks` of known blobs.
    """

    path: bytes
    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    mtime_ns: int = 0
    rdev: int = 0
    size: int = 0
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    children: dict[bytes, Node] = field(default_factory=dict)
    source: bytes | None = None
    changed: int = 0
    segments: tuple[Segment, ...] | None = None
    chunks: list[RawChunk] = field(default_factory=list)
    nlink: int = 1

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.mode)

    @property
    def is_folder(self) -> bool:
        return self.mode & 0xF000 == 0x4000

    @property
    def is_file(self) -> bool:
        return self.mode & 0xF000 == 0x8000

    @property
    def is_symlink(self) -> bool:
        return self.mode & 0xF000 == 0xA000


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
        todo += [(child, node) for _, child in reversed(entries) if child.is_folder]


def names(root: Node) -> Iterator[Name]:
    """Every name once, in the order in which formats want them: the root, then what is in each of `folders`."""
    number = 1
    yield Name(b"/", root, root, number)
    for folder in folders(root):
        for name, child in folder.entries:
            number += 1
            yield Name(name, child, folder.node, number)


def count_links(root: Node) -> int:
    """Set `nlink` of every node from the names in the tree; the number of names."""
    count = 0
    for name in names(root):
        count += 1
        node = name.node
        if node.is_folder:
            node.nlink = 2
        elif node.nlink >= 0:
            node.nlink = -1  # seen once in this pass; counted down, so that no old value matters
        else:
            node.nlink -= 1
        if node.is_folder and node is not root:
            name.parent.nlink += 1
    for name in names(root):
        name.node.nlink = abs(name.node.nlink)
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
