"""What an image's metadata says, whatever its version: the types that the parsers give and the layers above use.

Plain data, no I/O. Sizes and offsets are bytes unless a name says otherwise. `coff`/`csize` are positions in the
stored blob, `uoff`/`usize` in the virtual uncompressed blob (the cache file).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import NamedTuple, Protocol


class Compressor(IntEnum):
    """Values of the u32 compressor fields."""

    NONE = 0
    LZ4_BLOCK = 1
    GZIP = 2
    ZSTD = 3


class Digester(IntEnum):
    """Values of the u32 digester fields: blake3 is 0."""

    BLAKE3 = 0
    SHA256 = 1


class Cipher(IntEnum):
    """Values of the u32 cipher field. Others exist in the reference's code but never in images."""

    NONE = 0
    AES_128_XTS = 1


class BlobFeature(IntFlag):
    """Feature bits of a blob, the same in the blob table and in the header of the chunk information."""

    ALIGNED = 0x1
    INLINED_FS_META = 0x2
    CHUNK_INFO_V2 = 0x4
    ZRAN = 0x8
    SEPARATE = 0x10
    INLINED_CHUNK_DIGEST = 0x20
    TARFS = 0x40
    BATCH = 0x80
    ENCRYPTED = 0x100
    IS_CHUNKDICT_GENERATED = 0x200
    IS_SEPARATED_WITH_PREFETCH_FILES = 0x400
    EXTERNAL = 0x800
    HAS_TAR_HEADER = 0x10000000
    HAS_TOC = 0x20000000
    CAP_TAR_TOC = 0x40000000


class ChunkFlag(IntFlag):
    """Flags of a `ChunkRecord` (ours, not a format's).

    UNLISTED: the blob has the chunk, but no file of this image refers to it, so there is no digest to check it by. It may be
    another image's, which has one: it is never written to a cache file that others use, too.
    """

    COMPRESSED = 0x1
    ENCRYPTED = 0x2
    BATCH = 0x4
    ZRAN = 0x8
    CRC = 0x10
    DIGEST = 0x20
    UNLISTED = 0x40


class ChunkRecord(NamedTuple):
    """One chunk of a blob, normalised from any of the sources (CI v1/v2, chunk table, v5 inode, tarfs grid).

    For BATCH chunks `coff`/`csize` are the batch's (csize from its context), `ctx` the context's index and `ctx_off` the
    chunk's offset in the decoded batch. For ZRAN likewise, with coff/csize the hints of the record.
    `crc` is CRC-32C of the plain chunk, valid with CRC. The digest lives in an array beside the records.
    """

    coff: int
    uoff: int
    csize: int
    usize: int
    flags: int
    ctx: int
    ctx_off: int
    crc: int


class RawChunk(NamedTuple):
    """An 80-byte chunk info as stored in a v5 inode or in the v6 chunk table (formats.md 2.7)."""

    digest: bytes
    blob_index: int
    flags: int  # on-disk bits: 1 compressed, 2 hole, 4 encrypted, 8 batch, 0x10 has crc32
    csize: int
    usize: int
    coff: int
    uoff: int
    file_offset: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    crc: int


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """One entry of the blob table, checked and with the id rules of formats.md 3.3 applied.

    `chunk_count` 0 means unknown (a v5 image without extended blob table); sizes are then 0 as well.
    `cipher_key` (32 bytes) and `cipher_iv` (16 bytes) are empty unless `cipher` is set.
    """

    index: int
    blob_id: str
    features: int
    chunk_size: int
    chunk_count: int
    compressor: Compressor
    digester: Digester
    cipher: Cipher
    compressed_size: int
    uncompressed_size: int
    ci_compressor: Compressor
    ci_offset: int
    ci_compressed_size: int
    ci_uncompressed_size: int
    toc_size: int
    toc_digest: bytes
    meta_digest: bytes
    meta_size: int
    prefetch_offset: int
    prefetch_size: int
    cipher_key: bytes
    cipher_iv: bytes
    meta_blob_id: str
    """Id of the object that holds the chunk information: `blob_id` itself unless SEPARATE."""

    @property
    def has_ci(self) -> bool:
        """Whether the blob carries chunk information (v6 without tarfs)."""
        return self.ci_compressed_size > 0 and self.ci_uncompressed_size > 0

    @property
    def is_tarfs(self) -> bool:
        return bool(self.features & BlobFeature.TARFS) and bool(self.features & BlobFeature.CAP_TAR_TOC)

    @property
    def compressed_data_size(self) -> int:
        """Length of the pure chunk data at the start of the stored blob (formats.md 3.3)."""
        if self.features & BlobFeature.SEPARATE:
            return self.compressed_size
        if self.features & BlobFeature.CAP_TAR_TOC:
            end = self.ci_offset if self.has_ci else self.compressed_size
            return end - 512 if self.features & BlobFeature.HAS_TAR_HEADER else end
        return self.compressed_size


class Inode(NamedTuple):
    """Attributes of an inode. `ino` is the nid (v6) or the inode number (v5); `blocks` are 512-byte units."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    blocks: int
    mtime: int
    mtime_ns: int
    rdev: int


class DirEntry(NamedTuple):
    """A directory entry. `next_offset` is what readdir must be given to go on after this entry (never 0).

    `kind` is the d_type (DT_REG 8, DT_DIR 4, DT_LNK 10, DT_CHR 2, DT_BLK 6, DT_FIFO 1, DT_SOCK 12, DT_UNKNOWN 0).
    """

    name: bytes
    ino: int
    kind: int
    next_offset: int


class Extent(NamedTuple):
    """A piece of a file inside one chunk: `length` bytes at `offset` in the chunk, which starts at `uoff`.

    `chunk_len` is the chunk's length as the file implies it (0 where it implies none, tarfs).
    """

    blob: int
    chunk: int
    uoff: int
    offset: int
    length: int
    chunk_len: int


MAX_CHUNKS = 1 << 24
"""Chunks of a blob at most: v6 numbers them with 24 bits."""

TARFS_GRID = 1 << 20
"""A tarfs blob has no chunk table: ours cuts the tar into pieces of this size, the last one shorter."""


NAME_LEAST = 12
"""Bytes that a name takes in metadata, at least. Hostile folders may share the blocks that their entries are in."""


class Bootstrap(Protocol):
    """A parsed bootstrap: a view on its bytes. Nothing per file is kept in memory; every call reads the bytes anew.

    All methods raise `FormatError` for bytes that break the format (never IndexError, struct.error, RecursionError …).
    """

    version: int  # 5 or 6
    chunk_size: int
    root_ino: int
    inode_count: int
    flags: int
    has_xattr: bool
    blobs: Sequence[BlobInfo]
    length: int
    """Bytes of the metadata: what may be in it at most, as nothing in it is there for two (`NAME_LEAST`)."""

    def inode(self, ino: int) -> Inode: ...
    def lookup(self, parent: int, name: bytes) -> int | None: ...
    def readdir(self, ino: int, offset: int) -> Iterator[DirEntry]: ...
    def parent(self, ino: int) -> int: ...
    def readlink(self, ino: int) -> bytes: ...
    def xattrs(self, ino: int) -> dict[bytes, bytes]: ...
    def extents(self, ino: int, offset: int, size: int) -> list[Extent]: ...
    def prefetch_inodes(self) -> list[int]: ...
    def raw_chunks(self) -> Iterator[RawChunk]: ...
    def superblock_facts(self) -> dict[str, object]: ...
