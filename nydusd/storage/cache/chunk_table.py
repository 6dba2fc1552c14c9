"""The normalised chunk table of one blob, built from whichever source the image has.

Run by the worker that prepares a blob. Sources: the blob's chunk information (v6), the chunk table of the bootstrap
or the inodes (v5, and v6 blobs without chunk information), or nothing (tarfs). The result goes into the blob's
segment as it is; nothing here outlives the call.

Guaranteed for every table: chunk ids are in order of uncompressed offset, chunks do not overlap there and end inside
`uncompressed_size`, so writing a decoded chunk at its place can never touch another one. A chunk that the metadata
does not describe has `usize` 0: no file can refer to it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from nydusd.errors import FormatError
from nydusd.formats import blob_meta
from nydusd.formats.blob_meta import MAX_CHUNK_SIZE, CiHeader
from nydusd.formats.model import MAX_CHUNKS, TARFS_GRID, BlobFeature, BlobInfo, ChunkFlag, Cipher, Compressor, RawChunk
from nydusd.storage.state.segment import DIGEST_SIZE, RECORD

_PLACE = struct.Struct("<II")
_PLACE_AT = 16  # csize, usize
_FLAGS_AT = 24
_CRC_AT = 36
_U32 = struct.Struct("<I")
_NO_DIGEST = bytes(DIGEST_SIZE)
_RAW_COMPRESSED, _RAW_ENCRYPTED, _RAW_BATCH, _RAW_CRC = 0x1, 0x4, 0x8, 0x10
_COMPRESSED = int(ChunkFlag.COMPRESSED)
_ENCRYPTED = int(ChunkFlag.ENCRYPTED)
_DIGEST = int(ChunkFlag.DIGEST)
_CRC = int(ChunkFlag.CRC)
_UNLISTED = int(ChunkFlag.UNLISTED)
_GROUPED = int(ChunkFlag.BATCH | ChunkFlag.ZRAN)


def gzip_bound(usize: int) -> int:
    """The longest a gzip member for `usize` bytes can be: its header, trailer, block headers, and some room."""
    return usize + 10 + 8 + 5 + usize // 16384 * 5 + 128


MAX_STORED_CHUNK = gzip_bound(MAX_CHUNK_SIZE)
"""No stored chunk is longer: builders keep a compressed form only if it is shorter, stargz is bounded by gzip's worst."""


def is_legacy_stargz(info: BlobInfo) -> bool:
    """Whether only the starts of the blob's gzip members are known, not their lengths."""
    return info.compressor == Compressor.GZIP and not info.features & BlobFeature.CHUNK_INFO_V2


@dataclass(frozen=True, slots=True)
class ChunkTable:
    """All chunks of one blob: `count` packed records and digests, and the contexts as stored (40 bytes each).

    `dict_offset` and `dict_size` say where the dictionaries of zran contexts are in the unpacked chunk information
    (both 0 if there are none). `uncompressed_size` is the length of the cache file. Sizes are bytes.
    """

    count: int
    records: bytearray
    digests: bytearray
    contexts: bytes
    uncompressed_size: int
    dict_offset: int = 0
    dict_size: int = 0


def build_from_ci(
    info: BlobInfo,
    ci: bytes | bytearray | memoryview,
    header: CiHeader,
    raw_chunks: Iterable[RawChunk],
    digest_array: bytes | None = None,
    mark: bool = False,
) -> ChunkTable:
    """The table of a v6 blob with chunk information `ci` (unpacked).

    Digests, and the CRCs that 16-byte records have no room for, are taken from `raw_chunks` (those of other blobs are
    skipped) and from `digest_array` (32 bytes a chunk) if given. `mark`: chunks that are not in `raw_chunks` get the flag
    UNLISTED, unless none of this blob are. Raises `FormatError` if a rule of the format is broken or if two sources disagree
    about a chunk.
    """
    where = _where(info)
    blob_meta.validate_header(header, info, where)
    count = info.chunk_count
    records, digests = bytearray(RECORD.size * count), bytearray(DIGEST_SIZE * count)
    legacy = is_legacy_stargz(info)
    pack_into, size, at = RECORD.pack_into, RECORD.size, 0
    for record in blob_meta.iter_records(info, header, ci, where):
        if legacy:
            coff, uoff, _, usize, flags, ctx, ctx_off, crc = record
            csize = _stargz_csize(info, coff, usize)
            if csize < 1:
                raise FormatError(where, f"chunk {at // size}", f"stored at {coff} of {info.compressed_size} bytes")
            record = coff, uoff, csize, usize, flags, ctx, ctx_off, crc
        pack_into(records, at, *record)
        at += size
    if digest_array is not None:
        _set_digests(records, digests, digest_array, count, where)
    compare_stored = not legacy and not info.features & BlobFeature.IS_CHUNKDICT_GENERATED
    listed = bytearray(count)
    for raw in raw_chunks:
        if raw.blob_index == info.index:
            _merge(records, digests, raw, count, compare_stored, where)
            listed[raw.index] = 1
    if mark and any(listed):
        chunk = listed.find(0)
        while chunk >= 0:
            _set_flag(records, chunk, _UNLISTED)
            chunk = listed.find(0, chunk + 1)
    zran = bool(info.features & BlobFeature.ZRAN)
    contexts = blob_meta.context_bytes(info, header, ci)
    return ChunkTable(
        count=count,
        records=records,
        digests=digests,
        contexts=contexts,
        uncompressed_size=info.uncompressed_size,
        dict_offset=header.ctx_offset + len(contexts) if zran else 0,
        dict_size=header.ctx_size - len(contexts) if zran else 0,
    )


def build_from_raw(info: BlobInfo, raw_chunks: Iterable[RawChunk]) -> ChunkTable:
    """The table of a blob that only the bootstrap describes: v5, or v6 without chunk information.

    A chunk id that nothing describes is harmless if the blob table gives the chunk count: a merged image no longer
    refers to chunks of files that upper layers removed. It becomes a chunk of 0 bytes. In images too old to have the
    count (and to have been merged) it means that the ids cannot be trusted. Raises `FormatError`.
    """
    where = _where(info)
    found: dict[int, RawChunk] = {}
    for raw in raw_chunks:
        if raw.blob_index != info.index:
            continue
        known = found.setdefault(raw.index, raw)
        if known is not raw and not _same_chunk(known, raw):
            raise FormatError(where, f"chunk {raw.index}", f"described twice, differently: {known} and {raw}")
    count = info.chunk_count or (max(found) + 1 if found else 0)
    if count > MAX_CHUNKS:
        raise FormatError(where, "chunk_count", f"{count}; at most {MAX_CHUNKS} are allowed")
    if found and max(found) >= count:
        raise FormatError(where, "chunk table", f"chunk {max(found)} of a blob with {count} chunks")
    if not info.chunk_count and len(found) != count:
        raise FormatError(where, "chunk table", f"{len(found)} different chunk ids, but the highest is {count - 1}")
    records, digests = bytearray(), bytearray(DIGEST_SIZE * count)
    end_coff = end_uoff = 0
    for index in sorted(found):
        missing = index - len(records) // RECORD.size
        records += RECORD.pack(end_coff, end_uoff, 0, 0, 0, 0, 0, 0) * missing
        raw = found[index]
        if raw.digest != _NO_DIGEST:
            digests[index * DIGEST_SIZE : (index + 1) * DIGEST_SIZE] = raw.digest
        record = _record_of_raw(info, raw, end_uoff, where)
        records += record
        end_coff, end_uoff = raw.coff + _PLACE.unpack_from(record, _PLACE_AT)[0], raw.uoff + raw.usize
    records += RECORD.pack(end_coff, end_uoff, 0, 0, 0, 0, 0, 0) * (count - len(records) // RECORD.size)
    return ChunkTable(count, records, digests, b"", info.uncompressed_size or end_uoff)


def build_tarfs(info: BlobInfo) -> ChunkTable:
    """A tar without chunks, cut into pieces of 1 MiB (the last one shorter), stored as they are. No digests exist."""
    size = info.compressed_size
    count = -(-size // TARFS_GRID)
    if count > MAX_CHUNKS:
        raise FormatError(_where(info), "compressed_size", f"{size}; at most {MAX_CHUNKS * TARFS_GRID} are allowed")
    records = bytearray()
    for offset in range(0, size, TARFS_GRID):
        length = min(TARFS_GRID, size - offset)
        records += RECORD.pack(offset, offset, length, length, 0, 0, 0, 0)
    return ChunkTable(count, records, bytearray(DIGEST_SIZE * count), b"", size)


def _where(info: BlobInfo) -> str:
    return f"blob {info.blob_id}"


def _stargz_csize(info: BlobInfo, coff: int, usize: int) -> int:
    """How much to read for a chunk of which only the start is known: the worst case, but not past the blob's end."""
    bound = gzip_bound(usize)
    return min(bound, info.compressed_size - coff) if info.compressed_size else bound


def _same_chunk(a: RawChunk, b: RawChunk) -> bool:
    """Whether two descriptions agree in all but the place in the file: files share chunks."""
    return a._replace(file_offset=0) == b._replace(file_offset=0)


def _record_of_raw(info: BlobInfo, raw: RawChunk, end_uoff: int, where: str) -> bytes:
    """The checked record of an 80-byte chunk info; `end_uoff` is where the chunk before it ends."""
    field = f"chunk {raw.index}"
    csize = raw.csize
    if not 0 < raw.usize <= MAX_CHUNK_SIZE:
        raise FormatError(where, field, f"plain size {raw.usize}; it must be 1 to {MAX_CHUNK_SIZE}")
    space_end = info.uncompressed_size or 1 << 63
    if raw.uoff < end_uoff or raw.uoff + raw.usize > space_end:
        raise FormatError(
            where,
            field,
            f"plain bytes {raw.uoff} to {raw.uoff + raw.usize}; must be between {end_uoff} and {space_end}",
        )
    data_end = info.compressed_data_size or 1 << 63
    if is_legacy_stargz(info):
        csize = _stargz_csize(info, raw.coff, raw.usize)
        data_end = info.compressed_size or 1 << 63
    flags = 0
    if raw.flags & _RAW_COMPRESSED:
        flags |= _COMPRESSED
    if raw.flags & _RAW_BATCH:
        raise FormatError(where, field, "part of a batch, which only chunk information describes; the blob has none")
    if raw.flags & _RAW_ENCRYPTED:
        if info.cipher == Cipher.NONE:
            raise FormatError(where, field, "encrypted, but the blob has no cipher")
        flags |= _ENCRYPTED
    if not 0 < csize <= MAX_STORED_CHUNK or raw.coff + csize > data_end:
        raise FormatError(
            where,
            field,
            f"stored size {csize} at {raw.coff}; the size is 1 to {MAX_STORED_CHUNK}, data ends at {data_end}",
        )
    if not flags and csize != raw.usize:
        raise FormatError(where, field, f"stored as it is in {csize} bytes but {raw.usize} bytes long")
    if raw.flags & _RAW_CRC:
        flags |= _CRC
    if raw.digest != _NO_DIGEST:
        flags |= _DIGEST
    return RECORD.pack(raw.coff, raw.uoff, csize, raw.usize, flags, 0, 0, raw.crc if flags & _CRC else 0)


def _set_digests(records: bytearray, digests: bytearray, array: bytes, count: int, where: str) -> None:
    """Take the blob's own digest array; an all-zero digest means unknown."""
    if len(array) != DIGEST_SIZE * count:
        raise FormatError(where, "digest array", f"{len(array)} bytes; {DIGEST_SIZE * count} for {count} chunks")
    digests[:] = array
    for index in range(count):
        if array[index * DIGEST_SIZE : (index + 1) * DIGEST_SIZE] != _NO_DIGEST:
            _set_flag(records, index, _DIGEST)


def _set_flag(records: bytearray, chunk: int, flag: int) -> None:
    at = chunk * RECORD.size + _FLAGS_AT
    _U32.pack_into(records, at, _U32.unpack_from(records, at)[0] | flag)


def _merge(records: bytearray, digests: bytearray, raw: RawChunk, count: int, compare_stored: bool, where: str) -> None:
    """Add what the bootstrap's chunk table knows about a chunk: its digest, and its CRC if the record has none.

    `compare_stored`: its place in the stored blob must be the same in both, too, unless it is of a batch or a zran context:
    places of batch chunks are zero in that table, those of zran ones are hints.
    """
    digest, _, raw_flags, raw_csize, raw_usize, raw_coff, raw_uoff, _, index, raw_crc = raw
    if index >= count:
        raise FormatError(where, "chunk table", f"chunk {index} of a blob with {count} chunks")
    at = index * RECORD.size
    coff, uoff, csize, usize, flags, _, _, crc = RECORD.unpack_from(records, at)
    if uoff != raw_uoff or usize != raw_usize:
        raise FormatError(
            where,
            f"chunk {index}",
            f"{usize} bytes at {uoff} in the blob, {raw_usize} at {raw_uoff} in the bootstrap: they do not belong together",
        )
    if compare_stored and (coff != raw_coff or csize != raw_csize) and not flags & _GROUPED:
        raise FormatError(
            where,
            f"chunk {index}",
            f"stored in {csize} bytes at {coff} by the blob, {raw_csize} at {raw_coff} by the bootstrap: "
            "they do not belong together",
        )
    new = flags
    if raw_flags & _RAW_CRC:
        if flags & _CRC and crc != raw_crc:
            raise FormatError(where, f"chunk {index}", f"crc {crc:#x} in the blob, {raw_crc:#x} in the bootstrap")
        new |= _CRC
        _U32.pack_into(records, at + _CRC_AT, raw_crc)
    if digest != _NO_DIGEST:
        place = slice(index * DIGEST_SIZE, (index + 1) * DIGEST_SIZE)
        if flags & _DIGEST and digests[place] != digest:
            raise FormatError(
                where, f"chunk {index}", f"digest {digests[place].hex()} elsewhere, {digest.hex()} in the bootstrap"
            )
        digests[place] = digest
        new |= _DIGEST
    if new != flags:
        _U32.pack_into(records, at + _FLAGS_AT, new)
