"""One image as the FUSE front end shows it: its metadata, its blobs, its options, and how its inodes are numbered.

Runs in a front-end process. A node id (the kernel's handle of an inode) holds the image's index in its high 8 bits and the
inode number below; one image at "/" has index 0. FUSE demands that the root has node id 1, and 0 means "no such
file", so the root's inode is swapped with 1, and the numbers 0 and 1, should an image have them, move to the top of the
56 bits, where no inode can be. Nothing is stored per inode: numbers are positions in the metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nydusd.errors import UnsupportedError
from nydusd.formats.model import Bootstrap, Extent
from nydusd.storage.api.io import BlobIoVec, ChunkRun

from .protocol import ROOT_ID

INODE_BITS = 56
INODE_MAX = (1 << INODE_BITS) - 1


class Device(Protocol):
    """What the front end uses of `nydusd.storage.api.device.BlobDevice`."""

    hints: list[ChunkRun]

    def handle(self, blob: int) -> int: ...
    def missing(self, vec: BlobIoVec, again: bool = False) -> list[ChunkRun]: ...
    def refresh(self, vec: BlobIoVec) -> None: ...
    def read_into(
        self, vec: BlobIoVec, buf: memoryview, pieces: dict[tuple[int, int], memoryview] | None = None
    ) -> int: ...
    def count_errors(self, vec: BlobIoVec) -> None: ...


@dataclass(frozen=True, slots=True)
class Mount:
    """An image in a session. `id` names it in messages: the path in the file system where it is mounted.

    Raises UnsupportedError for any place but "/".
    """

    id: str
    bootstrap: Bootstrap
    device: Device
    xattr: bool = False
    """Answer xattr requests even if the image has none, so that the kernel goes on asking."""

    def __post_init__(self) -> None:
        if self.id != "/":
            raise UnsupportedError(
                f"mount {self.id}: this front end serves one image, mounted at /: start one daemon per image"
            )

    def node_of(self, ino: int) -> int:
        """The node id of an inode."""
        if ino == self.bootstrap.root_ino:
            return ROOT_ID
        return ino if ino > ROOT_ID else INODE_MAX - ino

    def ino_of(self, node: int) -> int:
        """The inode of a node id that `node_of` gave."""
        if node == ROOT_ID:
            return self.bootstrap.root_ino
        return node if node < INODE_MAX - ROOT_ID else INODE_MAX - node

    @staticmethod
    def shown(ino: int) -> int:
        """The inode number that programs see. C libraries skip directory entries numbered 0."""
        return ino or INODE_MAX


def runs_of(vec: Sequence[Extent]) -> list[ChunkRun]:
    """All chunks that `vec` touches, as runs of consecutive ones."""
    runs: list[ChunkRun] = []
    for extent in vec:
        if runs:
            blob, first, count = runs[-1]
            if blob == extent.blob and first <= extent.chunk <= first + count:
                runs[-1] = ChunkRun(blob, first, max(count, extent.chunk - first + 1))
                continue
        runs.append(ChunkRun(extent.blob, extent.chunk, 1))
    return runs
