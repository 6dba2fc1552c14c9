"""Encoders of a v6 bootstrap: superblocks, device slots, blob table, inodes, extended attributes, folder blocks. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from struct import Struct
from typing import NamedTuple

from nydusd.errors import FormatError
from nydusd.formats.model import BlobInfo, Cipher, Compressor, Digester
from nydusd.formats.rafs_v6_super import COMPAT_RAFS, INCOMPAT, SLOT_SIZE, SLOTS_OFFSET
from nydusd.formats.superblock import MAX_NAME, SuperFlag

_SUPER = Struct("<IIIBBHQQIIII32xIHHH38x")
_EXT = Struct("<QQIIQQQI204x")
_SLOT = Struct("<64sII56x")
_BLOB = Struct("<64sIIIIIIQQIIQQQ32s32s16sI36x")
_EXTENDED = Struct("<HHHxxQIIIIQII16x")
_DIRENT = Struct("<QHBx")
_XATTR = Struct("<BBH")

MAGIC = 0xE0F5E1E2
EXTENDED_SIZE = 64
DIRENT_SIZE = _DIRENT.size
FLAT_PLAIN, FLAT_INLINE, CHUNK_BASED = 0, 2, 4
DEVICE_ALIGNMENT = 0x80000
MAX_XATTR_VALUE = 0xFFFF
_MAX_XATTR_UNITS = 0xFFFF
_U32_MAX = 0xFFFFFFFF
_XATTR_PREFIXES = (
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
)
_FILE_TYPES = {0x8: 1, 0x4: 2, 0x2: 3, 0x6: 4, 0x1: 5, 0xC: 6, 0xA: 7}
"""d_type (mode >> 12) to EROFS's own numbers."""

_COMPRESSOR_FLAGS = {
    Compressor.NONE: SuperFlag.COMPRESSOR_NONE,
    Compressor.LZ4_BLOCK: SuperFlag.COMPRESSOR_LZ4,
    Compressor.GZIP: SuperFlag.COMPRESSOR_GZIP,
    Compressor.ZSTD: SuperFlag.COMPRESSOR_ZSTD,
}
_DIGESTER_FLAGS = {Digester.BLAKE3: SuperFlag.DIGESTER_BLAKE3, Digester.SHA256: SuperFlag.DIGESTER_SHA256}


class Tables(NamedTuple):
    """Places of the tables in the bootstrap, and of its metadata area. Offsets and sizes in bytes."""

    blob_table: int
    prefetch_table: int
    prefetch_size: int
    meta: int
    chunk_table: int
    chunk_size_bytes: int


def compressor_flag(compressor: Compressor) -> int:
    return int(_COMPRESSOR_FLAGS[compressor])


def digester_flag(digester: Digester) -> int:
    return int(_DIGESTER_FLAGS[digester])


def pack_super(*, block: int, root_nid: int, names: int, blocks: int, meta: int, devices: int) -> bytes:
    """The 128 bytes at 1024. `meta` is in bytes, `blocks` counts all data blocks of the devices."""
    bits = block.bit_length() - 1
    head = (MAGIC, 0, COMPAT_RAFS, bits, 0, root_nid, names, 0, 0, blocks, meta // block, 0)
    return _SUPER.pack(*head, INCOMPAT, 0, devices, SLOTS_OFFSET // SLOT_SIZE)


def pack_ext(flags: int, chunk_size: int, blobs: int, tables: Tables) -> bytes:
    """The 256 bytes at 1152."""
    prefetch_at = tables.prefetch_table if tables.prefetch_size else 0
    return _EXT.pack(
        flags,
        tables.blob_table,
        256 * blobs,
        chunk_size,
        tables.chunk_table,
        tables.chunk_size_bytes,
        prefetch_at,
        tables.prefetch_size,
    )


def pack_slot(blob: BlobInfo, block: int, mapped: int) -> bytes:
    """A device slot. `mapped` is the byte at which the blob begins when bootstrap and blobs are put behind one another."""
    return _SLOT.pack(blob.blob_id.encode("ascii"), blob.uncompressed_size // block, mapped // block)


def pack_blob(blob: BlobInfo) -> bytes:
    """An entry of the blob table. With a cipher, key and IV stand where digest and size of a separate meta blob would."""
    if blob.cipher == Cipher.NONE:
        secret, last = blob.meta_digest.ljust(32, b"\0"), blob.meta_size.to_bytes(16, "little")
    else:
        secret, last = blob.cipher_key, blob.cipher_iv
    return _BLOB.pack(
        blob.blob_id.encode("ascii"),
        blob.index,
        blob.chunk_size,
        blob.chunk_count,
        blob.compressor,
        blob.digester,
        blob.features,
        blob.compressed_size,
        blob.uncompressed_size,
        blob.toc_size,
        blob.ci_compressor,
        blob.ci_offset,
        blob.ci_compressed_size,
        blob.ci_uncompressed_size,
        blob.toc_digest.ljust(32, b"\0"),
        secret,
        last,
        blob.cipher,
    )


def put_inode(
    image: bytearray,
    at: int,
    *,
    layout: int,
    xattr_size: int,
    mode: int,
    size: int,
    union: int,
    number: int,
    uid: int,
    gid: int,
    mtime: int,
    mtime_ns: int,
    nlink: int,
) -> None:
    """An extended inode, 64 bytes, into the image. `mtime` may be before 1970: it is stored as a signed number in the u64."""
    units = (xattr_size - 12) // 4 + 1 if xattr_size else 0
    _EXTENDED.pack_into(
        image,
        at,
        1 | layout << 1,
        units,
        mode,
        size,
        union,
        number & _U32_MAX,
        uid,
        gid,
        mtime & 0xFFFFFFFFFFFFFFFF,
        mtime_ns,
        nlink,
    )


def pack_xattrs(xattrs: Mapping[bytes, bytes], where: str) -> bytes:
    """The inline attribute area, in the order of the names; empty for none. `where` names the file in errors."""
    if not xattrs:
        return b""
    entries = bytearray(12)
    for name in sorted(xattrs):
        value = xattrs[name]
        if len(name) > MAX_NAME or b"\0" in name:
            rule = f"a name of {len(name)} bytes; at most {MAX_NAME} without NUL fit"
            raise FormatError(where, f"attribute {name[:MAX_NAME]!r}", rule)
        if len(value) > MAX_XATTR_VALUE:
            raise FormatError(where, f"attribute {name!r}", f"{len(value)} bytes; at most {MAX_XATTR_VALUE} fit")
        prefix, index = _xattr_prefix(name, where)
        suffix = name[len(prefix) :]
        entries += _XATTR.pack(len(suffix), index, len(value)) + suffix + value
        entries += bytes(-len(entries) % 4)
    if (len(entries) - 12) // 4 + 1 > _MAX_XATTR_UNITS:
        raise FormatError(where, "attributes", f"{len(entries)} bytes in all; at most {4 * _MAX_XATTR_UNITS} fit")
    return bytes(entries)


def _xattr_prefix(name: bytes, where: str) -> tuple[bytes, int]:
    for prefix, index in _XATTR_PREFIXES:
        whole = index in (2, 3)
        if name == prefix if whole else name.startswith(prefix) and len(name) > len(prefix):
            return prefix, index
    known = ", ".join(prefix.decode() for prefix, _ in _XATTR_PREFIXES)
    raise FormatError(where, f"attribute {name!r}", f"is in none of the name spaces that the format has: {known}")


def directory_size(names: Iterable[bytes], block: int) -> int:
    """Bytes of a folder with these sorted names ("." and ".." among them): an entry never crosses a block."""
    size = 0
    for name in names:
        length = DIRENT_SIZE + len(name)
        if size % block + length > block:
            size += block - size % block
        size += length
    return size


def pack_directory(entries: Sequence[tuple[bytes, int, int]], block: int) -> bytes:
    """The data of a folder: `entries` are (name, nid, mode) sorted by name, "." and ".." among them."""
    data = bytearray()
    pending: list[tuple[bytes, int, int]] = []
    used = 0
    for entry in entries:
        length = DIRENT_SIZE + len(entry[0])
        if used + length > block:
            data += _directory_block(pending).ljust(block, b"\0")
            pending, used = [], 0
        pending.append(entry)
        used += length
    return bytes(data + _directory_block(pending))


def _directory_block(entries: Sequence[tuple[bytes, int, int]]) -> bytes:
    position = DIRENT_SIZE * len(entries)
    table, text = bytearray(), bytearray()
    for name, nid, mode in entries:
        table += _DIRENT.pack(nid, position, _FILE_TYPES[mode >> 12])
        text += name
        position += len(name)
    return bytes(table + text)
