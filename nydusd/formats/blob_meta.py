"""Chunk information (CI) of a v6 blob: header, records of version 1 and 2, batch and zran contexts.

Pure parsing over bytes that were already decrypted and unpacked; used by the workers that open a blob. A CI is
`records (16 or 24 bytes a chunk, in order of uncompressed offset) | contexts (40 bytes each) | zran dictionaries`.
The blob table of the bootstrap is the authority for features and count; old builders left most feature bits of the
header clear, so those are not compared.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from nydusd.errors import FormatError
from nydusd.formats.model import MAX_CHUNKS, BlobFeature, BlobInfo, ChunkFlag, Cipher, Compressor

CI_HEADER_SIZE = 4096
CONTEXT_SIZE = 40
MAX_CHUNK_SIZE = 1 << 24
MAX_DICTIONARY = 32768
MAX_CONTEXT_INPUT = 2 * MAX_CHUNK_SIZE

_MAGIC = 0xB10BB10B
_HEADER = struct.Struct("<IIIIQQQQQI")
_V1 = struct.Struct("<QQ")
_V2 = struct.Struct("<QQQ")
_BATCH = struct.Struct("<II32x")
_ZRAN = struct.Struct("<QQQIIIBB2x")

_V1_MAX_SIZE = 256 << 20
_V2_MAX_SIZE = 384 << 20
_V2_COMPRESSED, _V2_ZRAN, _V2_BATCH, _V2_ENCRYPTED, _V2_CRC = 0x1, 0x2, 0x4, 0x8, 0x10
_COMPRESSED = int(ChunkFlag.COMPRESSED)
_ENCRYPTED = int(ChunkFlag.ENCRYPTED)
_BATCH_FLAG = int(ChunkFlag.BATCH)
_ZRAN_FLAG = int(ChunkFlag.ZRAN)
_CRC = int(ChunkFlag.CRC)
_NEEDS_V2 = BlobFeature.ZRAN | BlobFeature.BATCH | BlobFeature.ENCRYPTED

Buffer = bytes | bytearray | memoryview
CiRecord = tuple[int, int, int, int, int, int, int, int]
"""The fields of `model.ChunkRecord` in its order. Plain tuples, because a blob may have millions."""


def align_page(size: int) -> int:
    """`size` rounded up to a multiple of 4096."""
    return -(-size // 4096) * 4096


@dataclass(frozen=True, slots=True)
class CiHeader:
    """The 4096-byte header behind the stored CI. `ctx_offset` counts from the start of the unpacked CI."""

    features: int
    ci_compressor: Compressor
    entries: int
    ci_offset: int
    ci_compressed_size: int
    ci_uncompressed_size: int
    ctx_offset: int
    ctx_size: int
    ctx_count: int


class BatchContext(NamedTuple):
    """A unit of several small chunks: stored and plain length in bytes."""

    csize: int
    usize: int


class ZranContext(NamedTuple):
    """Where to start inflating in the layer, and what to prime the inflater with (see `codec.zran`).

    `dict_offset` counts from the start of the dictionary table.
    """

    in_offset: int
    out_offset: int
    dict_offset: int
    in_len: int
    out_len: int
    dict_size: int
    ctx_byte: int
    ctx_bits: int


def record_size(info: BlobInfo) -> int:
    """Bytes of one CI record of this blob: 24 with CHUNK_INFO_V2, else 16."""
    return _V2.size if info.features & BlobFeature.CHUNK_INFO_V2 else _V1.size


def parse_header(buf: Buffer, where: str) -> CiHeader:
    """Read the header from the first 4096 bytes of `buf`. Raises `FormatError` if it is none."""
    if len(buf) < CI_HEADER_SIZE:
        raise FormatError(where, "ci header", f"{len(buf)} bytes; the header has {CI_HEADER_SIZE}")
    magic, features, compressor, *numbers = _HEADER.unpack_from(buf)
    magic2 = int.from_bytes(buf[CI_HEADER_SIZE - 4 : CI_HEADER_SIZE], "little")
    if magic != _MAGIC or magic2 != _MAGIC:
        raise FormatError(where, "ci header", f"magics {magic:#x} and {magic2:#x}; both must be {_MAGIC:#x}")
    if compressor not in iter(Compressor):
        raise FormatError(where, "ci header", f"compressor {compressor}; 0 to 3 are known")
    return CiHeader(features, Compressor(compressor), *numbers)


def pack_header(header: CiHeader) -> bytes:
    """The 4096 bytes that `parse_header` reads."""
    raw = bytearray(CI_HEADER_SIZE)
    _HEADER.pack_into(
        raw,
        0,
        _MAGIC,
        header.features,
        header.ci_compressor,
        header.entries,
        header.ci_offset,
        header.ci_compressed_size,
        header.ci_uncompressed_size,
        header.ctx_offset,
        header.ctx_size,
        header.ctx_count,
    )
    raw[CI_HEADER_SIZE - 4 :] = _MAGIC.to_bytes(4, "little")
    return bytes(raw)


def check_ci_sizes(info: BlobInfo, where: str) -> None:
    """Check what the blob table says about the CI before anything is read. Raises `FormatError`."""
    v2 = bool(info.features & BlobFeature.CHUNK_INFO_V2)
    size, limit = info.ci_uncompressed_size, _V2_MAX_SIZE if v2 else _V1_MAX_SIZE
    if not 0 < info.chunk_count <= MAX_CHUNKS:
        raise FormatError(where, "chunk_count", f"{info.chunk_count}; it must be 1 to {MAX_CHUNKS}")
    if not 0 < size <= limit:
        raise FormatError(where, "ci_uncompressed_size", f"{size} bytes; it must be 1 to {limit}")
    if not 0 < info.ci_compressed_size <= size:
        raise FormatError(where, "ci_compressed_size", f"{info.ci_compressed_size}; it must be 1 to {size}")
    if not v2 and info.features & _NEEDS_V2:
        raise FormatError(where, "features", f"{info.features:#x}: ZRAN, BATCH and ENCRYPTED need CHUNK_INFO_V2")
    records = record_size(info) * info.chunk_count
    exact = not info.features & (_NEEDS_V2 | BlobFeature.IS_CHUNKDICT_GENERATED)
    if size < records or (exact and size != records):
        rule = "must be" if exact else "must be at least"
        raise FormatError(where, "ci_uncompressed_size", f"{size} for {info.chunk_count} chunks; it {rule} {records}")


def validate_header(header: CiHeader, info: BlobInfo, where: str) -> None:
    """Check that header and blob table describe the same CI. Raises `FormatError` naming the field."""
    check_ci_sizes(info, where)
    pairs = [
        ("ci_compressor", header.ci_compressor, info.ci_compressor),
        ("ci_offset", header.ci_offset, info.ci_offset),
        ("ci_compressed_size", header.ci_compressed_size, info.ci_compressed_size),
        ("ci_uncompressed_size", header.ci_uncompressed_size, info.ci_uncompressed_size),
    ]
    if not info.features & BlobFeature.IS_CHUNKDICT_GENERATED:
        pairs.append(("ci_entries", header.entries, info.chunk_count))
    for field, got, expected in pairs:
        if got != expected:
            raise FormatError(
                where, field, f"{got} in the blob, {expected} in the bootstrap: they do not belong together"
            )
    if info.features & (BlobFeature.ZRAN | BlobFeature.BATCH):
        if header.ctx_offset != record_size(info) * info.chunk_count:
            raise FormatError(where, "context offset", f"{header.ctx_offset}; contexts must follow the records")
        if header.ctx_count > info.chunk_count:
            raise FormatError(where, "context count", f"{header.ctx_count} for {info.chunk_count} chunks")
        contexts = CONTEXT_SIZE * header.ctx_count
        if contexts > header.ctx_size or header.ctx_offset + header.ctx_size > header.ci_uncompressed_size:
            raise FormatError(
                where,
                "context size",
                f"{header.ctx_size} bytes at {header.ctx_offset} for {header.ctx_count} contexts; "
                f"they must fit into the {header.ci_uncompressed_size} bytes of chunk information",
            )


def context_bytes(info: BlobInfo, header: CiHeader, ci: Buffer) -> bytes:
    """The context array of the blob as stored, 40 bytes each; empty without ZRAN or BATCH. The header must be valid."""
    if not info.features & (BlobFeature.ZRAN | BlobFeature.BATCH):
        return b""
    return bytes(ci[header.ctx_offset : header.ctx_offset + CONTEXT_SIZE * header.ctx_count])


def batch_context(contexts: Buffer, index: int) -> BatchContext:
    """Context `index` of a checked context array."""
    return BatchContext._make(_BATCH.unpack_from(contexts, index * CONTEXT_SIZE))


def zran_context(contexts: Buffer, index: int) -> ZranContext:
    """Context `index` of a checked context array."""
    return ZranContext._make(_ZRAN.unpack_from(contexts, index * CONTEXT_SIZE))


def pack_v1(coff: int, uoff: int, csize: int, usize: int) -> bytes:
    """One 16-byte record. Sizes are 1 to 16 MiB, `uoff` a multiple of 4096 below 2**44, `coff` below 2**40."""
    u, c = usize - 1, csize - 1
    return _V1.pack(
        uoff | (u & 0xFFFFF) << 44 | (u & 0xF00000) >> 12,
        coff | (c & 0xFFFFF) << 44 | (c & 0xF00000) << 20,
    )


def pack_v2(coff: int, uoff: int, csize: int, usize: int, flags: int, data: int) -> bytes:
    """One 24-byte record; `flags` are the format's: 1 compressed, 2 zran, 4 batch, 8 encrypted, 16 has crc."""
    return _V2.pack(uoff >> 12 | (usize - 1) << 32 | flags << 56, coff | csize << 40, data)


def iter_records(info: BlobInfo, header: CiHeader, ci: Buffer, where: str) -> Iterator[CiRecord]:
    """All chunks of the blob, checked and normalised as `model.ChunkRecord` describes (flags are `ChunkFlag`).

    The header must have passed `validate_header`. Guaranteed for what is given: chunks are 1 byte to 16 MiB, do not
    overlap in uncompressed space and are in its order; stored ranges lie inside the blob's data and, except in zran
    and chunk-dictionary blobs, do not overlap either; context indexes and offsets are in range. Raises `FormatError`.
    """
    size = record_size(info) * info.chunk_count
    if len(ci) != header.ci_uncompressed_size or len(ci) < size:
        raise FormatError(where, "chunk information", f"{len(ci)} bytes; {header.ci_uncompressed_size} expected")
    records = memoryview(ci)[:size]
    return (
        _iter_v2(info, header, ci, records, where) if record_size(info) == _V2.size else _iter_v1(info, records, where)
    )


def _iter_v1(info: BlobInfo, records: memoryview, where: str) -> Iterator[CiRecord]:
    """Version 1 has no flags: a chunk is compressed if its two sizes differ."""
    data_end, space_end = info.compressed_data_size, info.uncompressed_size
    ordered = not info.features & BlobFeature.IS_CHUNKDICT_GENERATED
    next_uoff = next_coff = 0
    for index, (u, c) in enumerate(_V1.iter_unpack(records)):
        uoff = u & 0x0FFF_FFFF_F000
        usize = (u >> 44 | (u & 0xF00) << 12) + 1
        coff = c & 0xFF_FFFF_FFFF
        csize = (c >> 44 | (c & 0xF00_0000_0000) >> 20) + 1
        if uoff < next_uoff or uoff + usize > space_end:
            raise _bad_uoff(where, index, uoff, usize, next_uoff, space_end)
        if coff < next_coff or coff + csize > data_end:
            raise _bad_coff(where, index, coff, csize, next_coff, data_end)
        next_uoff = uoff + usize
        if ordered:
            next_coff = coff + csize
        yield coff, uoff, csize, usize, _COMPRESSED if csize != usize else 0, 0, 0, 0


def _iter_v2(info: BlobInfo, header: CiHeader, ci: Buffer, records: memoryview, where: str) -> Iterator[CiRecord]:
    data_end, space_end = info.compressed_data_size, info.uncompressed_size
    ordered = not info.features & (BlobFeature.IS_CHUNKDICT_GENERATED | BlobFeature.ZRAN)
    contexts = context_bytes(info, header, ci)
    zrans = _zran_out_lens(info, header, contexts, where)
    batches = _batches(info, contexts, where)
    batch_coff = [-1] * len(batches)
    next_uoff = next_coff = 0
    for index, (u, c, d) in enumerate(_V2.iter_unpack(records)):
        uoff = (u & 0xFFFF_FFFF) << 12
        usize = (u >> 32 & 0xFF_FFFF) + 1
        coff = c & 0xFF_FFFF_FFFF
        csize = c >> 40
        disk_flags = u >> 56
        ctx = ctx_off = crc = flags = 0
        if uoff < next_uoff or uoff + usize > space_end:
            raise _bad_uoff(where, index, uoff, usize, next_uoff, space_end)
        next_uoff = uoff + usize
        if disk_flags & (_V2_ZRAN | _V2_BATCH):
            ctx, ctx_off = d >> 32, d & 0xFFFF_FFFF
            units = batches if disk_flags & _V2_BATCH else zrans
            if disk_flags & _V2_CRC or disk_flags & (_V2_ZRAN | _V2_BATCH) == _V2_ZRAN | _V2_BATCH:
                raise _bad(where, index, f"flags {disk_flags:#x}; zran, batch and crc exclude each other")
            if ctx >= len(units):
                raise _bad(
                    where, index, f"context {ctx}; the blob has {len(units)} of the kind (flags {disk_flags:#x})"
                )
            if ctx_off + usize > units[ctx]:
                raise _bad(where, index, f"{usize} bytes at {ctx_off} of context {ctx}, which has {units[ctx]}")
        elif disk_flags & _V2_CRC:
            flags, crc = _CRC, d & 0xFFFF_FFFF
        if disk_flags & _V2_BATCH:
            csize, usize_all = _BATCH.unpack_from(contexts, ctx * CONTEXT_SIZE)
            flags = _BATCH_FLAG | (_COMPRESSED if csize != usize_all else 0)
            if info.cipher != Cipher.NONE:
                flags |= _ENCRYPTED
            if batch_coff[ctx] < 0:
                batch_coff[ctx] = coff
            elif batch_coff[ctx] == coff:
                next_coff = min(next_coff, coff)
            else:
                raise _bad(where, index, f"batch {ctx} at {coff}; an earlier chunk says {batch_coff[ctx]}")
        elif disk_flags & _V2_ZRAN:
            flags = _ZRAN_FLAG | _COMPRESSED
        else:
            flags |= disk_flags & _V2_COMPRESSED
            if disk_flags & _V2_ENCRYPTED:
                if info.cipher == Cipher.NONE:
                    raise _bad(where, index, "it is encrypted, but the blob has no cipher")
                flags |= _ENCRYPTED
            if not csize or (not flags & (_COMPRESSED | _ENCRYPTED) and csize != usize):
                raise _bad(where, index, f"stored size {csize}, plain size {usize}, flags {disk_flags:#x}")
        if coff < next_coff or coff + csize > data_end:
            raise _bad_coff(where, index, coff, csize, next_coff, data_end)
        if ordered:
            next_coff = coff + csize
        yield coff, uoff, csize, usize, flags, ctx, ctx_off, crc


def _bad(where: str, index: int, message: str) -> FormatError:
    return FormatError(where, f"chunk {index}", message)


def _bad_uoff(where: str, index: int, uoff: int, usize: int, minimum: int, end: int) -> FormatError:
    return _bad(where, index, f"plain bytes {uoff} to {uoff + usize}; they must be between {minimum} and {end}")


def _bad_coff(where: str, index: int, coff: int, csize: int, minimum: int, end: int) -> FormatError:
    return _bad(where, index, f"stored bytes {coff} to {coff + csize}; they must be between {minimum} and {end}")


def _batches(info: BlobInfo, contexts: bytes, where: str) -> list[int]:
    """The plain lengths of all batches, after checking them."""
    if not info.features & BlobFeature.BATCH:
        return []
    # Encryption pads units of fewer than 16 bytes to 18, so a tiny encrypted batch may be longer than its content.
    padded = 18 if info.cipher != Cipher.NONE else 0
    for index, (csize, usize) in enumerate(_BATCH.iter_unpack(contexts)):
        if not 0 < usize <= MAX_CHUNK_SIZE or not 0 < csize <= max(usize, padded):
            raise FormatError(where, f"batch context {index}", f"stored size {csize}, plain size {usize}: out of range")
    return [usize for _, usize in _BATCH.iter_unpack(contexts)]


def _zran_out_lens(info: BlobInfo, header: CiHeader, contexts: bytes, where: str) -> list[int]:
    """The output lengths of all zran contexts, after checking them."""
    if not info.features & BlobFeature.ZRAN:
        return []
    table = header.ctx_size - CONTEXT_SIZE * header.ctx_count
    lengths = []
    for index, raw in enumerate(_ZRAN.iter_unpack(contexts)):
        ctx = ZranContext._make(raw)
        field = f"zran context {index}"
        if not 0 < ctx.out_len <= MAX_CHUNK_SIZE or not 0 < ctx.in_len <= MAX_CONTEXT_INPUT:
            raise FormatError(where, field, f"{ctx.in_len} bytes give {ctx.out_len}: out of range")
        if ctx.in_offset + ctx.in_len > info.compressed_data_size:
            raise FormatError(
                where, field, f"{ctx.in_len} bytes at {ctx.in_offset} of a layer of {info.compressed_data_size}"
            )
        if ctx.dict_size > MAX_DICTIONARY or ctx.dict_offset + ctx.dict_size > table or ctx.ctx_bits > 7:
            raise FormatError(
                where,
                field,
                f"dictionary {ctx.dict_offset}+{ctx.dict_size} of a table of {table}, {ctx.ctx_bits} bits: out of range",
            )
        lengths.append(ctx.out_len)
    return lengths
