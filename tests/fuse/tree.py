"""A small image in memory: the `Bootstrap` protocol over Python objects, and the blob that its files live in.

The pytest process and the front-end processes build the same one from `sample()`, so nothing has to travel.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from nydusd.errors import FormatError
from nydusd.formats.model import BlobInfo, DirEntry, Extent, Inode, RawChunk

CHUNK = 64 * 1024
PAGE = 4096


@dataclass
class Node:
    """An inode. `first` is the first chunk of a regular file's data."""

    ino: int
    mode: int
    size: int = 0
    target: bytes = b""
    entries: dict[bytes, int] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    parent: int = 0
    first: int = 0
    rdev: int = 0
    uid: int = 0
    gid: int = 0
    nlink: int = 1
    mtime: int = 1_700_000_000
    broken: bool = False


class Tree:
    """Implements `nydusd.formats.model.Bootstrap`. The root's inode number is not 1, and another inode's is."""

    version = 6
    chunk_size = CHUNK
    flags = 0

    def __init__(self, root_ino: int = 36) -> None:
        self.root_ino = root_ino
        self.nodes: dict[int, Node] = {}
        self.blob = bytearray()
        self.blobs: Sequence[BlobInfo] = []
        self.has_xattr = False
        self.length = 0
        self.inode_count = 1
        self._next = 1  # on purpose: 1 is FUSE's root, not ours
        root = self.nodes[root_ino] = Node(root_ino, stat.S_IFDIR | 0o751, parent=root_ino, nlink=2)
        root.entries = {b".": root_ino, b"..": root_ino}

    def add(self, path: str | bytes, mode: int, data: bytes = b"", **fields: object) -> Node:
        """Add an inode at `path`; `data` is a file's content or a link's target."""
        raw = path.encode() if isinstance(path, str) else path
        folder_path, _, name = raw.rpartition(b"/")
        folder = self.find(folder_path)
        while self._next in self.nodes:
            self._next += 1
        node = Node(self._next, mode, len(data), **fields)  # type: ignore[arg-type]
        self.nodes[node.ino] = node
        self.inode_count += 1
        folder.entries[name] = node.ino
        if stat.S_ISDIR(mode):
            node.parent, node.nlink = folder.ino, 2
            node.entries = {b".": node.ino, b"..": folder.ino}
            folder.nlink += 1
        elif stat.S_ISLNK(mode):
            node.target = data
        elif data:
            self.blob += bytes(-len(self.blob) % CHUNK)
            node.first = len(self.blob) // CHUNK
            self.blob += data
        return node

    def find(self, path: bytes) -> Node:
        node = self.nodes[self.root_ino]
        for part in path.split(b"/"):
            if part:
                node = self.nodes[node.entries[part]]
        return node

    def chunk_lengths(self) -> list[int]:
        """Length of each chunk of the blob: files begin a new chunk, so most end in a short one."""
        lengths = [CHUNK] * -(-len(self.blob) // CHUNK)
        for node in self.nodes.values():
            if stat.S_ISREG(node.mode) and node.size % CHUNK:
                lengths[node.first + node.size // CHUNK] = node.size % CHUNK
        return lengths

    def _node(self, ino: int) -> Node:
        node = self.nodes.get(ino)
        if node is None or node.broken:
            raise FormatError("sample", f"inode {ino}", "is broken")
        return node

    def inode(self, ino: int) -> Inode:
        n = self._node(ino)
        return Inode(n.ino, n.mode, n.nlink, n.uid, n.gid, n.size, -(-n.size // 512), n.mtime, 5, n.rdev)

    def lookup(self, parent: int, name: bytes) -> int | None:
        return self._node(parent).entries.get(name)

    def readdir(self, ino: int, offset: int) -> Iterator[DirEntry]:
        entries = sorted(self._node(ino).entries.items())
        for index, (name, child) in enumerate(entries[offset:], offset + 1):
            yield DirEntry(name, child, stat.S_IFMT(self.nodes[child].mode) >> 12, index)

    def parent(self, ino: int) -> int:
        return self._node(ino).parent

    def readlink(self, ino: int) -> bytes:
        return self._node(ino).target

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        return self._node(ino).xattrs

    def extents(self, ino: int, offset: int, size: int) -> list[Extent]:
        node = self._node(ino)
        end = min(offset + size, node.size)
        found = []
        while offset < end:
            index, inside = divmod(offset, CHUNK)
            start = index * CHUNK
            length = min(start + CHUNK, end) - offset
            chunk = node.first + index
            found.append(Extent(0, chunk, chunk * CHUNK, inside, length, min(CHUNK, node.size - start)))
            offset += length
        return found

    def prefetch_inodes(self) -> list[int]:
        return []

    def raw_chunks(self) -> Iterator[RawChunk]:
        return iter(())

    def superblock_facts(self) -> dict[str, object]:
        return {}


def noise(seed: str, length: int) -> bytes:
    """Bytes that repeat nowhere."""
    return hashlib.shake_128(seed.encode()).digest(length)


MANY = 3500
BIG = 3 * 1024 * 1024 + 777


def sample() -> Tree:
    """The tree of most tests."""
    tree = Tree()
    reg, folder, link = stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK
    tree.add("first", reg | 0o644, b"I am inode 1\n")
    tree.add(
        "hello",
        reg | 0o644,
        b"hello, world\n",
        uid=3_000_000_000,
        gid=70_000,
        xattrs={b"user.a": b"value", b"user.empty": b""},
    )
    tree.add("empty", reg | 0o600)
    tree.add("big", reg | 0o444, noise("big", BIG))
    tree.add("other", reg | 0o444, noise("other", 300_000))
    tree.add("third", reg | 0o444, noise("third", 100_000))
    tree.add("old", reg | 0o644, b"x", mtime=-3600)
    tree.add("script", reg | 0o755, b"#!/bin/sh\necho ran $1\n")
    tree.add("link", link | 0o777, b"dir/nested")
    tree.add("dangling", link | 0o777, b"/nowhere/" + b"x" * 3000)
    tree.add("zero", stat.S_IFCHR | 0o666, rdev=(1 << 8) | 5)
    tree.add("fifo", stat.S_IFIFO | 0o644)
    tree.add("broken", reg | 0o644, broken=True)
    tree.add("dir", folder | 0o755)
    tree.add("dir/nested", reg | 0o640, b"nested\n")
    tree.add(b"dir/\xff\xfe bytes", reg | 0o644, b"not UTF-8\n")
    tree.add("n" * 255, reg | 0o644, b"long name\n")
    tree.add("many", folder | 0o755)
    for number in range(MANY):
        tree.add(f"many/{number:05d}-{'y' * (number % 60)}", reg | 0o644)
    tree.has_xattr = True
    return tree
