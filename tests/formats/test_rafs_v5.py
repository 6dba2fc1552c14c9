"""RAFS v5 beyond what the fixtures show: rare but valid forms, and hostile bytes in what is read when it is opened."""

from __future__ import annotations

import os
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.errors import FormatError
from nydusd.formats import BootstrapKind, detect, open_bootstrap, rafs_v5
from nydusd.formats.model import Compressor, Digester
from nydusd.formats.rafs_v5_super import MAX_BLOBS, V5Super, read_blobs
from nydusd.formats.rafs_v5_xattr import read_xattrs
from nydusd.formats.superblock import Table
from tests.support.patched import PatchedV5

TABLE, EXT_TABLE = 48, 72
"""Places in the superblock of the offsets of the blob table and of the extended one."""


# --- valid, but not in the fixtures -------------------------------------------------------------------------------


def test_file_with_holes_flag_is_read_by_file_offsets(v5: PatchedV5) -> None:
    path = b"sizes/1048577"
    ino = v5.ino(path)
    ranges = [(0, 1 << 21), (0, 4096), (1 << 20, 10), ((1 << 20) - 1, 2), (1048577, 5), (5, 0)]
    plain = [v5.open().extents(ino, *wanted) for wanted in ranges]
    v5.put(v5.record_at(path) + 80, "Q", 8)
    assert [v5.open().extents(ino, *wanted) for wanted in ranges] == plain


def put_holes(v5: PatchedV5) -> int:
    """Make a file one "with holes", of a chunk of 1,000 bytes and one of 1 byte; its inode number."""
    path = b"sizes/1048577"
    ino = v5.ino(path)
    infos = v5.after_name(path)
    v5.put(v5.record_at(path) + 80, "Q", 8)
    v5.put(v5.record_at(path) + 64, "Q", 1001)
    v5.put(infos + 44, "I", 1000)
    v5.put(infos + 80 + 64, "Q", 1000)
    return ino


def test_chunks_of_a_file_with_holes_may_be_of_any_length(v5: PatchedV5) -> None:
    ino = put_holes(v5)
    pieces = v5.open().extents(ino, 990, 100)
    assert [(piece.offset, piece.length, piece.chunk_len) for piece in pieces] == [(990, 10, 1000), (0, 1, 1)]


def test_read_of_more_tiny_chunks_than_any_image_has_is_refused(v5: PatchedV5, monkeypatch: pytest.MonkeyPatch) -> None:
    ino = put_holes(v5)
    monkeypatch.setattr(rafs_v5, "_PIECES_MOST", 1)
    image = v5.open()
    assert len(image.extents(ino, 0, 1000)) == 1
    with pytest.raises(FormatError, match="more than 1 chunks"):
        image.extents(ino, 990, 100)


def test_bytes_that_no_chunk_covers_are_refused_and_not_made_up(v5: PatchedV5) -> None:
    path = b"sizes/1048577"
    ino = v5.ino(path)
    v5.put(v5.record_at(path) + 80, "Q", 8)
    v5.put(v5.record_at(path) + 64, "Q", (1 << 20) + 10)
    v5.put(v5.after_name(path) + 80 + 64, "Q", (1 << 20) + 9)
    image = v5.open()
    assert len(image.extents(ino, 0, 1 << 20)) == 1
    assert len(image.extents(ino, (1 << 20) + 9, 1)) == 1
    with pytest.raises(FormatError) as caught:
        image.extents(ino, 0, (1 << 20) + 1)
    assert caught.value.field == "chunk.file_offset"
    v5.put(v5.record_at(path) + 96, "I", 1)
    with pytest.raises(FormatError) as caught:
        v5.open().extents(ino, (1 << 20) + 9, 1)
    assert caught.value.field == "chunk.file_offset"


def test_image_without_extended_blob_table_reads_with_unknown_counts(v5: PatchedV5) -> None:
    ino = v5.ino(b"dup/a")
    before = v5.open().extents(ino, 0, 1 << 20)
    v5.put(68, "IQ", 0, 0)
    image = v5.open()
    (blob,) = image.blobs
    assert (blob.chunk_count, blob.uncompressed_size, blob.compressed_size, blob.features) == (0, 0, 0, 0)
    assert image.extents(ino, 0, 1 << 20) == before
    assert len(list(image.raw_chunks())) > 300


def test_unknown_feature_bits_of_a_blob_are_dropped(v5: PatchedV5) -> None:
    v5.put(v5.get(EXT_TABLE, "Q") + 4, "I", 0xC0001000)
    assert v5.open().blobs[0].features == 0x40000000


@pytest.mark.parametrize(
    ("flags", "compressor", "digester"),
    [
        (0, Compressor.LZ4_BLOCK, Digester.BLAKE3),
        (0x3, Compressor.NONE, Digester.BLAKE3),
        (0xC2, Compressor.LZ4_BLOCK, Digester.BLAKE3),
        (0xC8, Compressor.GZIP, Digester.SHA256),
        (0x8C, Compressor.ZSTD, Digester.BLAKE3),
    ],
)
def test_compressor_and_digester_come_from_the_flags(
    v5: PatchedV5, flags: int, compressor: Compressor, digester: Digester
) -> None:
    v5.put(16, "Q", flags)
    (blob,) = v5.open().blobs
    assert (blob.compressor, blob.digester) == (compressor, digester)


def test_image_without_explicit_owners_belongs_to_this_process(v5: PatchedV5) -> None:
    ino = v5.ino(b"bigowner")
    assert v5.open().inode(ino)[3:5] == (70000, 3000000000)
    v5.put(16, "Q", v5.get(16, "Q") & ~0x10)
    assert v5.open().inode(ino)[3:5] == (os.geteuid(), os.getegid())


def test_stored_name_may_be_padded_with_nuls(v5: PatchedV5) -> None:
    at = v5.record_at(b"empty")
    assert v5.get(at + 100, "H") == 5
    v5.put(at + 100, "H", 8)
    image = v5.open()
    assert image.lookup(1, b"empty") == v5.ino(b"empty")
    assert b"empty" in [entry.name for entry in image.readdir(1, 0)]


def test_prefetch_table_ends_at_its_first_zero(v5: PatchedV5) -> None:
    v5.data += pack("<4I", 5, 7, 0, 9)
    v5.put(40, "Q", len(v5.data) - 16)
    v5.put(60, "I", 4)
    assert v5.open().prefetch_inodes() == [5, 7]
    v5.put(len(v5.data) - 12, "I", 389)
    with pytest.raises(FormatError) as caught:
        v5.open().prefetch_inodes()
    assert caught.value.field == "prefetch_table"


def test_bootstrap_out_of_an_old_blob_gives_that_blob_its_name(v5: PatchedV5) -> None:
    v5.put(v5.get(EXT_TABLE, "Q") + 4, "I", 0)
    table_id = v5.open().blobs[0].blob_id
    assert v5.open("ab" * 32).blobs[0].blob_id == table_id
    assert v5.open("ab" * 32, extracted=True).blobs[0].blob_id == "ab" * 32


def _blob_table(ids: list[bytes], extended: int = 0) -> tuple[memoryview, V5Super]:
    table = b"\0".join(pack("<II", 10 + number, 20 + number) + blob_id for number, blob_id in enumerate(ids))
    table += bytes(-len(table) % 8)
    nothing = Table("", 0, 0)
    after = Table("ext", len(table), 64 * extended)
    data = table + b"".join(pack("<IIQQ40x", 3, 0x40000000, 300, 200) for _ in range(extended))
    return memoryview(data), V5Super(1 << 20, 0x9, 1, 1, nothing, nothing, Table("blobs", 0, len(table)), after)


@given(lengths=st.lists(st.integers(1, 128), max_size=20))
def test_blob_table_of_ids_of_any_length_is_split(lengths: list[int]) -> None:
    ids = [(b"%d" % number * length)[:length] for number, length in enumerate(lengths)]
    data, sb = _blob_table(ids, extended=len(ids))
    blobs = read_blobs(data, "x", sb, None, extracted=False)
    assert [blob.blob_id.encode() for blob in blobs] == ids
    assert [(blob.prefetch_offset, blob.prefetch_size) for blob in blobs] == [(10 + i, 20 + i) for i in range(len(ids))]
    assert all((b.chunk_count, b.uncompressed_size, b.compressed_size) == (3, 300, 200) for b in blobs)


@pytest.mark.parametrize(
    ("ids", "extended", "field"),
    [
        ([b"a"] * (MAX_BLOBS + 1), 0, "superblock.blob_table"),
        ([b"a", b"b"], 1, "superblock.extended_blob_table"),
        ([b"a", b"../b"], 0, "blobs[1].blob_id"),
        ([b"", b"bbbbbbbbb"], 0, "blobs[0].blob_id"),
        ([b"a" * 129], 0, "blobs[0].blob_id"),
        ([b"sha256:ab"], 0, "blobs[0].blob_id"),
        ([b"\xff\xfe"], 0, "blobs[0].blob_id"),
    ],
)
def test_bad_blob_table_is_refused(ids: list[bytes], extended: int, field: str) -> None:
    data, sb = _blob_table(ids, extended)
    with pytest.raises(FormatError) as caught:
        read_blobs(data, "x", sb, None, extracted=False)
    assert caught.value.field == field


def _xattr_area(pairs: list[bytes]) -> memoryview:
    return memoryview(b"".join(pack("<I", len(pair)) + pair for pair in pairs))


@given(
    xattrs=st.dictionaries(st.binary(min_size=1, max_size=255).filter(lambda name: 0 not in name), st.binary()),
    noise=st.binary(min_size=1).filter(lambda pair: 0 not in pair),
)
def test_xattrs_are_read_back_and_a_pair_without_nul_is_passed_over(xattrs: dict[bytes, bytes], noise: bytes) -> None:
    pairs = [name + b"\0" + value for name, value in xattrs.items()]
    assert read_xattrs(_xattr_area([*pairs, noise]), "x", 1) == xattrs


@pytest.mark.parametrize(
    ("area", "field"),
    [
        (pack("<I", 0), "xattr.pair_size"),
        (pack("<I", 5) + b"a\0b", "xattr.pair_size"),
        (pack("<I", 0xFFFFFFFF) + b"a\0b", "xattr.pair_size"),
        (b"\1\0", "xattr.pair_size"),
        (pack("<I", 2) + b"\0v", "xattr.name"),
        (pack("<I", 258) + b"n" * 256 + b"\0v", "xattr.name"),
        ((pack("<I", 3) + b"a\0b") * 2, "xattr.name"),
    ],
)
def test_xattr_that_breaks_a_rule_is_refused(area: bytes, field: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_xattrs(memoryview(area), "x", 1)
    assert caught.value.field == field


# --- hostile: refused when opened ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "at", "form", "value"),
    [
        ("superblock.sb_size", 8, "I", 4096),
        ("superblock.block_size", 12, "I", 0),
        ("superblock.block_size", 12, "I", 0x180000),
        ("superblock.block_size", 12, "I", 0x2000000),
        ("superblock.flags", 16, "Q", 0x400),
        ("superblock.flags", 16, "Q", 1 << 63),
        ("superblock.flags", 16, "Q", 0x02000000),
        ("superblock.inodes_count", 24, "Q", 389),
        ("superblock.inode_table_offset", 32, "Q", 8196),
        ("superblock.inode_table", 32, "Q", 8184),
        ("superblock.inode_table", 32, "Q", (1 << 64) - 8),
        ("superblock.blob_table_offset", TABLE, "Q", 8193),
        ("superblock.blob_table", TABLE, "Q", 8192 + 16),
        ("superblock.inode_table_entries", 56, "I", 0),
        ("superblock.inode_table", 56, "I", 0xFFFFFFFF),
        ("superblock.prefetch_table", 60, "I", 0xFFFFFFFF),
        ("superblock.blob_table", 60, "I", 2),
        ("superblock.blob_table", 64, "I", 0xFFFFFFFF),
        ("superblock.extended_blob_table", 68, "I", 0xFFFFFFFF),
        ("superblock.extended_blob_table_offset", EXT_TABLE, "Q", 9),
        ("superblock.extended_blob_table", EXT_TABLE, "Q", 1 << 40),
        ("inode_table", 8192, "I", 0),
        ("inode_table", 8192, "I", 1024),
        ("inode_table", 8192, "I", 0xFFFFFFFF),
    ],
)
def test_bad_superblock_or_table_is_refused_when_opened(
    v5: PatchedV5, field: str, at: int, form: str, value: int
) -> None:
    v5.put(at, form, value)
    with pytest.raises(FormatError) as caught:
        v5.open()
    assert (caught.value.where, caught.value.field) == ("image.boot", field)


@pytest.mark.parametrize(
    ("field", "at", "form", "value"),
    [
        ("blobs[0].chunk_count", 0, "I", (1 << 24) + 1),
        ("blobs[0].uncompressed_size", 8, "Q", 1 << 63),
        ("blobs[0].compressed_size", 16, "Q", 1 << 63),
    ],
)
def test_bad_extended_blob_entry_is_refused(v5: PatchedV5, field: str, at: int, form: str, value: int) -> None:
    v5.put(v5.get(EXT_TABLE, "Q") + at, form, value)
    with pytest.raises(FormatError) as caught:
        v5.open()
    assert caught.value.field == field


@pytest.mark.parametrize("size", [0, 80, 8192, 8200, 9000, 9744])
def test_truncated_file_is_refused(v5: PatchedV5, size: int) -> None:
    del v5.data[size:]
    with pytest.raises(FormatError) as caught:
        v5.open()
    assert caught.value.field.startswith("superblock.")


def test_other_versions_of_the_format_are_named_in_the_message(v5: PatchedV5) -> None:
    assert detect(memoryview(v5.data)) is BootstrapKind.V5
    v5.put(4, "I", 0x400)
    assert detect(memoryview(v5.data)) is BootstrapKind.BLOB
    with pytest.raises(FormatError, match="0x400"):
        open_bootstrap(memoryview(v5.data), "x")


def test_root_that_is_no_directory_is_refused(v5: PatchedV5) -> None:
    v5.put(v5.slot_at(1) + 60, "I", 0o100644)
    with pytest.raises(FormatError) as caught:
        v5.open()
    assert caught.value.field == "inode.mode"
