"""Building the chunk table from each source, and what happens when sources break rules or contradict each other."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from nydusd.errors import FormatError
from nydusd.formats.blob_meta import pack_v1, pack_v2
from nydusd.formats.model import TARFS_GRID, BlobFeature, BlobInfo, ChunkFlag, ChunkRecord, Compressor, RawChunk
from nydusd.storage.cache.chunk_table import (
    MAX_STORED_CHUNK,
    ChunkTable,
    build_from_ci,
    build_from_raw,
    build_tarfs,
    gzip_bound,
)
from tests.support.blobs import V2, blob_info, header_for, records_of

DIGESTS = [b"a" * 32, b"b" * 32]
CI = pack_v1(0, 0, 50, 100) + pack_v1(50, 4096, 100, 100)
INFO = blob_info(ci=CI, chunk_count=2, compressed_size=150, uncompressed_size=8192)


def raw(
    index: int,
    *,
    digest: bytes = b"d" * 32,
    flags: int = 1,
    csize: int = 50,
    usize: int = 100,
    coff: int | None = None,
    uoff: int | None = None,
    blob: int = 0,
    crc: int = 0,
    file_offset: int = 0,
) -> RawChunk:
    return RawChunk(
        digest,
        blob,
        flags,
        csize,
        usize,
        index * 50 if coff is None else coff,
        index * 4096 if uoff is None else uoff,
        file_offset,
        index,
        crc,
    )


def from_ci(*chunks: RawChunk, array: bytes | None = None) -> ChunkTable:
    return build_from_ci(INFO, CI, header_for(INFO), chunks, array)


def from_raw(*chunks: RawChunk, **facts: int) -> list[ChunkRecord]:
    return records_of(build_from_raw(raw_info(**facts), chunks))


def raw_info(**facts: int) -> BlobInfo:
    defaults = {"chunk_count": 3, "compressed_size": 1000, "uncompressed_size": 20000, "features": 0}
    return blob_info(**(defaults | facts))  # type: ignore[arg-type]


def test_digests_and_crcs_come_from_the_chunk_table() -> None:
    table = from_ci(
        raw(1, digest=DIGESTS[1], flags=0x10, csize=100, crc=9),
        raw(7, blob=3),
        raw(0, digest=DIGESTS[0], file_offset=8),
    )
    first, second = records_of(table)
    assert bytes(table.digests) == b"".join(DIGESTS)
    assert first == ChunkRecord(0, 0, 50, 100, ChunkFlag.COMPRESSED | ChunkFlag.DIGEST, 0, 0, 0)
    assert second == ChunkRecord(50, 4096, 100, 100, ChunkFlag.CRC | ChunkFlag.DIGEST, 0, 0, 9)
    assert (table.count, table.uncompressed_size, table.contexts, table.dict_size) == (2, 8192, b"", 0)


def test_unknown_digests_stay_unknown() -> None:
    table = from_ci(raw(1, digest=bytes(32), csize=100), array=None)
    assert [record.flags & ChunkFlag.DIGEST for record in records_of(table)] == [0, 0]
    table = from_ci(array=DIGESTS[0] + bytes(32))
    assert [record.flags & ChunkFlag.DIGEST for record in records_of(table)] == [ChunkFlag.DIGEST, 0]


@pytest.mark.parametrize(
    ("chunks", "array", "rule"),
    [
        ([raw(0, usize=99)], None, "chunk 0: 100 bytes at 0 in the blob, 99 at 0 in the bootstrap"),
        ([raw(1, uoff=8192)], None, "chunk 1: 100 bytes at 4096 in the blob, 100 at 8192"),
        ([raw(1)], None, "chunk 1: stored in 100 bytes at 50 by the blob, 50 at 50 by the bootstrap"),
        ([raw(0, coff=4096)], None, "chunk 0: stored in 50 bytes at 0 by the blob, 50 at 4096 by"),
        ([raw(2)], None, "chunk 2 of a blob with 2 chunks"),
        ([raw(0), raw(0, digest=b"e" * 32)], None, "digest 6464"),
        ([raw(0)], b"".join(DIGESTS), "digest 6161"),
        ([], b"x" * 63, "63 bytes; 64 for 2 chunks"),
        ([raw(0, flags=0x11, crc=1), raw(0, flags=0x11, crc=2)], None, "crc 0x1 in the blob, 0x2"),
    ],
)
def test_sources_that_contradict_each_other_are_refused(chunks: list[RawChunk], array: bytes | None, rule: str) -> None:
    with pytest.raises(FormatError, match=rule):
        from_ci(*chunks, array=array)


def test_crc_of_the_chunk_information_must_be_that_of_the_bootstrap() -> None:
    ci = pack_v2(0, 0, 50, 100, 0x11, 5)
    info = blob_info(ci=ci, features=V2, chunk_count=1, compressed_size=50, uncompressed_size=4096)
    (record,) = records_of(build_from_ci(info, ci, header_for(info), [raw(0, flags=0x11, crc=5)]))
    assert record.crc == 5
    with pytest.raises(FormatError, match="crc 0x5 in the blob, 0x6"):
        build_from_ci(info, ci, header_for(info), [raw(0, flags=0x11, crc=6)])


@pytest.mark.parametrize(
    ("flags", "features", "compressor"),
    [
        (4, int(BlobFeature.BATCH), Compressor.ZSTD),
        (2, int(BlobFeature.ZRAN | BlobFeature.SEPARATE), Compressor.GZIP),
        (1, int(BlobFeature.IS_CHUNKDICT_GENERATED), Compressor.ZSTD),
        (0, 0, Compressor.GZIP),
    ],
    ids=["batch", "zran", "dictionary", "legacy stargz"],
)
def test_place_in_the_stored_blob_counts_only_where_the_chunk_table_has_it(
    flags: int, features: int, compressor: Compressor
) -> None:
    contexts = {4: struct.pack("<II32x", 40, 100), 2: struct.pack("<QQQIIIBB2x", 0, 0, 0, 40, 100, 0, 0, 0)}
    ci = pack_v2(10, 0, 40, 100, flags, 0) + contexts.get(flags, b"") if flags else pack_v1(10, 0, 40, 100)
    info = blob_info(
        ci=ci,
        features=features | (V2 if flags else 0),
        compressor=compressor,
        chunk_count=1,
        compressed_size=50,
        uncompressed_size=4096,
    )
    header = header_for(info, ctx_count=1 if flags in contexts else 0)
    (record,) = records_of(build_from_ci(info, ci, header, [raw(0, csize=0, coff=0)]))
    assert record.coff == 10 and record.csize == 40 and record.flags & ChunkFlag.DIGEST


def test_zran_tables_say_where_their_dictionaries_are() -> None:
    context = struct.pack("<QQQIIIBB2x", 10, 0, 0, 40, 100, 64, 0, 0)
    ci = pack_v2(10, 0, 40, 100, 3, 0) + context + bytes(64)
    features = V2 | int(BlobFeature.ZRAN | BlobFeature.SEPARATE)
    info = blob_info(ci=ci, features=features, chunk_count=1, compressed_size=50, uncompressed_size=4096)
    table = build_from_ci(info, ci, header_for(info, ctx_count=1, ctx_size=104), [])
    assert (table.contexts, table.dict_offset, table.dict_size) == (context, 64, 64)


# --- from the bootstrap alone --------------------------------------------------------------------------------------


def test_chunk_infos_of_the_bootstrap_in_any_order_and_repeated() -> None:
    table = build_from_raw(raw_info(), [raw(2), raw(0), raw(1, flags=0x10, csize=100, crc=3), raw(0, file_offset=4096)])
    flags = ChunkFlag.DIGEST
    assert records_of(table) == [
        ChunkRecord(0, 0, 50, 100, flags | ChunkFlag.COMPRESSED, 0, 0, 0),
        ChunkRecord(50, 4096, 100, 100, flags | ChunkFlag.CRC, 0, 0, 3),
        ChunkRecord(100, 8192, 50, 100, flags | ChunkFlag.COMPRESSED, 0, 0, 0),
    ]
    assert bytes(table.digests) == b"d" * 96 and table.uncompressed_size == 20000


def test_chunks_of_removed_files_leave_empty_ones() -> None:
    records = from_raw(raw(1), chunk_count=4)
    empty = [record.usize == record.csize == 0 for record in records]
    assert empty == [True, False, True, True]
    assert [record.uoff for record in records] == [0, 4096, 4196, 4196]
    table = build_from_raw(raw_info(), [])
    assert table.count == 3 and not any(table.records)


def test_images_without_extended_blob_table() -> None:
    info = raw_info(chunk_count=0, compressed_size=0, uncompressed_size=0)
    table = build_from_raw(info, [raw(0), raw(1)])
    assert (table.count, table.uncompressed_size) == (2, 4196)
    assert build_from_raw(info, []).count == 0
    with pytest.raises(FormatError, match="1 different chunk ids, but the highest is 1"):
        build_from_raw(info, [raw(1)])


@pytest.mark.parametrize(
    ("chunks", "rule"),
    [
        ([raw(3)], "chunk 3 of a blob with 3 chunks"),
        ([raw(0), raw(0, coff=1)], "described twice, differently"),
        ([raw(0, usize=0)], "plain size 0"),
        ([raw(0, usize=(1 << 24) + 1)], "plain size 16777217"),
        ([raw(0), raw(1, uoff=99)], "plain bytes 99 to 199; must be between 100"),
        ([raw(2, uoff=19901)], "must be between 0 and 20000"),
        ([raw(0, uoff=(1 << 64) - 1)], "plain bytes"),
        ([raw(0, csize=0)], "stored size 0"),
        ([raw(0, coff=951)], "data ends at 1000"),
        ([raw(0, csize=MAX_STORED_CHUNK + 1)], "stored size"),
        ([raw(0, flags=0)], "stored as it is in 50 bytes but 100"),
        ([raw(0, flags=8)], "part of a batch"),
        ([raw(0, flags=4)], "no cipher"),
    ],
)
def test_chunk_infos_that_break_a_rule_are_refused(chunks: list[RawChunk], rule: str) -> None:
    with pytest.raises(FormatError, match=rule):
        from_raw(*chunks)


def test_too_many_chunks_are_refused_before_memory_is_taken() -> None:
    with pytest.raises(FormatError, match="chunk_count: 4294967295"):
        from_raw(chunk_count=(1 << 32) - 1)
    with pytest.raises(FormatError, match="chunk_count: 4294967296"):
        from_raw(raw((1 << 32) - 1), chunk_count=0)


def test_legacy_stargz_chunks_are_read_by_gzips_worst_case() -> None:
    info = blob_info(compressor=Compressor.GZIP, chunk_count=2, compressed_size=500, uncompressed_size=20000)
    records = records_of(build_from_raw(info, [raw(0, csize=0), raw(1, csize=1, coff=400)]))
    assert [record.csize for record in records] == [gzip_bound(100), 100]
    with pytest.raises(FormatError, match="stored size"):
        build_from_raw(info, [raw(0, coff=500)])
    ci = pack_v1(0, 0, 5, 100)
    info = blob_info(ci=ci, compressor=Compressor.GZIP, chunk_count=1, compressed_size=500, uncompressed_size=4096)
    (record,) = records_of(build_from_ci(info, ci, header_for(info), []))
    assert record.csize == gzip_bound(100)


@pytest.mark.parametrize("size", [1, 399, 400])
def test_legacy_stargz_chunk_behind_the_end_of_its_blob_is_refused(size: int) -> None:
    """Where the data ends is told by the place of the chunk information, too: the two may contradict each other."""
    ci = pack_v1(0, 0, 5, 100) + pack_v1(400, 4096, 5, 100)
    info = blob_info(
        ci=ci,
        ci_offset=500,
        features=int(BlobFeature.ALIGNED | BlobFeature.CAP_TAR_TOC),
        compressor=Compressor.GZIP,
        chunk_count=2,
        compressed_size=size,
        uncompressed_size=8192,
    )
    with pytest.raises(FormatError, match=f"chunk 1: stored at 400 of {size} bytes"):
        build_from_ci(info, ci, header_for(info), [])
    whole = replace(info, compressed_size=401)
    assert [record.csize for record in records_of(build_from_ci(whole, ci, header_for(whole), []))] == [
        gzip_bound(100),
        1,
    ]


# --- tarfs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, TARFS_GRID, TARFS_GRID + 1, 3 * TARFS_GRID - 512])
def test_a_tar_is_cut_into_pieces(size: int) -> None:
    table = build_tarfs(blob_info(compressed_size=size, uncompressed_size=size))
    records = records_of(table)
    assert sum(record.usize for record in records) == size == table.uncompressed_size
    assert table.count == len(records) == -(-size // TARFS_GRID)
    for index, record in enumerate(records):
        offset = index * TARFS_GRID
        length = min(TARFS_GRID, size - offset)
        assert record == (offset, offset, length, length, 0, 0, 0, 0)
    assert len(table.digests) == 32 * table.count


def test_a_tar_beyond_all_bounds_is_refused() -> None:
    with pytest.raises(FormatError, match="compressed_size"):
        build_tarfs(blob_info(compressed_size=(1 << 44) + 1))
