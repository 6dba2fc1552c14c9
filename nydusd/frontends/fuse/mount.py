"""One image as the FUSE front end shows it: its metadata, its blobs, its options, and how its inodes are numbered.

Runs in a front-end process. A node id (the kernel's handle of an inode) holds the image's index in its high 28 bits and the
inode number below. Indexes are given out by the supervisor and never a second time, so the kernel's memory of an image
that was unmounted can never lead into another. Index 0 is the image that a daemon was started with at "/": its inodes
show their own numbers. FUSE demands that the root has node id 1, and 0 means "no such file", so there the root's inode is
swapped with 1, and the numbers 0 and 1, should an image have them, move to the top of the 36 bits, where no inode can
be. Nothing is stored per inode: numbers are positions in the metadata.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Protocol

from nydusd.errors import FormatError
from nydusd.formats.model import Bootstrap, Extent
from nydusd.frontends.attempt import Chunks
from nydusd.ipc.trace import Trace
from nydusd.storage.api.device import Pieces
from nydusd.storage.api.io import BlobIoVec, ChunkRun
from nydusd.storage.api.known_chunk import KnownChunk

from .protocol import ROOT_ID
from .stats import Stats

INODE_BITS = 36
"""Enough for a v6 bootstrap of 2 TiB; v5 inode numbers have 32."""
INODE_MAX = (1 << INODE_BITS) - 1
PSEUDO_INDEX = (1 << (64 - INODE_BITS)) - 1
"""The index of the folders that lead to mount points and are in no image."""


class Device(Chunks, Protocol):
    """What the front end uses of `nydusd.storage.api.device.BlobDevice`."""

    hints: list[ChunkRun]

    def handle(self, blob: int) -> int: ...
    def known(self, ino: int, extent: Extent) -> KnownChunk | None: ...
    def read_into(self, vec: BlobIoVec, buf: memoryview, pieces: Pieces | None = None) -> int: ...
    def describe(self, vec: BlobIoVec) -> str: ...
    def count_errors(self, vec: BlobIoVec) -> None: ...
    def close(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Mount:
    """An image in a session. `id` names it in messages: the path in the file system where it is mounted."""

    id: str
    bootstrap: Bootstrap
    device: Device
    xattr: bool = False
    """Answer xattr requests even if the image has none, so that the kernel goes on asking."""
    index: int = 0
    stats: Stats | None = None
    trace: Trace | None = None
    """Where first reads are noted."""
    mapping: mmap.mmap | None = None
    """The file of its metadata."""

    def close(self) -> None:
        """Give back what it has open: it is unmounted."""
        self.device.close()
        if self.stats is not None:
            self.stats.close()

    def trim(self) -> None:
        """Let go of the metadata that was looked at: it stays in the page cache, and is mapped again when it is needed."""
        if self.mapping is not None:
            self.mapping.madvise(mmap.MADV_DONTNEED)

    @property
    def name(self) -> str:
        """What it is called in the log."""
        return f"mount {self.id}"

    def node_of(self, ino: int) -> int:
        """The node id of an inode. Raises FormatError for a number that no image can have."""
        if ino == self.bootstrap.root_ino and self.id == "/":
            return ROOT_ID
        if ino > INODE_MAX - 2:
            raise FormatError(self.id, "inode", f"number {ino} is more than {INODE_MAX - 2}")
        if self.index:
            return self.index << INODE_BITS | ino
        return ino if ino > ROOT_ID else INODE_MAX - ino

    def ino_of(self, node: int) -> int:
        """The inode of a node id that `node_of` gave."""
        if node == ROOT_ID:
            return self.bootstrap.root_ino
        if self.index:
            return node & INODE_MAX
        return node if node < INODE_MAX - ROOT_ID else INODE_MAX - node

    def shown(self, ino: int) -> int:
        """The inode number that programs see. C libraries skip directory entries numbered 0."""
        return (self.index << INODE_BITS | ino & INODE_MAX) or INODE_MAX
