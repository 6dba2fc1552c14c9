"""RAFS v5: reads inodes, directories, xattrs and the data layout straight out of the bytes of a bootstrap.

Front ends call `inode`, `lookup`, `readdir` and `extents` for every request of the kernel, over an mmap that all of
them share. Nothing is kept per file but a bounded cache of decoded inodes, and nothing is written: after SIGKILL the
next process opens the same bytes.

The inode table has a slot a name: slot n (from 1) is the offset of a record with the name, its directory and the
inode. The names of a hard link have a record each, all with the ino of the first one, which is that one's slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct

from nydusd.errors import FormatError
from nydusd.formats.chunk_info import CHUNK_INFO_SIZE, CHUNK_PLACE, read_chunk_info
from nydusd.formats.model import BlobInfo, DirEntry, Extent, Inode, RawChunk
from nydusd.formats.rafs_v5_inode import MAX_STORED_NAME, RECORD_SIZE, ROOT_INO, Node, inode_error, read_inode
from nydusd.formats.rafs_v5_super import SUPERBLOCK_SIZE, facts, read_blobs, read_super
from nydusd.formats.rafs_v5_xattr import read_xattrs
from nydusd.formats.superblock import (
    FILE_TYPES,
    S_IFDIR,
    S_IFLNK,
    S_IFMT,
    S_IFREG,
    SuperFlag,
    name_fault,
    owner_for_all,
)

_U32 = Struct("<I")
_U64 = Struct("<Q")
_SLOT = _U32.unpack_from
_CHILD = Struct("<32xQQ12xI36xH")
"""What a listing needs of a record: parent, ino, mode, name size."""
_NAME_SIZE = Struct("<H").unpack_from
_NAME_SIZE_AT = 100
_CACHED = 1024


class RafsV5:
    """A `Bootstrap` over the bytes of a v5 image's metadata. `buf` is used, never copied: it must stay mapped.

    `where` names the file in messages. `path_id` is the blob id in the file's name (see `blob_id_from_path`), and
    `extracted` says that the bootstrap was taken out of that blob: `takes_path_id` tells which blobs are called so.
    """

    version = 5

    def __init__(self, buf: memoryview, where: str, path_id: str | None = None, *, extracted: bool = False) -> None:
        """Raises `FormatError` when the superblock, a table or the root directory breaks the format."""
        self._buf = buf
        self._where = where
        self._end = self.length = len(buf)
        self._super = sb = read_super(buf, where)
        self.blobs: Sequence[BlobInfo] = read_blobs(buf, where, sb, path_id, extracted=extracted)
        self.chunk_size = sb.chunk_size
        self.root_ino = ROOT_INO
        self.inode_count = sb.inodes
        self.flags = sb.flags
        self.has_xattr = bool(sb.flags & SuperFlag.HAS_XATTR)
        self._table = sb.inode_table.offset - 4
        self._entries_count = sb.entries
        self._shift = sb.chunk_size.bit_length() - 1
        self._owner = owner_for_all(sb.flags)
        self._limits = [(blob.chunk_count, blob.uncompressed_size) for blob in self.blobs]
        self._nodes: dict[int, Node] = {}
        self._directory(ROOT_INO)

    def inode(self, ino: int) -> Inode:
        """Attributes of an inode. `mtime` is the stored u64."""
        return (self._nodes.get(ino) or self._load(ino))[0]

    def lookup(self, parent: int, name: bytes) -> int | None:
        """The ino of `name` in the directory `parent`, None when it is not there: a binary search, names are sorted."""
        node = self._directory(parent)
        if name == b".":
            return parent
        if name == b"..":
            return self.parent(parent)
        low, high = node.first, node.first + node.number - 1
        while low <= high:
            middle = (low + high) >> 1
            at = self._record(middle)
            found = self._stored_name(middle, at)
            if found == name:
                return self._child(parent, middle, at)[0]
            if found < name:
                low = middle + 1
            else:
                high = middle - 1
        return None

    def readdir(self, ino: int, offset: int) -> Iterator[DirEntry]:
        """The entries of a directory from the `offset`-th on: ".", "..", then the children in stored order."""
        return self._entries(ino, self._directory(ino), max(offset, 0))

    def parent(self, ino: int) -> int:
        """The ino of the directory that holds `ino` (a hard link: its first name); the root's is itself."""
        if ino == ROOT_INO:
            return ino
        return (self._nodes.get(ino) or self._load(ino)).parent

    def readlink(self, ino: int) -> bytes:
        """The target of a symlink."""
        node = self._nodes.get(ino) or self._load(ino)
        if node.inode.mode & S_IFMT != S_IFLNK:
            raise self._bad(ino, "inode.mode", f"{node.inode.mode:#o} is no symlink")
        target = bytes(self._buf[node.target : node.target + node.target_size])
        if b"\0" in target:
            raise self._bad(ino, "symlink", f"{target[:64]!r} holds a NUL")
        return target

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        """All extended attributes, with the full names."""
        node = self._nodes.get(ino) or self._load(ino)
        if not node.xattr:
            return {}
        size = _U64.unpack_from(self._buf, node.xattr)[0]
        return read_xattrs(self._buf[node.xattr + 8 : node.xattr + 8 + size], self._where, ino)

    def extents(self, ino: int, offset: int, size: int) -> list[Extent]:
        """The pieces that hold `size` bytes at `offset` of a regular file, in order; nothing beyond its end.

        Chunk i holds the bytes from i * chunk_size. In a file with holes it holds those from its own file offset; a
        range that no chunk covers has no place to be read from and is refused.
        """
        node = self._nodes.get(ino) or self._load(ino)
        inode = node[0]
        if inode[1] & S_IFMT != S_IFREG:
            raise self._bad(ino, "inode.mode", f"{inode[1]:#o} is no regular file")
        length = inode[5]
        end = min(offset + size, length)
        if offset < 0 or offset >= end:
            return []
        if node.holes:
            return self._sparse_extents(ino, node, offset, end)
        shift, limits, chunk_size = self._shift, self._limits, self.chunk_size
        first = offset >> shift
        start = first << shift
        within = offset - start
        at = node.chunks + CHUNK_INFO_SIZE * first
        count = ((end - 1) >> shift) - first + 1
        pieces: list[Extent] = []
        for blob, usize, uoff, _, index in CHUNK_PLACE.iter_unpack(self._buf[at : at + CHUNK_INFO_SIZE * count]):
            chunk_len = min(chunk_size, length - start)
            if usize != chunk_len:
                raise self._bad(
                    ino, "chunk.uncompressed_size", f"{usize} must be {chunk_len} for the bytes from {start}"
                )
            if blob >= len(limits) or not _chunk_fits(limits[blob], index, uoff + usize):
                raise self._bad_chunk(ino, blob, index, uoff + usize)
            stop = min(chunk_size, end - start)
            pieces.append(Extent(blob, index, uoff, within, stop - within, chunk_len))
            within = 0
            start += chunk_size
        return pieces

    def inode_digest(self, ino: int) -> bytes:
        """The stored digest of an inode."""
        at = self._record(ino)
        return bytes(self._buf[at : at + 32])

    def chunk_infos(self, ino: int) -> int:
        """How many chunk infos a regular file has."""
        return (self._nodes.get(ino) or self._load(ino)).number

    def file_chunks(self, ino: int) -> list[RawChunk]:
        """The chunk infos of a regular file, in order."""
        node = self._nodes.get(ino) or self._load(ino)
        if node.inode.mode & S_IFMT != S_IFREG:
            raise self._bad(ino, "inode.mode", f"{node.inode.mode:#o} is no regular file")
        places = range(node.chunks, node.chunks + CHUNK_INFO_SIZE * node.number, CHUNK_INFO_SIZE)
        chunks = [read_chunk_info(self._buf, place) for place in places]
        for chunk in chunks:
            self._check_chunk(ino, chunk)
        return chunks

    def prefetch_inodes(self) -> list[int]:
        """The inos in the prefetch table. A directory stands for all regular files below it."""
        table = self._super.prefetch_table
        inos: list[int] = []
        for (ino,) in _U32.iter_unpack(self._buf[table.offset : table.offset + table.length]):
            if ino == 0:
                break
            if ino > self._entries_count:
                raise FormatError(self._where, "prefetch_table", f"ino {ino}, the last is {self._entries_count}")
            inos.append(ino)
        return inos

    def raw_chunks(self) -> Iterator[RawChunk]:
        """The chunk infos of every regular file, those of a hard link once.

        No more of them than the file has room for: a hostile one may give each inode the same array.
        """
        left = self._end // CHUNK_INFO_SIZE
        for slot in range(1, self._entries_count + 1):
            at = self._record(slot)
            _, ino, mode, _ = _CHILD.unpack_from(self._buf, at)
            if ino != slot or mode & S_IFMT != S_IFREG:
                continue
            chunks = self.file_chunks(ino)
            left -= len(chunks)
            if left < 0:
                raise self._bad(
                    ino, "inode.child_count", f"up to here more chunks than {self._end} bytes have room for"
                )
            yield from chunks

    def _check_chunk(self, ino: int, chunk: RawChunk) -> None:
        end = chunk.uoff + chunk.usize
        if chunk.blob_index >= len(self._limits) or not _chunk_fits(self._limits[chunk.blob_index], chunk.index, end):
            raise self._bad_chunk(ino, chunk.blob_index, chunk.index, end)

    def superblock_facts(self) -> dict[str, object]:
        """The superblock as the API's backend information shows it: same keys, same order as the reference."""
        return facts(self._super)

    def _bad(self, ino: int, field: str, message: str) -> FormatError:
        return inode_error(self._where, ino, field, message)

    def _bad_chunk(self, ino: int, blob: int, index: int, end: int) -> FormatError:
        if blob >= len(self._limits):
            return self._bad(ino, "chunk.blob_index", f"{blob} must be below {len(self._limits)}")
        chunks, size = self._limits[blob]
        if index >= chunks:
            return self._bad(ino, "chunk.index", f"{index} must be below the blob's {chunks} chunks")
        return self._bad(ino, "chunk.uncompressed_offset", f"the chunk's end {end} is beyond the blob's {size} bytes")

    def _directory(self, ino: int) -> Node:
        node = self._nodes.get(ino) or self._load(ino)
        if node[0][1] & S_IFMT != S_IFDIR:
            raise self._bad(ino, "inode.mode", f"{node[0].mode:#o} is no directory")
        return node

    def _record(self, slot: int) -> int:
        """Where the record of a slot is. `slot` must be in the table; 128 bytes are there."""
        stored: int = _SLOT(self._buf, self._table + 4 * slot)[0]
        at = stored << 3
        if at <= SUPERBLOCK_SIZE or at + RECORD_SIZE > self._end:
            raise self._bad(slot, "inode_table", f"offset {at} must be above {SUPERBLOCK_SIZE}, 128 below {self._end}")
        return at

    def _stored_name(self, slot: int, at: int) -> bytes:
        size: int = _NAME_SIZE(self._buf, at + _NAME_SIZE_AT)[0]
        begin = at + RECORD_SIZE
        if not 0 < size <= MAX_STORED_NAME or begin + size > self._end:
            raise self._bad(slot, "inode.name_size", f"{size} must be 1 to {MAX_STORED_NAME}, inside the file")
        return bytes(self._buf[begin : begin + size]).rstrip(b"\0")

    def _child(self, parent: int, slot: int, at: int) -> tuple[int, int]:
        """Ino and mode in the record of a child. A name of a hard link may carry the ino of another slot, whose inode
        it then repeats; a directory has one name."""
        stored_parent, ino, mode, _ = _CHILD.unpack_from(self._buf, at)
        if stored_parent != parent:
            raise self._bad(slot, "inode.parent", f"{stored_parent} must be the directory {parent}")
        if mode & S_IFMT not in FILE_TYPES:
            raise self._bad(slot, "inode.mode", f"{mode:#o} is no known type of file")
        if ino != slot:
            if mode & S_IFMT == S_IFDIR:
                raise self._bad(slot, "inode.ino", f"{ino} of a directory must be the slot in the table")
            if (linked := self.inode(ino).mode) != mode:
                raise self._bad(slot, "inode.mode", f"{mode:#o} must be {linked:#o}, as in slot {ino} of the same file")
        return ino, mode

    def _entries(self, ino: int, node: Node, offset: int) -> Iterator[DirEntry]:
        if offset == 0:
            yield DirEntry(b".", ino, 4, 1)
        if offset <= 1:
            yield DirEntry(b"..", self.parent(ino), 4, 2)
        previous = b""
        for position in range(max(offset, 2), node.number + 2):
            slot = node.first + position - 2
            at = self._record(slot)
            name = self._stored_name(slot, at)
            fault = "is '.' or '..', which are never stored" if name in (b".", b"..") else name_fault(name)
            if fault:
                raise self._bad(slot, "inode.name", f"the name of a child {fault}")
            if name <= previous:
                raise self._bad(
                    slot, "inode.name", f"{name!r} must come after {previous!r}: names are sorted, once each"
                )
            previous = name
            child, mode = self._child(ino, slot, at)
            yield DirEntry(name, child, mode >> 12 & 15, position + 1)

    def _load(self, ino: int) -> Node:
        """Decode and check an inode, and remember it."""
        if not 0 < ino <= self._entries_count:
            raise self._bad(ino, "inode.ino", f"must be within 1 and the entries of the table, {self._entries_count}")
        node = read_inode(
            self._buf, self._where, self._record(ino), ino, self._entries_count, self.chunk_size, self._owner
        )
        if len(self._nodes) >= _CACHED:
            self._nodes.clear()
        self._nodes[ino] = node
        return node

    def _sparse_extents(self, ino: int, node: Node, offset: int, end: int) -> list[Extent]:
        """As `extents`, by the file offsets of the chunks, which ascend. A binary search finds the first."""
        low, high = 0, node.number
        while low < high:
            middle = (low + high) >> 1
            _, usize, _, start, _ = CHUNK_PLACE.unpack_from(self._buf, node.chunks + CHUNK_INFO_SIZE * middle)
            if start + usize <= offset:
                low = middle + 1
            else:
                high = middle
        pieces: list[Extent] = []
        most = max(_PIECES_MOST, (end - offset) // _PIECE_LEAST)
        while offset < end:
            if len(pieces) == most:
                raise self._bad(
                    ino, "chunk.uncompressed_size", f"more than {most} chunks for {end - offset} more bytes"
                )
            if low == node.number:
                raise self._bad(ino, "chunk.file_offset", f"no chunk covers the bytes from {offset}")
            blob, usize, uoff, start, index = CHUNK_PLACE.unpack_from(self._buf, node.chunks + CHUNK_INFO_SIZE * low)
            if not start <= offset < start + usize:
                raise self._bad(ino, "chunk.file_offset", f"{start} + {usize}: no chunk covers the bytes from {offset}")
            if usize > self.chunk_size:
                raise self._bad(ino, "chunk.uncompressed_size", f"{usize} must be at most {self.chunk_size}")
            if blob >= len(self._limits) or not _chunk_fits(self._limits[blob], index, uoff + usize):
                raise self._bad_chunk(ino, blob, index, uoff + usize)
            length = min(end, start + usize) - offset
            pieces.append(Extent(blob, index, uoff, offset - start, length, usize))
            offset += length
            low += 1
        return pieces


_PIECES_MOST, _PIECE_LEAST = 4096, 256
"""Chunks that one read may need where their lengths are free: that many, or one for so many bytes, if that is more.

A hostile file may have one for each byte, and who reads a megabyte of it must not keep others waiting for seconds."""


def _chunk_fits(limit: tuple[int, int], index: int, end: int) -> bool:
    """Whether a blob of `limit` chunks and bytes has the chunk; a blob without extended table has no known limit."""
    return not limit[0] or (index < limit[0] and end <= limit[1])
