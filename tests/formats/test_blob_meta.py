"""Chunk information: both record versions, contexts, the header, and every rule that a hostile one may break."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.errors import FormatError
from nydusd.formats.blob_meta import (
    CI_HEADER_SIZE,
    CiHeader,
    CiRecord,
    check_ci_sizes,
    iter_records,
    pack_header,
    pack_v1,
    pack_v2,
    parse_header,
    validate_header,
)
from nydusd.formats.model import BlobFeature, BlobInfo, ChunkFlag, Compressor
from tests.support.blobs import V2, blob_info, header_for

MAX = 1 << 24
_KEY = bytes(range(32))
ZRAN_FEATURES = int(BlobFeature.ZRAN | BlobFeature.SEPARATE) | V2
BATCH_FEATURES = int(BlobFeature.BATCH) | V2


def read(info: BlobInfo, ci: bytes, header: CiHeader | None = None) -> list[CiRecord]:
    header = header or header_for(info)
    validate_header(header, info, "ci")
    return list(iter_records(info, header, ci, "ci"))


def v1_info(ci: bytes, **changes: int) -> BlobInfo:
    facts = {"compressed_size": 1 << 40, "uncompressed_size": 1 << 44, "chunk_count": len(ci) // 16} | changes
    return blob_info(ci=ci, **facts)  # type: ignore[arg-type]


def v2_info(ci: bytes, count: int, features: int = V2, *, key: bytes = b"") -> BlobInfo:
    return blob_info(
        ci=ci, features=features, chunk_count=count, compressed_size=1 << 40, uncompressed_size=1 << 44, key=key
    )


@given(
    coff=st.integers(0, (1 << 40) - MAX),
    page=st.integers(0, (1 << 32) - 4096),
    csize=st.integers(1, MAX),
    usize=st.integers(1, MAX),
)
def test_v1_records_round_trip(coff: int, page: int, csize: int, usize: int) -> None:
    ci = pack_v1(coff, page * 4096, csize, usize)
    flags = ChunkFlag.COMPRESSED if csize != usize else 0
    assert read(v1_info(ci), ci) == [(coff, page * 4096, csize, usize, flags, 0, 0, 0)]


def test_v1_record_has_the_known_bytes() -> None:
    # A chunk of 16931 bytes at 0, stored in 4828; and the largest values that fit.
    assert pack_v1(0, 0, 4828, 16931) == struct.pack("<QQ", 16930 << 44, 4827 << 44)
    ci = pack_v1(0xFFFFFFFFF, 0xFFFFFFFF000, MAX, MAX)
    with pytest.raises(FormatError, match="must be between 0 and 17592186044416"):
        read(v1_info(ci), ci)


@given(
    coff=st.integers(0, (1 << 40) - MAX),
    page=st.integers(0, (1 << 32) - 4096),
    csize=st.integers(1, MAX - 1),
    usize=st.integers(1, MAX),
    crc=st.none() | st.integers(0, (1 << 32) - 1),
    compressed=st.booleans(),
    encrypted=st.booleans(),
)
def test_v2_records_round_trip(
    coff: int, page: int, csize: int, usize: int, crc: int | None, compressed: bool, encrypted: bool
) -> None:
    if not compressed and not encrypted:
        csize = usize = min(csize, usize)
    disk = (1 if compressed else 0) | (8 if encrypted else 0) | (0 if crc is None else 0x10)
    ci = pack_v2(coff, page * 4096, csize, usize, disk, crc or 0)
    features = V2 | int(BlobFeature.ENCRYPTED) if encrypted else V2
    flags = (
        (ChunkFlag.COMPRESSED if compressed else 0)
        | (ChunkFlag.ENCRYPTED if encrypted else 0)
        | (0 if crc is None else ChunkFlag.CRC)
    )
    info = v2_info(ci, 1, features, key=_KEY if encrypted else b"")
    assert read(info, ci) == [(coff, page * 4096, csize, usize, flags, 0, 0, crc or 0)]


def test_v2_flags_of_the_future_are_ignored() -> None:
    ci = pack_v2(0, 0, 10, 10, 0xE0, 0)
    assert read(v2_info(ci, 1), ci) == [(0, 0, 10, 10, 0, 0, 0, 0)]


# --- batches -------------------------------------------------------------------------------------------------------


def batch(csize: int, usize: int) -> bytes:
    return struct.pack("<II32x", csize, usize)


def read_batches(
    records: list[bytes], contexts: list[bytes], *, key: bytes = b"", features: int = BATCH_FEATURES
) -> list[CiRecord]:
    ci = b"".join(records + contexts)
    info = v2_info(ci, len(records), features, key=key)
    return read(info, ci, header_for(info, ctx_count=len(contexts)))


def test_chunks_of_a_batch_get_its_place_and_length() -> None:
    records = [
        pack_v2(100, 0, 0, 10, 5, 0),
        pack_v2(100, 4096, 0, 20, 5, 10),
        pack_v2(150, 8192, 4096, 4096, 0x10, 7),
        pack_v2(4246, 12288, 0, 8, 5, 1 << 32),
    ]
    batched = int(ChunkFlag.BATCH)
    assert read_batches(records, [batch(25, 30), batch(8, 8)]) == [
        (100, 0, 25, 10, batched | ChunkFlag.COMPRESSED, 0, 0, 0),
        (100, 4096, 25, 20, batched | ChunkFlag.COMPRESSED, 0, 10, 0),
        (150, 8192, 4096, 4096, ChunkFlag.CRC, 0, 0, 7),
        (4246, 12288, 8, 8, batched, 1, 0, 0),
    ]


@pytest.mark.parametrize(
    ("record", "contexts", "rule"),
    [
        (pack_v2(0, 0, 0, 10, 5, 1 << 32), [batch(9, 10)], "context 1; the blob has 1"),
        (pack_v2(0, 0, 0, 10, 5, 1), [batch(9, 10)], "10 bytes at 1 of context 0, which has 10"),
        (pack_v2(0, 0, 0, 10, 5, 0), [batch(11, 10)], "stored size 11"),
        (pack_v2(0, 0, 0, 10, 5, 0), [batch(0, 10)], "stored size 0"),
        (pack_v2(0, 0, 0, 10, 5, 0), [batch(10, MAX + 1)], "plain size 16777217"),
        (pack_v2(0, 0, 0, 10, 0x15, 0), [batch(9, 10)], "exclude each other"),
        (pack_v2(0, 0, 0, 10, 7, 0), [batch(9, 10)], "exclude each other"),
        (pack_v2((1 << 40) - 8, 0, 0, 10, 5, 0), [batch(9, 10)], "stored bytes"),
    ],
)
def test_batches_that_break_a_rule_are_refused(record: bytes, contexts: list[bytes], rule: str) -> None:
    with pytest.raises(FormatError, match=rule):
        read_batches([record], contexts)


def test_a_batch_at_two_places_is_refused() -> None:
    records = [pack_v2(0, 0, 0, 5, 5, 0), pack_v2(9, 4096, 0, 5, 5, 5)]
    with pytest.raises(FormatError, match="batch 0 at 9; an earlier chunk says 0"):
        read_batches(records, [batch(9, 10)])


def test_batch_flag_needs_the_feature() -> None:
    ci = pack_v2(0, 0, 0, 10, 5, 0)
    with pytest.raises(FormatError, match="context 0; the blob has 0"):
        read(v2_info(ci, 1), ci)


def test_a_tiny_encrypted_batch_may_be_longer_than_its_content() -> None:
    features = BATCH_FEATURES | int(BlobFeature.ENCRYPTED)
    record = pack_v2(0, 0, 0, 4, 0xD, 0)
    (got,) = read_batches([record], [batch(18, 4)], key=_KEY, features=features)
    assert got[:4] == (0, 0, 18, 4) and got[4] & ChunkFlag.ENCRYPTED
    with pytest.raises(FormatError, match="stored size 19"):
        read_batches([record], [batch(19, 4)], key=_KEY, features=features)
    with pytest.raises(FormatError, match="stored size 18"):
        read_batches([record], [batch(18, 4)])


# --- zran ----------------------------------------------------------------------------------------------------------


def zran(
    in_offset: int = 10,
    in_len: int = 100,
    out_len: int = 1000,
    dict_offset: int = 0,
    dict_size: int = 0,
    bits: int = 0,
) -> bytes:
    return struct.pack("<QQQIIIBB2x", in_offset, 0, dict_offset, in_len, out_len, dict_size, 7, bits)


def read_zran(record: bytes, context: bytes, dictionaries: bytes = b"") -> list[CiRecord]:
    ci = record + context + dictionaries
    info = v2_info(ci, 1, ZRAN_FEATURES)
    return read(info, ci, header_for(info, ctx_count=1, ctx_size=40 + len(dictionaries)))


def test_zran_records_keep_their_hints() -> None:
    flags = ChunkFlag.ZRAN | ChunkFlag.COMPRESSED
    assert read_zran(pack_v2(20, 0, 30, 400, 3, 512), zran()) == [(20, 0, 30, 400, flags, 0, 512, 0)]


@pytest.mark.parametrize(
    ("record", "context", "rule"),
    [
        (pack_v2(0, 0, 1, 400, 3, 601), zran(), "400 bytes at 601 of context 0"),
        (pack_v2(0, 0, 1, 400, 3, 1 << 32), zran(), "context 1; the blob has 1"),
        (pack_v2(0, 0, 1, 400, 0x13, 0), zran(), "exclude each other"),
        (pack_v2(0, 0, 1, 400, 3, 0), zran(out_len=MAX + 1), "zran context 0: 100 bytes give 16777217"),
        (pack_v2(0, 0, 1, 400, 3, 0), zran(out_len=0), "give 0: out of range"),
        (pack_v2(0, 0, 1, 400, 3, 0), zran(in_len=0), "0 bytes give"),
        (pack_v2(0, 0, 1, 400, 3, 0), zran(in_len=(1 << 25) + 1), "out of range"),
        (pack_v2(0, 0, 1, 400, 3, 0), zran(in_offset=(1 << 40) - 99), "of a layer of"),
        (pack_v2(0, 0, 1, 400, 3, 0), zran(dict_size=65), r"dictionary 0\+65 of a table of 64"),
        (pack_v2(0, 0, 1, 400, 3, 0), zran(dict_offset=64, dict_size=1), r"dictionary 64\+1"),
        (pack_v2(0, 0, 1, 400, 3, 0), zran(bits=8), "8 bits"),
    ],
)
def test_zran_that_breaks_a_rule_is_refused(record: bytes, context: bytes, rule: str) -> None:
    with pytest.raises(FormatError, match=rule):
        read_zran(record, context, bytes(64))


# --- records against each other and the blob -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "rule"),
    [
        (pack_v1(0, 4096, 9, 10), pack_v1(9, 0, 9, 10), "chunk 1: plain bytes 0 to 10; they must be between 4106"),
        (pack_v1(0, 0, 9, 4097), pack_v1(9, 4096, 9, 10), "chunk 1: plain bytes 4096"),
        (pack_v1(0, 0, 9, 10), pack_v1(8, 4096, 9, 10), "chunk 1: stored bytes 8 to 17; they must be between 9"),
        (pack_v1(0, 0, 9, 10), pack_v1(992, 4096, 9, 10), "chunk 1: stored bytes 992 to 1001"),
        (pack_v1(0, 0, 9, 10), pack_v1(9, 8192, 9, 10), "chunk 1: plain bytes 8192 to 8202"),
    ],
)
def test_overlaps_and_ends_outside_are_refused(first: bytes, second: bytes, rule: str) -> None:
    ci = first + second
    with pytest.raises(FormatError, match=rule):
        read(v1_info(ci, compressed_size=1000, uncompressed_size=8192), ci)


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        (pack_v2(0, 0, 0, 10, 1, 0), "stored size 0"),
        (pack_v2(0, 0, 9, 10, 0, 0), "stored size 9, plain size 10"),
        (pack_v2(0, 0, 9, 10, 8, 0), "no cipher"),
    ],
)
def test_v2_sizes_that_contradict_the_flags_are_refused(record: bytes, rule: str) -> None:
    with pytest.raises(FormatError, match=rule):
        read(v2_info(record, 1), record)


def test_cut_chunk_information_is_refused() -> None:
    ci = pack_v1(0, 0, 9, 10) * 2
    info = v1_info(ci)
    with pytest.raises(FormatError, match="16 bytes; 32 expected"):
        list(iter_records(info, header_for(info), ci[:16], "ci"))


# --- the header ----------------------------------------------------------------------------------------------------


def test_header_round_trip() -> None:
    header = CiHeader(0x7000001D, Compressor.ZSTD, 163, 1 << 39, 1000, 660112, 3912, 656200, 21)
    raw = pack_header(header)
    assert len(raw) == CI_HEADER_SIZE and parse_header(memoryview(raw), "h") == header


@pytest.mark.parametrize(
    ("offset", "value", "rule"),
    [(0, b"\0", "magics"), (4092, b"\0", "magics"), (8, b"\x04", "compressor 4")],
)
def test_headers_that_are_none_are_refused(offset: int, value: bytes, rule: str) -> None:
    raw = bytearray(pack_header(header_for(blob_info())))
    raw[offset : offset + 1] = value
    with pytest.raises(FormatError, match=rule):
        parse_header(raw, "h")
    with pytest.raises(FormatError, match="the header has 4096"):
        parse_header(raw[:4095], "h")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ci_compressor", Compressor.ZSTD),
        ("ci_offset", 1),
        ("ci_compressed_size", 31),
        ("ci_uncompressed_size", 33),
        ("entries", 3),
    ],
)
def test_headers_of_another_blob_are_refused(field: str, value: int) -> None:
    info = v1_info(bytes(32))
    header = dataclasses.replace(header_for(info), **{field: value})  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="they do not belong together"):
        validate_header(header, info, "ci")


def test_feature_bits_of_old_headers_are_not_compared() -> None:
    info = v1_info(bytes(32))
    validate_header(dataclasses.replace(header_for(info), features=0), info, "ci")


def test_chunk_dictionaries_may_have_other_counts() -> None:
    info = v1_info(bytes(48), chunk_count=2, features=int(BlobFeature.IS_CHUNKDICT_GENERATED))
    validate_header(dataclasses.replace(header_for(info), entries=9), info, "ci")


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("ctx_offset", 25, "contexts must follow the records"),
        ("ctx_count", 2, "2 for 1 chunks"),
        ("ctx_size", 39, "39 bytes at 24 for 1 contexts"),
        ("ctx_size", 41, "41 bytes at 24"),
        ("ctx_size", (1 << 64) - 1, "must fit"),
    ],
)
def test_context_areas_outside_are_refused(field: str, value: int, rule: str) -> None:
    info = v2_info(bytes(64), 1, ZRAN_FEATURES)
    header = dataclasses.replace(header_for(info, ctx_count=1), **{field: value})  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=rule):
        validate_header(header, info, "ci")


@pytest.mark.parametrize(
    ("info", "rule"),
    [
        (blob_info(ci=bytes(16), chunk_count=0), "chunk_count"),
        (blob_info(ci=bytes(16), chunk_count=(1 << 24) + 1), "chunk_count"),
        (blob_info(ci=bytes(17), chunk_count=1), "17 for 1 chunks; it must be 16"),
        (blob_info(ci=bytes(15), chunk_count=1), "15 for 1 chunks; it must be 16"),
        (blob_info(ci=bytes(25), chunk_count=1, features=V2), "25 for 1 chunks; it must be 24"),
        (blob_info(ci=bytes(23), chunk_count=1, features=ZRAN_FEATURES), "it must be at least 24"),
        (blob_info(ci=bytes(16), chunk_count=1, features=int(BlobFeature.BATCH)), "need CHUNK_INFO_V2"),
        (blob_info(ci=bytes(16), chunk_count=1, ci_compressed_size=17), "ci_compressed_size"),
        (blob_info(ci=bytes(16), chunk_count=1, ci_compressed_size=0), "ci_compressed_size"),
        (
            dataclasses.replace(blob_info(ci=bytes(16), chunk_count=1), ci_uncompressed_size=(256 << 20) + 1),
            "ci_uncompressed_size",
        ),
    ],
)
def test_sizes_in_the_blob_table_are_checked_before_anything_is_read(info: BlobInfo, rule: str) -> None:
    with pytest.raises(FormatError, match=rule):
        check_ci_sizes(info, "ci")
