"""The file system whose files are the blobs of an image, uncompressed: one folder, a file a blob, named by the blob's id.

Runs in a FUSE front end, in the place of an image's metadata. Nothing is kept; sizes are those of the opened blobs, and of the
image's blob table before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nydusd.errors import FormatError
from nydusd.formats.model import BlobInfo, DirEntry, Extent, Inode, RawChunk

from .device import RangeDevice

_FOLDER, _FILE = 0o40555, 0o100444
_DT_DIR, _DT_REG = 4, 8
_FIRST = 2
_PAGE = 4096


class BlobFolder:
    """A `Bootstrap` of the blobs that `device` has."""

    version = 6
    chunk_size = 1 << 20
    root_ino = 1
    flags = 0
    has_xattr = False
    length = 0

    def __init__(self, where: str, blobs: Sequence[BlobInfo], device: RangeDevice) -> None:
        self._where = where
        self._device = device
        self.blobs = blobs
        self.inode_count = 1 + len(blobs)
        self._names = {blob.blob_id.encode(): index for index, blob in enumerate(blobs)}

    def inode(self, ino: int) -> Inode:
        if ino == self.root_ino:
            return Inode(ino, _FOLDER, 2, 0, 0, _PAGE, 8, 0, 0, 0)
        size = self._size(self._index(ino))
        return Inode(ino, _FILE, 1, 0, 0, size, -(-size // 512), 0, 0, 0)

    def lookup(self, parent: int, name: bytes) -> int | None:
        index = self._names.get(name) if parent == self.root_ino else None
        return None if index is None else index + _FIRST

    def readdir(self, ino: int, offset: int) -> Iterator[DirEntry]:
        if ino != self.root_ino:
            raise FormatError(self._where, "inode", f"{ino} is no folder")
        names = [(b".", ino, _DT_DIR), (b"..", ino, _DT_DIR)]
        names += [(name, index + _FIRST, _DT_REG) for name, index in self._names.items()]
        for place, (name, number, kind) in enumerate(names[offset:], offset + 1):
            yield DirEntry(name, number, kind, place)

    def parent(self, ino: int) -> int:
        return self.root_ino

    def readlink(self, ino: int) -> bytes:
        raise FormatError(self._where, "inode", f"{ino} is no symbolic link")

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        return {}

    def extents(self, ino: int, offset: int, size: int) -> list[Extent]:
        index = self._index(ino)
        length = min(size, self._size(index) - offset)
        return self._device.extents(index, offset, length) if length > 0 else []

    def prefetch_inodes(self) -> list[int]:
        return []

    def raw_chunks(self) -> Iterator[RawChunk]:
        return iter(())

    def superblock_facts(self) -> dict[str, object]:
        return {}

    def _index(self, ino: int) -> int:
        index = ino - _FIRST
        if not 0 <= index < len(self.blobs):
            raise FormatError(self._where, "inode", f"there is no blob of number {ino}")
        return index

    def _size(self, index: int) -> int:
        known = self._device.size(index)
        return self.blobs[index].uncompressed_size if known is None else known
