"""The decoder on invented chunks: encryption, batches, legacy stargz, holes, damage, and calls that are wrong."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence

import pytest
import zstandard

from nydusd.codec.cipher import XtsCipher
from nydusd.codec.crc import crc32c
from nydusd.codec.digest import sha256
from nydusd.errors import CorruptChunkError, FormatError, InternalError
from nydusd.formats.model import BlobFeature, BlobInfo, ChunkFlag, ChunkRecord, Compressor
from nydusd.storage.cache.decode import ChunkDecoder
from nydusd.storage.cache.stored import fetch_range
from tests.support.blobs import V2, blob_info

KEY, IV = bytes(range(32)), bytes(16)
CIPHER = XtsCipher(KEY, IV)
ZSTD = blob_info(features=V2, compressor=Compressor.ZSTD)
ENCRYPTED = blob_info(features=V2 | int(BlobFeature.ENCRYPTED), compressor=Compressor.ZSTD, key=KEY, iv=IV)
TEXT = b"many words, many words, many words, many words. " * 20


def pack(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def record(csize: int, usize: int, flags: int = 0, *, coff: int = 0, crc: int = 0, ctx_off: int = 0) -> ChunkRecord:
    return ChunkRecord(coff, 0, csize, usize, flags, 0, ctx_off, crc)


def decode(
    info: BlobInfo,
    records: Sequence[ChunkRecord],
    data: bytes,
    *,
    digest: bytes | None = None,
    contexts: bytes = b"",
    base: int = 0,
) -> list[bytes]:
    decoder = ChunkDecoder(info)
    decoded = list(decoder.decode_range(records, 5, base, memoryview(data), lambda _: digest, contexts))
    assert [chunk for chunk, _ in decoded] == list(range(5, 5 + len(records)))
    return [bytes(plain) for _, plain in decoded]


@pytest.mark.parametrize("plain", [b"x", b"x" * 15, b"y" * 16, TEXT])
@pytest.mark.parametrize("compressed", [False, True])
def test_encrypted_chunks_of_every_length(plain: bytes, compressed: bool) -> None:
    stored = CIPHER.encrypt(pack(plain) if compressed else plain)
    flags = ChunkFlag.ENCRYPTED | ChunkFlag.DIGEST | (ChunkFlag.COMPRESSED if compressed else 0)
    assert decode(ENCRYPTED, [record(len(stored), len(plain), flags)], stored, digest=sha256(plain)) == [plain]


@pytest.mark.parametrize("plain", [b"tiny", b"x" * 15, b"sixteen bytes ok", TEXT, bytes(64)])
def test_encrypted_batches_are_told_raw_from_compressed_by_their_decrypted_length(plain: bytes) -> None:
    unit = pack(plain) if len(pack(plain)) < len(plain) else plain
    stored = CIPHER.encrypt(unit)
    # What a builder's flags say for tiny batches is wrong; it compares padded with plain length.
    flags = ChunkFlag.BATCH | ChunkFlag.ENCRYPTED | (ChunkFlag.COMPRESSED if len(stored) != len(plain) else 0)
    contexts = struct.pack("<II32x", len(stored), len(plain))
    records = [
        record(len(stored), 2, flags | ChunkFlag.DIGEST),
        record(len(stored), 2, flags | ChunkFlag.DIGEST, ctx_off=2),
    ]
    assert decode(ENCRYPTED, records[:1], stored, digest=sha256(plain[:2]), contexts=contexts) == [plain[:2]]
    assert decode(ENCRYPTED, records[1:], stored, digest=sha256(plain[2:4]), contexts=contexts) == [plain[2:4]]


def test_chunks_are_cut_from_the_middle_of_what_was_fetched() -> None:
    data = b"gap" + TEXT + b"gap"
    chunks = [record(10, 10, coff=103), record(20, 20, coff=113)]
    assert decode(ZSTD, chunks, data, base=100) == [TEXT[:10], TEXT[10:30]]


def test_uncompressed_chunks_are_not_copied() -> None:
    data = memoryview(bytearray(TEXT))
    ((_, plain),) = ChunkDecoder(ZSTD).decode_range([record(10, 10)], 0, 0, data, lambda _: None)
    assert isinstance(plain, memoryview) and plain.obj is data.obj


def test_wrong_digest_crc_length_and_stream_are_corrupt_chunks() -> None:
    stored = pack(TEXT)
    flags = ChunkFlag.COMPRESSED
    cases = [
        (record(len(stored), len(TEXT), flags | ChunkFlag.DIGEST), "sha256 digest is"),
        (
            record(len(stored), len(TEXT), flags | ChunkFlag.DIGEST | ChunkFlag.CRC, crc=crc32c(TEXT)),
            "sha256 digest is",
        ),
        (record(len(stored), len(TEXT), flags | ChunkFlag.CRC, crc=1), "crc32c is"),
        (record(len(stored), len(TEXT) + 1, flags), "the frame claims"),
        (record(len(stored) - 1, len(TEXT), flags), "zstd"),
        (record(10, 10, ChunkFlag.COMPRESSED), "zstd"),
        (record(10, 11), "decoded to 10 bytes instead of 11"),
        (record(15, 10, ChunkFlag.ENCRYPTED), "no cipher"),
    ]
    for bad, why in cases:
        with pytest.raises(CorruptChunkError, match=f"blob b10b chunk 5: .*{why}"):
            decode(ZSTD, [bad], stored, digest=bytes(32))


def test_chunks_before_a_corrupt_one_are_given() -> None:
    records = [record(4, 4), record(4, 4, ChunkFlag.CRC, coff=4, crc=1), record(4, 4, coff=8)]
    given = []
    with pytest.raises(CorruptChunkError) as caught:
        for chunk, plain in ChunkDecoder(ZSTD).decode_range(records, 0, 0, memoryview(TEXT), lambda _: None):
            given.append((chunk, bytes(plain)))
    assert caught.value.chunk == 1 and given == [(0, TEXT[:4])]


def test_crc_is_enough_where_there_is_no_digest() -> None:
    flagged = record(len(TEXT), len(TEXT), ChunkFlag.CRC, crc=crc32c(TEXT))
    assert decode(ZSTD, [flagged], TEXT) == [TEXT]


def test_legacy_stargz_reads_the_start_of_the_member_it_finds() -> None:
    legacy = blob_info(features=1, compressor=Compressor.GZIP)
    stored = gzip.compress(TEXT + b"tar padding") + gzip.compress(b"the next chunk")
    flags = ChunkFlag.COMPRESSED | ChunkFlag.DIGEST
    assert decode(legacy, [record(len(stored), len(TEXT), flags)], stored, digest=sha256(TEXT)) == [TEXT]


def test_chunks_that_the_image_does_not_describe_are_empty() -> None:
    hole = record(0, 0)
    assert decode(ZSTD, [hole, record(4, 4), hole], TEXT) == [b"", TEXT[:4], b""]
    assert fetch_range([hole, hole], b"", 0, 1) == (0, 0)
    assert fetch_range([hole, record(4, 4, coff=50), hole], b"", 0, 2) == (50, 4)


def test_fetch_range_takes_whole_batches_and_the_union_of_contexts() -> None:
    batched = [record(100, 5, ChunkFlag.BATCH, coff=1000), record(7, 7, coff=1100)]
    assert fetch_range(batched, b"", 0, 1) == (1000, 107)
    assert fetch_range(batched, b"", 0, 0) == (1000, 100)
    contexts = b"".join(struct.pack("<QQQIIIBB2x", at, 0, 0, 50, 9, 0, 0, 0) for at in (10, 40, 200))
    zran = [ChunkRecord(0, 0, 0, 1, ChunkFlag.ZRAN, ctx, 0, 0) for ctx in (0, 1, 2)]
    assert fetch_range(zran, contexts, 0, 1) == (10, 80)
    assert fetch_range(zran, contexts, 1, 2) == (40, 210)


def test_missing_input_is_our_own_bug() -> None:
    with pytest.raises(InternalError, match="0 to 10 are needed; 0 to 9 were fetched"):
        decode(ZSTD, [record(10, 10)], b"123456789")
    with pytest.raises(InternalError, match="were fetched"):
        decode(ZSTD, [record(10, 10)], TEXT, base=1)
    with pytest.raises(InternalError, match="none was given"):
        decode(ZSTD, [record(4, 4, ChunkFlag.DIGEST)], TEXT)


def test_a_dictionary_that_is_not_whole_is_refused() -> None:
    info = blob_info(features=V2 | int(BlobFeature.ZRAN), compressor=Compressor.GZIP)
    contexts = struct.pack("<QQQIIIBB2x", 0, 0, 64, 10, 10, 32, 0, 0)
    chunk = [record(0, 10, ChunkFlag.ZRAN)]
    asked = []

    def read_dict(offset: int, size: int) -> bytes:
        asked.append((offset, size))
        return b"short"

    with pytest.raises(FormatError, match="5 of 32 bytes"):
        list(ChunkDecoder(info, read_dict).decode_range(chunk, 0, 0, memoryview(TEXT), lambda _: None, contexts))
    assert asked == [(64, 32)]
    with pytest.raises(InternalError, match="dictionaries"):
        list(ChunkDecoder(info).decode_range(chunk, 0, 0, memoryview(TEXT), lambda _: None, contexts))
