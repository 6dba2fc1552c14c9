"""Superblock and blob tables of a RAFS v5 bootstrap: everything that is checked once, when it is opened.

Pure parsing of untrusted bytes, in time that depends on the number of blobs (limited here) and not of files.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from nydusd.errors import FormatError
from nydusd.formats.blob_id import check_blob_id, takes_path_id
from nydusd.formats.detect import V5_MAGIC, V5_VERSION
from nydusd.formats.model import MAX_CHUNKS, BlobFeature, BlobInfo, Cipher, Compressor
from nydusd.formats.superblock import (
    TIMEOUT_FACT,
    SuperFlag,
    Table,
    check_chunk_size,
    check_flags,
    check_tables,
    flags_compressor,
    flags_digester,
    requirer,
)

SUPERBLOCK_SIZE = 8192
MAX_SIZE = 0x80000000
MAX_BLOBS = 4096
"""The format has no limit, an image has at most some hundred; each becomes an object in every process."""
EXT_ENTRY_SIZE = 64

_SUPER = Struct("<IIIIQQQQQIIIIQ")
_BLOB = Struct("<II")
_EXT = Struct("<IIQQ")
_KNOWN_FEATURES = sum(BlobFeature)


class V5Super(NamedTuple):
    """The superblock's fields. Offsets and sizes are bytes."""

    chunk_size: int
    flags: int
    inodes: int
    entries: int
    inode_table: Table
    prefetch_table: Table
    blob_table: Table
    ext_table: Table


def read_super(buf: memoryview, where: str) -> V5Super:
    """Parse and check the superblock and the place of every table."""
    end = len(buf)
    require = requirer(where, "superblock")
    require(
        SUPERBLOCK_SIZE < end <= MAX_SIZE,
        "file_size",
        end,
        f"must be above {SUPERBLOCK_SIZE:#x}, at most {MAX_SIZE:#x}",
    )
    require(end % 8 == 0, "file_size", end, "must be a multiple of 8")
    (
        magic,
        version,
        size,
        chunk_size,
        flags,
        inodes,
        inode_at,
        prefetch_at,
        blob_at,
        entries,
        prefetch_entries,
        blob_len,
        ext_entries,
        ext_at,
    ) = _SUPER.unpack_from(buf)
    require(magic == V5_MAGIC, "magic", magic, f"must be {V5_MAGIC:#x}")
    require(version == V5_VERSION, "version", version, f"must be {V5_VERSION:#x}")
    require(size == SUPERBLOCK_SIZE, "sb_size", size, f"must be {SUPERBLOCK_SIZE:#x}")
    check_chunk_size(where, "superblock.block_size", chunk_size)
    check_flags(where, flags, exact=False)
    require(not flags & SuperFlag.AES_128_XTS, "flags", flags, "says encrypted, which v5 cannot be")
    require(entries > 0, "inode_table_entries", entries, "must be at least 1")
    require(inodes <= entries, "inodes_count", inodes, f"must be at most the table's entries, {entries:#x}")
    tables = [
        Table("inode_table", inode_at, entries * 4),
        Table("prefetch_table", prefetch_at, prefetch_entries * 4),
        Table("blob_table", blob_at, blob_len),
        Table("extended_blob_table", ext_at, ext_entries * EXT_ENTRY_SIZE),
    ]
    for table in tables:
        aligned = table.offset % 8 == 0 or table.length == 0
        require(aligned, f"{table.name}_offset", table.offset, "must be a multiple of 8")
    check_tables(where, tables, SUPERBLOCK_SIZE, end)
    return V5Super(chunk_size, flags, inodes, entries, *tables)


def read_blobs(buf: memoryview, where: str, sb: V5Super, path_id: str | None, *, extracted: bool) -> list[BlobInfo]:
    """Parse and check the blob table and, where there is one, the extended blob table."""
    if path_id is not None:
        check_blob_id(where, "path_id", path_id.encode("utf-8", "surrogateescape"))
    table = bytes(buf[sb.blob_table.offset : sb.blob_table.offset + sb.blob_table.length])
    entries = list(_split(table, where))
    known = sb.ext_table.length // EXT_ENTRY_SIZE
    if known and known < len(entries):
        raise FormatError(
            where, "superblock.extended_blob_table", f"{known} entries must be at least the blobs, {len(entries)}"
        )
    blobs = []
    for index, (prefetch_offset, prefetch_size, raw_id) in enumerate(entries):
        chunks, features, uncompressed, compressed = (
            _EXT.unpack_from(buf, sb.ext_table.offset + index * EXT_ENTRY_SIZE) if known else (0, 0, 0, 0)
        )
        require = requirer(where, f"blobs[{index}]")
        require(chunks <= MAX_CHUNKS, "chunk_count", chunks, f"must be at most {MAX_CHUNKS:#x}")
        require(uncompressed <= 1 << 44, "uncompressed_size", uncompressed, "must be at most 0x100000000000")
        require(compressed <= 1 << 40, "compressed_size", compressed, "must be at most 0x10000000000")
        features &= _KNOWN_FEATURES  # v5 readers ignore bits of a future that did not come
        blob_id = check_blob_id(where, f"blobs[{index}].blob_id", raw_id)
        if path_id is not None and takes_path_id(features, extracted=extracted):
            blob_id = path_id
        blobs.append(
            BlobInfo(
                index=index,
                blob_id=blob_id,
                features=features,
                chunk_size=sb.chunk_size,
                chunk_count=chunks,
                compressor=flags_compressor(sb.flags),
                digester=flags_digester(sb.flags),
                cipher=Cipher.NONE,
                compressed_size=compressed,
                uncompressed_size=uncompressed,
                ci_compressor=Compressor.NONE,
                ci_offset=0,
                ci_compressed_size=0,
                ci_uncompressed_size=0,
                toc_size=0,
                toc_digest=bytes(32),
                meta_digest=bytes(32),
                meta_size=0,
                prefetch_offset=prefetch_offset,
                prefetch_size=prefetch_size,
                cipher_key=b"",
                cipher_iv=b"",
                meta_blob_id=blob_id,
            )
        )
    return blobs


def _split(table: bytes, where: str) -> Iterator[tuple[int, int, bytes]]:
    """The entries of a blob table: u32 prefetch offset, u32 prefetch size, id, NUL; the last one may have no NUL.

    The size of the table counts zero padding of at most 7 bytes, hence the rule that an entry needs more than 8.
    """
    at = 0
    for _ in range(MAX_BLOBS + 1):
        if len(table) - at <= _BLOB.size:
            return
        offset, size = _BLOB.unpack_from(table, at)
        begin = at + _BLOB.size
        end = table.find(b"\0", begin)
        end = len(table) if end < 0 else end
        yield offset, size, table[begin:end]
        at = end + 1
    raise FormatError(where, "superblock.blob_table", f"more than {MAX_BLOBS} blobs")


def facts(sb: V5Super) -> dict[str, object]:
    """What `Bootstrap.superblock_facts` gives for v5."""
    return {
        "magic": V5_MAGIC,
        "version": V5_VERSION,
        "sb_size": SUPERBLOCK_SIZE,
        "root_inode": 0,
        "chunk_size": sb.chunk_size,
        "batch_size": 0,
        "inodes_count": sb.inodes,
        "flags": {"bits": sb.flags},
        "inode_table_entries": sb.entries,
        "inode_table_offset": sb.inode_table.offset,
        "blob_table_size": sb.blob_table.length,
        "blob_table_offset": sb.blob_table.offset,
        "extended_blob_table_offset": sb.ext_table.offset,
        "extended_blob_table_entries": sb.ext_table.length // EXT_ENTRY_SIZE,
        "blob_device_table_count": 0,
        "blob_device_table_offset": 0,
        "prefetch_table_offset": sb.prefetch_table.offset,
        "prefetch_table_entries": sb.prefetch_table.length // 4,
        "attr_timeout": dict(TIMEOUT_FACT),
        "entry_timeout": dict(TIMEOUT_FACT),
        "is_chunk_dict": False,
        "meta_blkaddr": 0,
        "root_nid": 0,
        "chunk_table_offset": 0,
        "chunk_table_size": 0,
    }
