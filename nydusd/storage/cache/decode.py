"""From stored bytes to verified chunks: decrypt, decompress, check the length, check the digest.

Run by decompress workers. A decoder keeps no state between calls except the blob's cipher and codecs. Nothing is
yielded that was not verified, unless the image has neither digest nor checksum for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from nydusd.codec.cipher import XtsCipher
from nydusd.codec.compress import Buffer, decoder_for, gunzip_prefix
from nydusd.codec.crc import crc32c
from nydusd.codec.digest import hasher_for
from nydusd.codec.errors import CodecError
from nydusd.codec.zran import inflate_context
from nydusd.errors import CorruptChunkError, FormatError, InternalError
from nydusd.formats.blob_meta import batch_context, zran_context
from nydusd.formats.model import BlobInfo, ChunkFlag, ChunkRecord, Cipher
from nydusd.storage.cache.chunk_table import is_legacy_stargz

_COMPRESSED = int(ChunkFlag.COMPRESSED)
_ENCRYPTED = int(ChunkFlag.ENCRYPTED)
_BATCH = int(ChunkFlag.BATCH)
_ZRAN = int(ChunkFlag.ZRAN)
_CRC = int(ChunkFlag.CRC)
_DIGEST = int(ChunkFlag.DIGEST)
_GROUPED = _BATCH | _ZRAN

ReadDict = Callable[[int, int], bytes]
"""Gives `size` bytes at `offset` of the blob's dictionary table."""

Digests = Callable[[int], bytes | None]
"""Gives the 32-byte digest of a chunk id; called only for records with the DIGEST flag."""


def verify_chunk(info: BlobInfo, record: ChunkRecord, digest: bytes | None, plain: Buffer) -> bool:
    """Whether plain bytes that come from elsewhere (a cache file) are the chunk's.

    False as well if the image has neither digest nor checksum for it: nobody can tell then.
    """
    return bool(record.flags & (_DIGEST | _CRC)) and not _what_is_wrong(info, record, digest, plain)


def _what_is_wrong(info: BlobInfo, record: ChunkRecord, digest: bytes | None, plain: Buffer) -> str:
    """Empty if `plain` has the record's length and digest, or its CRC where there is no digest."""
    if len(plain) != record.usize:
        return f"decoded to {len(plain)} bytes instead of {record.usize}"
    if record.flags & _DIGEST:
        if digest is None:
            raise InternalError(
                f"blob {info.blob_id}: chunk at {record.uoff} is flagged to have a digest; none was given"
            )
        found = hasher_for(info.digester)(plain)
        if found != digest:
            return f"{info.digester.name.lower()} digest is {found.hex()} instead of {digest.hex()}"
    elif record.flags & _CRC:
        crc = crc32c(plain)
        if crc != record.crc:
            return f"crc32c is {crc:#010x} instead of {record.crc:#010x}"
    return ""


class ChunkDecoder:
    """Decodes the chunks of one blob. `read_dict` is needed for zran blobs only."""

    def __init__(self, info: BlobInfo, read_dict: ReadDict | None = None) -> None:
        self._info = info
        self._read_dict = read_dict
        self._legacy = is_legacy_stargz(info)
        self._cipher: XtsCipher | None = None

    def decode_range(
        self,
        records: Sequence[ChunkRecord],
        first: int,
        base_coff: int,
        data: memoryview,
        digests: Digests,
        contexts: Buffer = b"",
    ) -> Iterator[tuple[int, Buffer]]:
        """Yield (chunk id, plain bytes) for consecutive chunks, in order. `records[0]` is chunk `first`.

        `data` holds the blob's bytes from `base_coff` on, all that `fetch_range` names; `contexts` is the blob's whole
        context array. What is yielded may be a view on `data`. A chunk of 0 bytes yields none. A batch or context is
        decoded once for the chunks in a row that share it. Raises `CorruptChunkError` at the first chunk that does
        not decode to what the metadata says; call again with the chunks behind it to go on.
        """
        unit_key = (0, 0)
        unit: Buffer = b""
        for chunk, record in enumerate(records, first):
            if not record.usize:
                yield chunk, b""
                continue
            try:
                if record.flags & _GROUPED:
                    key = (record.flags & _GROUPED, record.ctx)
                    if key != unit_key or not unit:
                        unit, unit_key = self._decode_unit(record, base_coff, data, contexts), key
                    plain: Buffer = memoryview(unit)[record.ctx_off : record.ctx_off + record.usize]
                else:
                    plain = self._decode_chunk(record, _cut(data, base_coff, record.coff, record.csize))
            except CodecError as error:
                raise CorruptChunkError(self._info.blob_id, chunk, str(error)) from error
            wrong = _what_is_wrong(self._info, record, digests(chunk) if record.flags & _DIGEST else None, plain)
            if wrong:
                raise CorruptChunkError(self._info.blob_id, chunk, wrong)
            yield chunk, plain

    def _decode_chunk(self, record: ChunkRecord, stored: Buffer) -> Buffer:
        if record.flags & _ENCRYPTED:
            stored = self._decrypt(stored)
        if not record.flags & _COMPRESSED:
            return stored
        if self._legacy:
            return gunzip_prefix(stored, record.usize)
        return decoder_for(self._info.compressor)(stored, record.usize)

    def _decode_unit(self, record: ChunkRecord, base_coff: int, data: memoryview, contexts: Buffer) -> Buffer:
        """The whole batch or zran context that a chunk is in."""
        if record.flags & _BATCH:
            stored: Buffer = _cut(data, base_coff, record.coff, record.csize)
            usize = batch_context(contexts, record.ctx).usize
            if record.flags & _ENCRYPTED:
                stored = self._decrypt(stored)
            # Encryption pads tiny units, so only the decrypted length tells whether this one was compressed.
            return stored if len(stored) == usize else decoder_for(self._info.compressor)(stored, usize)
        ctx = zran_context(contexts, record.ctx)
        stored = _cut(data, base_coff, ctx.in_offset, ctx.in_len)
        return inflate_context(
            stored, ctx.ctx_byte, ctx.ctx_bits, self._dictionary(ctx.dict_offset, ctx.dict_size), ctx.out_len
        )

    def _dictionary(self, offset: int, size: int) -> bytes:
        if not size:
            return b""
        if self._read_dict is None:
            raise InternalError(f"blob {self._info.blob_id} has zran dictionaries; nobody gives them to its decoder")
        dictionary = self._read_dict(offset, size)
        if len(dictionary) != size:
            raise FormatError(f"blob {self._info.blob_id}", "zran dictionary", f"{len(dictionary)} of {size} bytes")
        return dictionary

    def _decrypt(self, stored: Buffer) -> bytes:
        if self._cipher is None:
            if self._info.cipher == Cipher.NONE:
                raise CodecError("encrypted, but the blob has no cipher")
            self._cipher = XtsCipher(self._info.cipher_key, self._info.cipher_iv)
        return self._cipher.decrypt(stored)


def _cut(data: memoryview, base_coff: int, coff: int, size: int) -> memoryview:
    """The stored bytes [coff, coff + size) out of `data`, which starts at `base_coff`."""
    start = coff - base_coff
    if start < 0 or start + size > len(data):
        raise InternalError(
            f"stored bytes {coff} to {coff + size} are needed; {base_coff} to {base_coff + len(data)} were fetched"
        )
    return data[start : start + size]
