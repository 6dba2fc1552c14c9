"""Superblock, device slots and blob table of a RAFS v6 bootstrap: everything that is checked once, when it is opened.

Pure parsing of untrusted bytes, in time that depends on the number of blobs (at most 255) and not of files.
v6 is an EROFS image with an extension: EROFS superblock at 1024, extension at 1152, device slots from 1408.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from nydusd.errors import FormatError
from nydusd.formats.blob_id import check_blob_id, takes_path_id
from nydusd.formats.chunk_info import CHUNK_INFO_SIZE
from nydusd.formats.detect import V6_MAGIC, V6_SUPERBLOCK_OFFSET
from nydusd.formats.model import MAX_CHUNKS, BlobFeature, BlobInfo, Cipher, Compressor, Digester
from nydusd.formats.superblock import (
    TIMEOUT_FACT,
    Require,
    SuperFlag,
    Table,
    check_chunk_size,
    check_flags,
    check_tables,
    requirer,
)

BLOCK = 4096
TARFS_BLOCK = 512
EXT_OFFSET = 1152
SLOTS_OFFSET = 1408
SLOT_SIZE = 128
BLOB_ENTRY_SIZE = 256
MAX_BLOBS = 255
COMPAT_RAFS = 0x40000000
INCOMPAT = 0xC  # chunked files and a device table

_SUPER = Struct("<IIIBBHQQIIII32xIHHH")
_U16 = Struct("<H")
_EXT = Struct("<QQIIQQQI")
_SLOT = Struct("<64sI")
_ADDRESS = Struct("<I")
_ADDRESS_AT = 68
HEAD_MOST = SLOTS_OFFSET + MAX_BLOBS * SLOT_SIZE
"""Bytes of a bootstrap that say where its blobs are on a disk."""
_BLOB = Struct("<64sIIIIIIQQIIQQQ32s32s16sI")

_MAX_COMPRESSED = 1 << 40
_MAX_UNCOMPRESSED = 1 << 44
_KNOWN_INCOMPATIBLE = 0x0FFF
_INTERNAL_BIT = 1 << 31
_NEEDS_V2 = BlobFeature.BATCH | BlobFeature.ZRAN | BlobFeature.ENCRYPTED


class V6Super(NamedTuple):
    """The fields of both superblocks that are used later. Offsets and sizes are bytes, `meta_blkaddr` is in blocks."""

    block: int
    root_nid: int
    inodes: int
    meta_blkaddr: int
    devices: int
    flags: int
    blob_table: Table
    chunk_size: int
    chunk_table: Table
    prefetch_table: Table

    @property
    def tarfs(self) -> bool:
        return bool(self.flags & SuperFlag.TARFS)


def read_super(buf: memoryview, where: str) -> V6Super:
    """Parse and check both superblocks and the place of every table."""
    end = len(buf)
    if end < BLOCK:
        raise FormatError(where, "superblock", f"the file has {end} bytes, a v6 bootstrap at least {BLOCK}")
    (
        magic,
        checksum,
        compat,
        bits,
        extslots,
        root_nid,
        inodes,
        _,
        _,
        blocks,
        meta,
        xattr,
        incompat,
        union,
        devices,
        slot,
    ) = _SUPER.unpack_from(buf, V6_SUPERBLOCK_OFFSET)
    flags, blob_at, blob_len, chunk_size, chunk_at, chunk_len, prefetch_at, prefetch_len = _EXT.unpack_from(
        buf, EXT_OFFSET
    )
    require = requirer(where, "superblock")
    require(magic == V6_MAGIC, "magic", magic, f"must be {V6_MAGIC:#x}")
    require(checksum == 0, "checksum", checksum, "must be 0")
    require(bool(compat & COMPAT_RAFS), "feature_compat", compat, f"must have the RAFS bit {COMPAT_RAFS:#x}")
    require(incompat == INCOMPAT, "feature_incompat", incompat, f"must be {INCOMPAT:#x}")
    check_flags(where, flags, exact=True)
    block = TARFS_BLOCK if flags & SuperFlag.TARFS else BLOCK
    rule = f"must be {block.bit_length() - 1} for {'a tarfs' if block == TARFS_BLOCK else 'an ordinary'} image"
    require(1 << bits == block, "blkszbits", bits, rule)
    require(end % block == 0, "file_size", end, f"must be a multiple of {block}")
    require(extslots == 0, "extslots", extslots, "must be 0")
    require(inodes != 0, "inos", inodes, "must not be 0")
    require(xattr == 0, "xattr_blkaddr", xattr, "must be 0: shared xattrs are not used")
    require(union == 0, "union", union, "must be 0")
    require(slot == SLOTS_OFFSET // SLOT_SIZE, "devt_slotoff", slot, "must be 11")
    require(devices <= MAX_BLOBS, "extra_devices", devices, f"must be at most {MAX_BLOBS}")
    # An old builder wrote 4096 here for an image without data.
    require(devices != 0 or blocks in (0, 4096), "blocks", blocks, "must be 0 or 4096 without devices")
    require(meta * block <= end, "meta_blkaddr", meta, f"blocks of {block} bytes are beyond the end of the file, {end}")

    check_chunk_size(where, "superblock.chunk_size", chunk_size)
    require(blob_len % BLOB_ENTRY_SIZE == 0, "blob_table_size", blob_len, f"must be a multiple of {BLOB_ENTRY_SIZE}")
    require(not blob_len or blob_at % BLOCK == 0, "blob_table_offset", blob_at, f"must be a multiple of {BLOCK}")
    rule = f"must be the number of entries in the blob table, {blob_len // BLOB_ENTRY_SIZE}"
    require(devices * BLOB_ENTRY_SIZE == blob_len, "extra_devices", devices, rule)
    require(chunk_len % CHUNK_INFO_SIZE == 0, "chunk_table_size", chunk_len, f"must be a multiple of {CHUNK_INFO_SIZE}")
    require(not chunk_len or chunk_at % BLOCK == 0, "chunk_table_offset", chunk_at, f"must be a multiple of {BLOCK}")
    if prefetch_at == 0:
        prefetch_len = 0  # empty images of old builders have a size without a table
    require(prefetch_len % 4 == 0, "prefetch_table_size", prefetch_len, "must be a multiple of 4")
    require(not prefetch_len or prefetch_at % 8 == 0, "prefetch_table_offset", prefetch_at, "must be a multiple of 8")
    require(not prefetch_len or prefetch_at >= BLOCK, "prefetch_table_offset", prefetch_at, f"must be at least {BLOCK}")
    tables = [
        Table("device_table", SLOTS_OFFSET, devices * SLOT_SIZE),
        Table("blob_table", blob_at, blob_len),
        Table("chunk_table", chunk_at, chunk_len),
        Table("prefetch_table", prefetch_at, prefetch_len),
    ]
    check_tables(where, tables, SLOTS_OFFSET, end)
    return V6Super(block, root_nid, inodes, meta, devices, flags, tables[1], chunk_size, tables[2], tables[3])


def read_blobs(buf: memoryview, where: str, sb: V6Super, path_id: str | None, *, extracted: bool) -> list[BlobInfo]:
    """Parse and check the device slots and the blob table."""
    seen: set[bytes] = set()
    for index in range(sb.devices):
        raw, blocks = _SLOT.unpack_from(buf, SLOTS_OFFSET + index * SLOT_SIZE)
        blob_id = raw.rstrip(b"\0")
        check_blob_id(where, f"devices[{index}].id", blob_id)
        if blob_id in seen:
            raise FormatError(where, f"devices[{index}].id", f"{blob_id.decode()!r} is there twice, ids must be unique")
        if blocks == 0:
            raise FormatError(where, f"devices[{index}].blocks", "0 must be at least 1")
        seen.add(blob_id)
    if path_id is not None:
        check_blob_id(where, "path_id", path_id.encode("utf-8", "surrogateescape"))
    return [_read_blob(buf, where, sb, i, path_id, extracted=extracted) for i in range(sb.devices)]


def check_addresses(head: bytes, size: int, where: str) -> None:
    """Raises FormatError where a blob's place on a disk is within the metadata, which have `size` bytes: the kernel would read
    those folders from the blob that are there. `head`: the first `HEAD_MOST` bytes of metadata that were checked.
    """
    block = 1 << head[V6_SUPERBLOCK_OFFSET + 12]
    (devices,) = _U16.unpack_from(head, V6_SUPERBLOCK_OFFSET + 86)
    for index in range(devices):
        (first,) = _ADDRESS.unpack_from(head, SLOTS_OFFSET + index * SLOT_SIZE + _ADDRESS_AT)
        if 0 < first * block < size:  # 0: an old builder, and the kernel, have no place for it
            rule = f"{first * block} is within the metadata, which end at {size}: the kernel cannot read it, use `nydusd fuse`"
            raise FormatError(where, f"devices[{index}].mapped_blkaddr", rule)


def _read_blob(
    buf: memoryview, where: str, sb: V6Super, position: int, path_id: str | None, *, extracted: bool
) -> BlobInfo:
    (
        raw_id,
        index,
        chunk_size,
        chunk_count,
        compressor,
        digester,
        features,
        compressed_size,
        uncompressed_size,
        toc_size,
        ci_compressor,
        ci_offset,
        ci_compressed_size,
        ci_uncompressed_size,
        toc_digest,
        meta_digest,
        meta_size_or_iv,
        cipher,
    ) = _BLOB.unpack_from(buf, sb.blob_table.offset + position * BLOB_ENTRY_SIZE)
    require = requirer(where, f"blobs[{position}]")
    table_id = check_blob_id(where, f"blobs[{position}].blob_id", raw_id.rstrip(b"\0"))
    require(index == position, "blob_index", index, f"must be the position in the table, {position}")
    require(chunk_size == sb.chunk_size, "chunk_size", chunk_size, f"must be the image's, {sb.chunk_size:#x}")
    require(chunk_count <= MAX_CHUNKS, "chunk_count", chunk_count, f"must be at most {MAX_CHUNKS:#x}")
    require(compressor <= max(Compressor), "compressor", compressor, "is unknown: 0 none, 1 lz4, 2 gzip, 3 zstd")
    require(
        ci_compressor <= max(Compressor), "ci_compressor", ci_compressor, "is unknown: 0 none, 1 lz4, 2 gzip, 3 zstd"
    )
    require(digester <= max(Digester), "digester", digester, "is unknown: 0 blake3, 1 sha256")
    require(cipher <= max(Cipher), "cipher", cipher, "is not supported: 0 none, 1 aes-128-xts")
    require(
        compressed_size <= _MAX_COMPRESSED, "compressed_size", compressed_size, f"must be at most {_MAX_COMPRESSED:#x}"
    )
    require(
        uncompressed_size <= _MAX_UNCOMPRESSED,
        "uncompressed_size",
        uncompressed_size,
        f"must be at most {_MAX_UNCOMPRESSED:#x}",
    )
    unknown = features & (0xFFFF & ~_KNOWN_INCOMPATIBLE | _INTERNAL_BIT)
    require(not unknown, "features", features, f"has unknown bits {unknown:#x}")
    if sb.tarfs:
        needed = BlobFeature.TARFS | BlobFeature.CAP_TAR_TOC
        refused = BlobFeature.ALIGNED | BlobFeature.ZRAN | BlobFeature.BATCH | BlobFeature.ENCRYPTED
    else:
        needed, refused = BlobFeature.ALIGNED, BlobFeature.TARFS
    kind = "a tarfs" if sb.tarfs else "an ordinary"
    require(features & needed == needed, "features", features, f"must have the bits {needed:#x} in {kind} image")
    require(not features & refused, "features", features, f"must not have the bits {refused:#x} in {kind} image")
    encrypted = bool(features & BlobFeature.ENCRYPTED)
    require(encrypted == bool(cipher), "cipher", cipher, f"does not fit the features {features:#x}")
    if cipher:
        halves_differ = meta_digest[:16] != meta_digest[16:]
        require(halves_differ, "cipher_key", len(meta_digest), "bytes of key, whose halves must not be equal")
    _check_ci(require, sb, features, chunk_count, ci_offset, ci_compressed_size, ci_uncompressed_size)

    blob_id = path_id if path_id is not None and takes_path_id(features, extracted=extracted) else table_id
    meta_blob_id = blob_id
    if features & BlobFeature.SEPARATE:
        if features & BlobFeature.INLINED_FS_META:
            meta_blob_id = path_id if path_id is not None else table_id
        elif not cipher and any(meta_digest):
            meta_blob_id = meta_digest.hex()
    return BlobInfo(
        index=index,
        blob_id=blob_id,
        features=features,
        chunk_size=chunk_size,
        chunk_count=chunk_count,
        compressor=Compressor(compressor),
        digester=Digester(digester),
        cipher=Cipher(cipher),
        compressed_size=compressed_size,
        uncompressed_size=uncompressed_size,
        ci_compressor=Compressor(ci_compressor),
        ci_offset=ci_offset,
        ci_compressed_size=ci_compressed_size,
        ci_uncompressed_size=ci_uncompressed_size,
        toc_size=toc_size,
        toc_digest=toc_digest,
        meta_digest=b"" if cipher else meta_digest,
        meta_size=0 if cipher else int.from_bytes(meta_size_or_iv[:8], "little"),
        prefetch_offset=0,
        prefetch_size=0,
        cipher_key=meta_digest if cipher else b"",
        cipher_iv=meta_size_or_iv if cipher else b"",
        meta_blob_id=meta_blob_id,
    )


def _check_ci(
    require: Require, sb: V6Super, features: int, count: int, offset: int, compressed: int, uncompressed: int
) -> None:
    """The stored chunk information has a place that can exist and a length that fits the number of chunks."""
    require(
        offset + compressed < 1 << 64, "ci_offset", offset, f"and ci_compressed_size {compressed:#x} exceed 64 bits"
    )
    rule = f"must be at most ci_uncompressed_size, {uncompressed:#x}"
    require(compressed <= uncompressed, "ci_compressed_size", compressed, rule)
    field = "ci_uncompressed_size"
    if features & BlobFeature.CHUNK_INFO_V2:
        if features & _NEEDS_V2:
            require(
                uncompressed >= 24 * count, field, uncompressed, f"must be at least 24 bytes for each of {count} chunks"
            )
        else:
            require(uncompressed == 24 * count, field, uncompressed, f"must be 24 bytes for each of {count} chunks")
        return
    rule = f"needs the bit {BlobFeature.CHUNK_INFO_V2:#x} for batch, zran or encrypted chunks"
    require(not features & _NEEDS_V2, "features", features, rule)
    if not sb.tarfs and not features & BlobFeature.IS_CHUNKDICT_GENERATED:
        require(uncompressed == 16 * count, field, uncompressed, f"must be 16 bytes for each of {count} chunks")


def facts(sb: V6Super) -> dict[str, object]:
    """What `Bootstrap.superblock_facts` gives for v6."""
    return {
        "magic": V6_MAGIC,
        "version": 0x600,
        "sb_size": 0,
        "root_inode": 0,
        "chunk_size": sb.chunk_size,
        "batch_size": 0,
        "inodes_count": sb.inodes,
        "flags": {"bits": sb.flags},
        "inode_table_entries": 0,
        "inode_table_offset": 0,
        "blob_table_size": sb.blob_table.length,
        "blob_table_offset": sb.blob_table.offset,
        "extended_blob_table_offset": 0,
        "extended_blob_table_entries": 0,
        "blob_device_table_count": sb.devices,
        "blob_device_table_offset": SLOTS_OFFSET,
        "prefetch_table_offset": sb.prefetch_table.offset,
        "prefetch_table_entries": sb.prefetch_table.length // 4,
        "attr_timeout": dict(TIMEOUT_FACT),
        "entry_timeout": dict(TIMEOUT_FACT),
        "is_chunk_dict": False,
        "meta_blkaddr": sb.meta_blkaddr,
        "root_nid": sb.root_nid,
        "chunk_table_offset": sb.chunk_table.offset,
        "chunk_table_size": sb.chunk_table.length,
    }
