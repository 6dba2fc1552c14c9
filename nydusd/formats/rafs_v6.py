"""RAFS v6: reads inodes, directories, xattrs and the data layout straight out of the bytes of a bootstrap.

Front ends call `inode`, `lookup`, `readdir` and `extents` for every request of the kernel, over an mmap that all of
them share; workers use the tables. Nothing is kept per file but a bounded cache of decoded inodes, and nothing is
written: after SIGKILL the next process opens the same bytes.

An inode is at `meta_blkaddr * block + nid * 32`; its number towards the kernel is the nid. Every place that an inode
points to is checked when the inode is decoded, so that what follows may read without looking at bounds again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import NamedTuple

from nydusd.errors import FormatError
from nydusd.formats.chunk_info import CHUNK_INFO_SIZE, read_chunk_info
from nydusd.formats.model import (
    MAX_CHUNKS,
    TARFS_GRID,
    BlobFeature,
    BlobInfo,
    DirEntry,
    Extent,
    Inode,
    RawChunk,
)
from nydusd.formats.rafs_v6_dir import Directory
from nydusd.formats.rafs_v6_super import facts, read_blobs, read_super
from nydusd.formats.rafs_v6_xattr import read_xattrs
from nydusd.formats.superblock import (
    DEVICES,
    FILE_TYPES,
    MAX_FILE_SIZE,
    MAX_SYMLINK,
    S_IFDIR,
    S_IFLNK,
    S_IFMT,
    S_IFREG,
    SuperFlag,
    owner_for_all,
)

_U16 = Struct("<H").unpack_from
_U32 = Struct("<I")
_COMPACT = Struct("<HHHHI4xIIHH4x")
"""format, xattr count, mode, nlink, size, i_u, (ino), uid, gid."""
_EXTENDED = Struct("<HHHxxQIIIIQII16x")
"""format, xattr count, mode, size, i_u, (ino), uid, gid, mtime, nanoseconds, nlink."""
_ADDRESS = Struct("<HHI")
"""Chunk address: low 16 bits of the chunk index; device (8 bits) and high 8 bits of the index; block in the blob."""

_PLAIN, _INLINE, _CHUNKED = 0, 2, 4
_INDEXED = 0x20
_HEADER_AT = 16
"""Of a regular file's chunk header in its inode, of either size."""
_CACHED = 1024


class _Node(NamedTuple):
    """A decoded inode. `xattr` is where its xattrs begin (0: none) and `data` the first byte of its own data: the
    array of chunk addresses (regular files), block 0 (flat, whole blocks), with `tail` the last block if it is inline
    (else 0)."""

    inode: Inode
    xattr: int
    xattr_size: int
    data: int
    tail: int


class RafsV6:
    """A `Bootstrap` over the bytes of a v6 image's metadata. `buf` is used, never copied: it must stay mapped.

    `where` names the file in messages. `path_id` is the blob id in the file's name (see `blob_id_from_path`), and
    `extracted` says that the bootstrap was taken out of that blob: `takes_path_id` tells which blobs are called so.
    """

    version = 6

    def __init__(self, buf: memoryview, where: str, path_id: str | None = None, *, extracted: bool = False) -> None:
        """Raises `FormatError` when the superblock, a table or the root directory breaks the format."""
        self._buf = buf
        self._where = where
        self._end = self.length = len(buf)
        self._super = sb = read_super(buf, where)
        self.blobs: Sequence[BlobInfo] = read_blobs(buf, where, sb, path_id, extracted=extracted)
        self.chunk_size = sb.chunk_size
        self.root_ino = sb.root_nid
        self.inode_count = sb.inodes
        self.flags = sb.flags
        self.has_xattr = bool(sb.flags & SuperFlag.HAS_XATTR)
        self._block = sb.block
        self._meta = sb.meta_blkaddr * sb.block
        self._last_nid = (self._end - self._meta) // 32 - 1
        self._shift = sb.chunk_size.bit_length() - 1
        self._owner = owner_for_all(sb.flags)
        self._limits = [_blob_limits(blob) for blob in self.blobs]
        self._nodes: dict[int, _Node] = {}
        self._directory(self.root_ino)

    def inode(self, ino: int) -> Inode:
        """Attributes of the inode with this nid. `mtime` is the stored u64; compact inodes have none, so 0."""
        return (self._nodes.get(ino) or self._load(ino))[0]

    def lookup(self, parent: int, name: bytes) -> int | None:
        """The nid of `name` ("." and ".." included) in the directory `parent`, None when it is not there.

        Two binary searches, as entries are sorted by the bytes of their names: over the first names of the blocks,
        then in the one block that can hold it.
        """
        return self._directory(parent).find(name)

    def readdir(self, ino: int, offset: int) -> Iterator[DirEntry]:
        """The entries of a directory from `offset` on, in stored order, "." and ".." among them.

        An offset is the position of an entry's head in the directory's data, so going on costs nothing. One that is
        none of ours (programs may seek anywhere) means the next entry after it.
        """
        return self._directory(ino).entries(max(offset, 0))

    def parent(self, ino: int) -> int:
        """The nid of the directory that holds the directory `ino`; the root's is itself."""
        if ino == self.root_ino:
            return ino
        found = self.lookup(ino, b"..")
        if found is None:
            raise self._bad(ino, "dirent.name", "the directory has no entry '..'")
        return found

    def readlink(self, ino: int) -> bytes:
        """The target of a symlink."""
        node = self._nodes.get(ino) or self._load(ino)
        inode = node[0]
        if inode.mode & S_IFMT != S_IFLNK:
            raise self._bad(ino, "inode.mode", f"{inode.mode:#o} is no symlink")
        target = bytes(self._buf[node.data : node.data + inode.size])
        if b"\0" in target:
            raise self._bad(ino, "symlink", f"{target[:64]!r} holds a NUL")
        return target

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        """All extended attributes, with the full names."""
        node = self._nodes.get(ino) or self._load(ino)
        if not node.xattr_size:
            return {}
        return read_xattrs(self._buf[node.xattr : node.xattr + node.xattr_size], self._where, ino)

    def extents(self, ino: int, offset: int, size: int) -> list[Extent]:
        """The pieces that hold `size` bytes at `offset` of a regular file, in order; nothing beyond its end.

        Chunk i of a file holds the bytes from i * chunk_size, always: the exponent in the inode's chunk header is a
        hint for the kernel and larger than that when chunks happen to be neighbours.
        """
        node = self._nodes.get(ino) or self._load(ino)
        inode = node[0]
        if inode[1] & S_IFMT != S_IFREG:
            raise self._bad(ino, "inode.mode", f"{inode[1]:#o} is no regular file")
        length = inode[5]
        end = min(offset + size, length)
        if offset < 0 or offset >= end:
            return []
        shift, limits = self._shift, self._limits
        chunk_size, block = self.chunk_size, self._block
        first = offset >> shift
        start = first << shift
        within = offset - start
        at = node[3] + 8 * first
        pieces: list[Extent] = []
        for low, high, address in _ADDRESS.iter_unpack(self._buf[at : at + 8 * (((end - 1) >> shift) - first + 1)]):
            device = high & 0xFF
            chunk = low | (high >> 8) << 16
            uoff = address * block
            chunk_len = min(chunk_size, length - start)
            stop = min(chunk_size, end - start)
            if not 0 < device <= len(limits):
                raise self._bad(ino, "chunk.device", f"{device} must be 1 to {len(limits)}")
            most_chunks, most_bytes, grid = limits[device - 1]
            if chunk >= most_chunks:
                raise self._bad(ino, "chunk.index", f"{chunk} must be below the blob's {most_chunks} chunks")
            if uoff + chunk_len > most_bytes:
                raise self._bad(ino, "chunk.block", f"{uoff} + {chunk_len} is beyond the blob's {most_bytes} bytes")
            if grid:
                pieces += _on_grid(device - 1, uoff + within, uoff + stop)
            else:
                pieces.append(Extent(device - 1, chunk, uoff, within, stop - within, chunk_len))
            within = 0
            start += chunk_size
        return pieces

    def chunk_addresses(self, ino: int) -> list[tuple[int, int, int]]:
        """(blob, index, uncompressed offset) of every chunk of a regular file, as stored: no pieces of a grid."""
        inode = self.inode(ino)
        if inode.mode & S_IFMT != S_IFREG:
            raise self._bad(ino, "inode.mode", f"{inode.mode:#o} is no regular file")
        self.extents(ino, 0, inode.size)  # checks every address
        at, count = self._nodes[ino].data, (inode.size + self.chunk_size - 1) >> self._shift
        stored = _ADDRESS.iter_unpack(self._buf[at : at + _ADDRESS.size * count])
        return [((high & 0xFF) - 1, low | (high >> 8) << 16, block * self._block) for low, high, block in stored]

    def places(self, ino: int) -> tuple[int, int]:
        """Where in the file the chunk header of a regular file that has data is, and where its array of chunk addresses."""
        node = self._nodes.get(ino) or self._load(ino)
        return self._meta + ino * 32 + _HEADER_AT, node.data

    def prefetch_inodes(self) -> list[int]:
        """The nids in the prefetch table. A directory stands for all regular files below it."""
        table = self._super.prefetch_table
        nids: list[int] = []
        for (nid,) in _U32.iter_unpack(self._buf[table.offset : table.offset + table.length]):
            if nid == 0:
                break
            if nid > self._last_nid:
                raise FormatError(self._where, "prefetch_table", f"nid {nid}, the file ends after {self._last_nid}")
            nids.append(nid)
        return nids

    def raw_chunks(self) -> Iterator[RawChunk]:
        """The chunk table. Of no use for batch chunks (no place, no flags), and empty for tarfs, where it is junk."""
        table = self._super.chunk_table
        if self._super.tarfs:
            return
        for at in range(table.offset, table.offset + table.length, CHUNK_INFO_SIZE):
            chunk = read_chunk_info(self._buf, at)
            if chunk.blob_index >= len(self.blobs):
                raise FormatError(
                    self._where, "chunk_table.blob_index", f"{chunk.blob_index} must be below {len(self.blobs)}"
                )
            most_chunks, most_bytes, _ = self._limits[chunk.blob_index]
            if chunk.index >= most_chunks:
                raise FormatError(
                    self._where,
                    "chunk_table.index",
                    f"{chunk.index} must be below the {most_chunks} chunks of blob {chunk.blob_index}",
                )
            if chunk.uoff % self._block or chunk.uoff + chunk.usize > most_bytes:
                raise FormatError(
                    self._where,
                    "chunk_table.uncompressed_offset",
                    f"{chunk.uoff} + {chunk.usize} must be a block's begin, and within the blob's {most_bytes} bytes",
                )
            yield chunk

    def superblock_facts(self) -> dict[str, object]:
        """The superblock as the API's backend information shows it: same keys, same order as the reference."""
        return facts(self._super)

    def _bad(self, ino: int, field: str, message: str) -> FormatError:
        return FormatError(self._where, field, f"inode {ino}: {message}")

    def _directory(self, ino: int) -> Directory:
        inode, _, _, data, tail = self._nodes.get(ino) or self._load(ino)
        if inode[1] & S_IFMT != S_IFDIR:
            raise self._bad(ino, "inode.mode", f"{inode.mode:#o} is no directory")
        return Directory(self._buf, self._where, ino, inode[5], data, tail, self._block, self._last_nid)

    def _load(self, ino: int) -> _Node:
        """Decode and check an inode, and remember it."""
        if not 0 <= ino <= self._last_nid:
            raise self._bad(ino, "inode.nid", f"must be within 0 and the last of the file, {self._last_nid}")
        buf = self._buf
        at = self._meta + ino * 32
        layout = _U16(buf, at)[0]
        if layout & 1:
            if at + 64 > self._end:
                raise self._bad(ino, "inode.nid", f"64 bytes at {at} are beyond the end of the file, {self._end}")
            _, xattr_count, mode, size, i_u, _, uid, gid, mtime, mtime_ns, nlink = _EXTENDED.unpack_from(buf, at)
            body = at + 64
            rdev = i_u if mode & S_IFMT in DEVICES else 0
        else:
            _, xattr_count, mode, nlink, size, i_u, _, uid, gid = _COMPACT.unpack_from(buf, at)
            mtime = mtime_ns = rdev = 0
            body = at + 32
        if nlink == 0:
            raise self._bad(ino, "inode.nlink", "0 must be at least 1")
        if size > MAX_FILE_SIZE:
            raise self._bad(ino, "inode.size", f"{size} must be at most {MAX_FILE_SIZE}")
        xattr_size = 8 + 4 * xattr_count if xattr_count else 0
        data = body + xattr_size
        if data > self._end:
            raise self._bad(
                ino, "inode.xattr_count", f"{xattr_count} makes the xattrs end beyond the file, {self._end}"
            )
        data, tail = self._place(ino, layout, mode, size, i_u, data)
        if self._owner:
            uid, gid = self._owner
        inode = Inode(ino, mode, nlink, uid, gid, size, (size + 511) // 512, mtime, mtime_ns, rdev)
        node = _Node(inode, body, xattr_size, data, tail)
        if len(self._nodes) >= _CACHED:
            self._nodes.clear()
        self._nodes[ino] = node
        return node

    def _place(self, ino: int, layout: int, mode: int, size: int, i_u: int, after: int) -> tuple[int, int]:
        """Where the data of an inode is (see `_Node`), all of it inside the file. `after` is what follows its xattrs."""
        if layout & ~0xF or layout >> 1 not in (_PLAIN, _INLINE, _CHUNKED):
            raise self._bad(ino, "inode.format", f"{layout:#x} is no known layout")
        layout >>= 1
        kind = mode & S_IFMT
        if kind == S_IFREG:
            if size == 0:
                return after, 0
            if layout != _CHUNKED:
                raise self._bad(ino, "inode.format", f"layout {layout} of a regular file with data must be {_CHUNKED}")
            if not _INDEXED <= i_u < 2 * _INDEXED:
                raise self._bad(ino, "inode.i_u", f"{i_u:#x} is no chunk header: {_INDEXED:#x} and 5 bits of exponent")
            after = (after + 7) & ~7
            if after + 8 * ((size + self.chunk_size - 1) >> self._shift) > self._end:
                raise self._bad(
                    ino, "inode.size", f"the chunk addresses of {size} bytes end beyond the file, {self._end}"
                )
            return after, 0
        if kind not in FILE_TYPES:
            raise self._bad(ino, "inode.mode", f"{mode:#o} is no known type of file")
        if kind != S_IFDIR and kind != S_IFLNK:
            return after, 0
        if layout == _CHUNKED:
            raise self._bad(ino, "inode.format", f"layout {layout} of a directory or symlink must be flat")
        if size == 0:
            raise self._bad(ino, "inode.size", "0 must be at least 1 for a directory or symlink")
        if kind == S_IFLNK:
            if size > MAX_SYMLINK:
                raise self._bad(ino, "inode.size", f"{size} of a symlink must be at most {MAX_SYMLINK}")
            # An inline target is never split. Tarfs builders put even one of more than a block (512 bytes) there.
            start = after if layout == _INLINE else i_u * self._block
            if start + size > self._end:
                raise self._bad(
                    ino, "inode.size", f"{size} bytes at {start} are beyond the end of the file, {self._end}"
                )
            return start, 0
        start = i_u * self._block
        whole, tail = size, 0
        if layout == _INLINE:
            whole = (size - 1) // self._block * self._block
            tail = after
            if tail + size - whole > self._end:
                raise self._bad(ino, "inode.size", f"the last block of {size} bytes is beyond the file, {self._end}")
        if whole and start + whole > self._end:
            raise self._bad(ino, "inode.size", f"{whole} bytes at {start} are beyond the end of the file, {self._end}")
        return start, tail


def _blob_limits(blob: BlobInfo) -> tuple[int, int, bool]:
    """What chunk addresses into a blob may say: chunks, bytes, and whether its chunks are pieces of the tarfs grid."""
    if blob.is_tarfs:
        return MAX_CHUNKS, blob.uncompressed_size, True
    if blob.features & BlobFeature.IS_CHUNKDICT_GENERATED:
        return MAX_CHUNKS, (blob.uncompressed_size + 4095) & ~4095, False
    return blob.chunk_count, (blob.uncompressed_size + 4095) & ~4095, False


def _on_grid(blob: int, begin: int, end: int) -> Iterator[Extent]:
    """The bytes from `begin` to `end` of a tar, cut at the borders of our grid."""
    while begin < end:
        piece, within = divmod(begin, TARFS_GRID)
        length = min(TARFS_GRID - within, end - begin)
        yield Extent(blob, piece, piece * TARFS_GRID, within, length, 0)
        begin += length
