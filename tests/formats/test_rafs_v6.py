"""RAFS v6 beyond what the fixtures show: rare but valid forms, and hostile bytes, each with the field it is refused for."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from nydusd.errors import FormatError
from nydusd.formats import BootstrapKind, detect, open_bootstrap
from nydusd.formats.blob_id import blob_id_from_path
from tests.support.patched import PatchedV6, all_calls
from tests.support.tree import SMALL

SUPER, EXT, SLOT, BLOB = 1024, 1152, 1408, 4096


# --- valid, but not in the fixtures -------------------------------------------------------------------------------


def test_compact_inode_has_no_times_and_reads_the_same_data(v6: PatchedV6) -> None:
    path = b"sizes/1048577"
    plain = v6.open()
    ino, at, addresses = v6.ino(path), v6.inode_at(path), v6.addresses_at(path)
    mode, size, i_u = v6.get(at + 4, "H"), v6.get(at + 8, "Q"), v6.get(at + 16, "I")
    before = plain.extents(ino, 0, size)
    stored = bytes(v6.data[addresses : addresses + 16])
    v6.put(at, "HHHHIIIIHHI", 4 << 1, 0, mode, 7, size, 0, i_u, 0, 11, 12, 0)
    v6.data[at + 32 : at + 48] = stored
    image = v6.open()
    assert image.inode(ino) == (ino, mode, 7, 11, 12, size, (size + 511) // 512, 0, 0, 0)
    assert image.extents(ino, 0, size) == before


def test_image_without_explicit_owners_belongs_to_this_process(v6: PatchedV6) -> None:
    ino = v6.ino(b"bigowner")
    assert v6.open().inode(ino)[3:5] == (70000, 3000000000)
    v6.put(EXT, "Q", v6.get(EXT, "Q") & ~0x10)
    assert v6.open().inode(ino)[3:5] == (os.geteuid(), os.getegid())


def test_only_devices_have_a_device_number(v6: PatchedV6) -> None:
    image = v6.open()
    assert image.inode(v6.ino(b"chardev")).rdev == os.makedev(1, 3)
    assert image.inode(v6.ino(b"sizes/1")).rdev == 0


def test_reserved_compatible_flags_are_accepted(v6: PatchedV6) -> None:
    v6.put(EXT, "Q", v6.get(EXT, "Q") | 0xFC000000)
    assert v6.open().flags & 0xFC000000 == 0xFC000000


def test_prefetch_table_ends_at_its_first_zero() -> None:
    image = PatchedV6("v6-prefetch")
    first = image.get(4352, "I")
    image.put(4356, "I", 0)
    assert image.open().prefetch_inodes() == [first]


def test_empty_legacy_prefetch_table_is_none(v6: PatchedV6) -> None:
    v6.put(EXT + 48, "I", 12345)
    assert v6.open().prefetch_inodes() == []


@pytest.mark.parametrize(
    ("features", "extracted", "blob", "meta"),
    [
        (0x40000003, False, "path", "path"),  # metadata inside: the table's id is a filler
        (0x40000803, False, "table", "table"),  # external
        (0x40000013, False, "table", "path"),  # the data is a layer of its own
        (0x40000011, False, "table", "digest"),
        (0x00000001, True, "path", "path"),  # from before the tar and TOC marks
        (0x00000001, False, "table", "table"),
    ],
)
def test_blob_is_called_by_the_file_or_by_the_table(
    v6: PatchedV6, features: int, extracted: bool, blob: str, meta: str
) -> None:
    names = {"table": v6.open().blobs[0].blob_id, "path": "ab" * 32, "digest": "cd" * 32}
    v6.put(BLOB + 84, "I", features)
    v6.put(BLOB + 168, "32s", b"\xcd" * 32)
    info = v6.open(blob_id_from_path(f"/x/y.z/{'ab' * 32}.tar.boot"), extracted=extracted).blobs[0]
    assert (info.blob_id, info.meta_blob_id) == (names[blob], names[meta])


def test_without_a_file_name_the_table_id_stays(v6: PatchedV6) -> None:
    v6.put(BLOB + 84, "I", 0x40000013)
    info = v6.open().blobs[0]
    assert info.blob_id == info.meta_blob_id


def test_encrypted_blob_has_key_and_iv_and_no_digest() -> None:
    blob = PatchedV6("v6-encrypt").open().blobs[0]
    assert (len(blob.cipher_key), len(blob.cipher_iv), blob.meta_digest, blob.meta_size) == (32, 16, b"", 0)


def test_kind_of_file_is_told_by_its_magic(v6: PatchedV6) -> None:
    assert detect(memoryview(v6.data)) is BootstrapKind.V6
    (blob,) = (SMALL / "images" / "v6-inline" / "blobs").iterdir()
    assert detect(memoryview(blob.read_bytes())) is BootstrapKind.BLOB
    for data in (b"", b"\0" * 8192, v6.data[:1027]):
        assert detect(memoryview(data)) is BootstrapKind.BLOB
        with pytest.raises(FormatError) as caught:
            open_bootstrap(memoryview(data), "x")
        assert caught.value.field == "superblock.magic"


# --- hostile: refused when opened ---------------------------------------------------------------------------------

ON_OPEN = [
    ("superblock.checksum", SUPER + 4, "I", 1),
    ("superblock.feature_compat", SUPER + 8, "I", 0),
    ("superblock.blkszbits", SUPER + 12, "B", 9),
    ("superblock.blkszbits", SUPER + 12, "B", 255),
    ("superblock.extslots", SUPER + 13, "B", 1),
    ("inode.nid", SUPER + 14, "H", 0xFFFF),
    ("superblock.inos", SUPER + 16, "Q", 0),
    ("superblock.meta_blkaddr", SUPER + 40, "I", 0xFFFFFFFF),
    ("superblock.meta_blkaddr", SUPER + 40, "I", 26),
    ("superblock.xattr_blkaddr", SUPER + 44, "I", 1),
    ("superblock.feature_incompat", SUPER + 80, "I", 0xD),
    ("superblock.union", SUPER + 84, "H", 1),
    ("superblock.extra_devices", SUPER + 86, "H", 2),
    ("superblock.extra_devices", SUPER + 86, "H", 256),
    ("superblock.blocks", SUPER + 86, "H", 0),
    ("superblock.devt_slotoff", SUPER + 88, "H", 12),
    ("superblock.flags", EXT, "Q", 0x10000B4 | 0x400),
    ("superblock.flags", EXT, "Q", 0x10000B4 | 1 << 63),
    ("superblock.flags", EXT, "Q", 0x10000B4 | 0x2),
    ("superblock.flags", EXT, "Q", 0x10000B4 | 0x8),
    ("superblock.flags", EXT, "Q", 0),
    ("superblock.blkszbits", EXT, "Q", 0x10000B4 | 0x200),
    ("superblock.blob_table_offset", EXT + 8, "Q", 4104),
    ("superblock.blob_table", EXT + 8, "Q", 0),
    ("superblock.blob_table", EXT + 8, "Q", (1 << 64) - 4096),
    ("superblock.blob_table_size", EXT + 16, "I", 128),
    ("superblock.extra_devices", EXT + 16, "I", 0),
    ("superblock.extra_devices", EXT + 16, "I", 0xFFFFFF00),
    ("superblock.chunk_size", EXT + 20, "I", 0),
    ("superblock.chunk_size", EXT + 20, "I", 0x800),
    ("superblock.chunk_size", EXT + 20, "I", 0x2000000),
    ("superblock.chunk_size", EXT + 20, "I", 0x180000),
    ("superblock.chunk_table_offset", EXT + 24, "Q", 4097),
    ("superblock.chunk_table", EXT + 24, "Q", 1 << 40),
    ("superblock.chunk_table", EXT + 24, "Q", 4096),
    ("superblock.chunk_table_size", EXT + 32, "Q", 81),
    ("superblock.chunk_table", EXT + 32, "Q", 80 << 40),
    ("devices[0].id", SLOT, "B", 0),
    ("devices[0].id", SLOT, "2s", b".."),
    ("devices[0].blocks", SLOT + 64, "I", 0),
    ("blobs[0].blob_id", BLOB, "3s", b"../"),
    ("blobs[0].blob_id", BLOB, "B", 0xFF),
    ("blobs[0].blob_id", BLOB + 6, "1s", b":"),
    ("blobs[0].blob_id", BLOB + 10, "2s", b"a\0"),
    ("blobs[0].blob_id", BLOB, "64s", b""),
    ("blobs[0].blob_index", BLOB + 64, "I", 1),
    ("blobs[0].chunk_size", BLOB + 68, "I", 0x1000),
    ("blobs[0].chunk_count", BLOB + 72, "I", (1 << 24) + 1),
    ("blobs[0].compressor", BLOB + 76, "I", 4),
    ("blobs[0].digester", BLOB + 80, "I", 2),
    ("blobs[0].features", BLOB + 84, "I", 0x40001001),
    ("blobs[0].features", BLOB + 84, "I", 0xC0000001),
    ("blobs[0].features", BLOB + 84, "I", 0x40000000),
    ("blobs[0].features", BLOB + 84, "I", 0x40000041),
    ("blobs[0].features", BLOB + 84, "I", 0x40000081),
    ("blobs[0].features", BLOB + 84, "I", 0x40000009),
    ("blobs[0].ci_uncompressed_size", BLOB + 84, "I", 0x40000005),
    ("blobs[0].compressed_size", BLOB + 88, "Q", (1 << 40) + 1),
    ("blobs[0].uncompressed_size", BLOB + 96, "Q", (1 << 44) + 1),
    ("blobs[0].ci_compressor", BLOB + 108, "I", 9),
    ("blobs[0].ci_offset", BLOB + 112, "Q", (1 << 64) - 1),
    ("blobs[0].ci_compressed_size", BLOB + 120, "Q", 1 << 30),
    ("blobs[0].ci_uncompressed_size", BLOB + 128, "Q", 1 << 40),
    ("blobs[0].cipher", BLOB + 216, "I", 2),
    ("blobs[0].cipher", BLOB + 216, "I", 1),
]


@pytest.mark.parametrize(("field", "at", "form", "value"), ON_OPEN)
def test_bad_superblock_or_table_is_refused_when_opened(
    v6: PatchedV6, field: str, at: int, form: str, value: object
) -> None:
    v6.put(at, form, value)
    with pytest.raises(FormatError) as caught:
        v6.open()
    assert (caught.value.where, caught.value.field) == ("image.boot", field)


@pytest.mark.parametrize("size", [1028, 4095, 4097, 8192, 4096 * 24 + 512])
def test_truncated_file_is_refused_when_opened(v6: PatchedV6, size: int) -> None:
    del v6.data[size:]
    with pytest.raises(FormatError) as caught:
        v6.open()
    assert caught.value.field.startswith("superblock")


def test_two_devices_of_one_id_are_refused(v6: PatchedV6) -> None:
    v6.put(SUPER + 86, "H", 2)
    v6.put(EXT + 16, "I", 512)
    v6.data[SLOT + 128 : SLOT + 256] = v6.data[SLOT : SLOT + 128]
    with pytest.raises(FormatError) as caught:
        v6.open()
    assert caught.value.field == "devices[1].id"


def test_prefetch_table_over_the_blob_table_is_refused() -> None:
    image = PatchedV6("v6-prefetch")
    image.put(EXT + 40, "Q", 4096 + 248)
    with pytest.raises(FormatError) as caught:
        image.open()
    assert caught.value.field == "superblock.prefetch_table"


def test_prefetched_nid_beyond_the_file_is_refused() -> None:
    image = PatchedV6("v6-prefetch")
    image.put(4352, "I", 0xFFFFFFFF)
    with pytest.raises(FormatError) as caught:
        image.open().prefetch_inodes()
    assert caught.value.field == "prefetch_table"


def test_equal_halves_of_a_key_are_refused() -> None:
    image = PatchedV6("v6-encrypt")
    image.put(BLOB + 168, "32s", b"k" * 32)
    with pytest.raises(FormatError) as caught:
        image.open()
    assert caught.value.field == "blobs[0].cipher_key"


def test_tarfs_image_with_aligned_blob_is_refused(tarfs: PatchedV6) -> None:
    tarfs.put(BLOB + 84, "I", 0x40000041)
    with pytest.raises(FormatError) as caught:
        tarfs.open()
    assert caught.value.field == "blobs[0].features"


def test_file_name_that_is_no_blob_id_is_refused(v6: PatchedV6) -> None:
    with pytest.raises(FormatError) as caught:
        v6.open("a/b")
    assert caught.value.field == "path_id"


def test_root_that_is_a_file_is_refused(v6: PatchedV6) -> None:
    v6.put(SUPER + 14, "H", v6.ino(b"setuid"))
    with pytest.raises(FormatError) as caught:
        v6.open()
    assert caught.value.field == "inode.mode"


# --- hostile: refused when the inode is looked at ------------------------------------------------------------------

INODES = [
    ("inode.nlink", b"dup/a", 44, "I", 0),
    ("inode.format", b"dup/a", 0, "H", 0x11),
    ("inode.format", b"dup/a", 0, "H", 3),
    ("inode.format", b"dup/a", 0, "H", 5),
    ("inode.mode", b"dup/a", 4, "H", 0),
    ("inode.mode", b"dup/a", 4, "H", 0xF000),
    ("inode.i_u", b"dup/a", 16, "I", 0x08),
    ("inode.i_u", b"dup/a", 16, "I", 0x10028),
    ("inode.size", b"dup/a", 8, "Q", (1 << 64) - 1),
    ("inode.size", b"dup/a", 8, "Q", (1 << 63) - 1),
    ("inode.size", b"dup/a", 8, "Q", 1 << 40),
    ("inode.size", b"fifo", 8, "Q", 1 << 63),
    ("inode.xattr_count", b"dup/a", 2, "H", 0xFFFF),
    ("inode.size", b"sym-link", 8, "Q", 0),
    ("inode.size", b"sym-link", 8, "Q", 4097),
    ("inode.format", b"sym-link", 0, "H", 9),
    ("inode.size", b"long-symlink", 16, "I", 0xFFFFFFFF),
    ("inode.size", b"many", 8, "Q", 0),
    ("inode.size", b"many", 8, "Q", 1 << 62),
    ("inode.size", b"many", 8, "Q", 80_000),
    ("inode.size", b"many", 16, "I", 0xFFFFFFFF),
    ("inode.format", b"many", 0, "H", 9),
]


@pytest.mark.parametrize(("field", "path", "at", "form", "value"), INODES)
def test_bad_inode_is_refused_by_whatever_looks_at_it(
    v6: PatchedV6, field: str, path: bytes, at: int, form: str, value: int
) -> None:
    if (path, at) == (b"long-symlink", 16):
        v6.put(v6.inode_at(path), "H", 1)  # in whole blocks, so that the block address counts
    v6.put(v6.inode_at(path) + at, form, value)
    image = v6.open()
    ino = v6.ino(path)
    for call in all_calls(image, ino):
        with pytest.raises(FormatError) as caught:
            call()
        assert caught.value.field == field
        assert f"inode {ino}" in caught.value.message


@pytest.mark.parametrize("nid", [-1, 1 << 16, 1 << 32, (1 << 64) - 1])
def test_nid_outside_the_file_is_refused(v6: PatchedV6, nid: int) -> None:
    with pytest.raises(FormatError) as caught:
        v6.open().inode(nid)
    assert caught.value.field == "inode.nid"


def test_extended_inode_cut_by_the_end_of_the_file_is_refused(v6: PatchedV6) -> None:
    v6.put(len(v6.data) - 32, "H", 1)
    last = (len(v6.data) - v6.nid_at(0)) // 32 - 1
    with pytest.raises(FormatError) as caught:
        v6.open().inode(last)
    assert caught.value.field == "inode.nid"


def test_inline_directory_block_cut_by_the_end_of_the_file_is_refused(v6: PatchedV6) -> None:
    at = v6.inode_at(b"emptydir")
    v6.data[-64:] = v6.data[at : at + 64]
    last = (len(v6.data) - 64 - v6.nid_at(0)) // 32
    with pytest.raises(FormatError) as caught:
        v6.open().inode(last)
    assert caught.value.field == "inode.size"


def test_call_for_another_type_of_file_is_refused(v6: PatchedV6) -> None:
    image = v6.open()
    file = v6.ino(b"dup/a")
    calls: list[Callable[[], object]] = [
        lambda: image.readlink(image.root_ino),
        lambda: image.extents(image.root_ino, 0, 1),
        lambda: image.parent(file),
        lambda: image.lookup(file, b"x"),
        lambda: image.readdir(file, 0),
    ]
    for call in calls:
        with pytest.raises(FormatError) as caught:
            call()
        assert caught.value.field == "inode.mode"


def test_symlink_target_with_nul_is_refused(v6: PatchedV6) -> None:
    v6.put(v6.block_at(b"sym-link") + 1, "B", 0)
    with pytest.raises(FormatError) as caught:
        v6.open().readlink(v6.ino(b"sym-link"))
    assert caught.value.field == "symlink"


# --- hostile: chunk addresses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "at", "form", "value"),
    [
        ("chunk.device", 2, "B", 0),
        ("chunk.device", 2, "B", 2),
        ("chunk.device", 2, "B", 255),
        ("chunk.index", 0, "H", 0xFFFF),
        ("chunk.index", 3, "B", 1),
        ("chunk.block", 4, "I", 0xFFFFFFFF),
    ],
)
def test_chunk_address_out_of_its_blob_is_refused(v6: PatchedV6, field: str, at: int, form: str, value: int) -> None:
    v6.put(v6.addresses_at(b"sizes/1048577") + 8 + at, form, value)
    image = v6.open()
    ino = v6.ino(b"sizes/1048577")
    assert len(image.extents(ino, 0, 1 << 20)) == 1
    with pytest.raises(FormatError) as caught:
        image.extents(ino, 0, 1 << 21)
    assert caught.value.field == field


def test_tarfs_address_beyond_the_tar_is_refused(tarfs: PatchedV6) -> None:
    size = tarfs.get(BLOB + 96, "Q")
    tarfs.put(tarfs.addresses_at(b"dup/a") + 4, "I", size // 512 - 1)
    with pytest.raises(FormatError) as caught:
        tarfs.open().extents(tarfs.ino(b"dup/a"), 0, 4096)
    assert caught.value.field == "chunk.block"


def test_tarfs_tail_of_a_whole_number_of_chunks_is_a_whole_chunk(tarfs: PatchedV6) -> None:
    ino = tarfs.ino(b"sizes/2M-zero")
    assert sum(piece.length for piece in tarfs.open().extents(ino, (1 << 20) + 5, 1 << 30)) == (1 << 20) - 5


@pytest.mark.parametrize(
    ("at", "form", "value", "field"),
    [
        (32, "I", 1, "blob_index"),
        (72, "I", 318, "index"),
        (72, "I", 0xFFFFFFFF, "index"),
        (56, "Q", 4097, "uncompressed_offset"),
        (56, "Q", 1 << 43, "uncompressed_offset"),
    ],
)
def test_chunk_table_record_out_of_its_blob_is_refused(
    v6: PatchedV6, at: int, form: str, value: int, field: str
) -> None:
    """Builders write new metadata by it."""
    v6.put(v6.get(EXT + 24, "Q") + at, form, value)
    with pytest.raises(FormatError) as caught:
        list(v6.open().raw_chunks())
    assert caught.value.field == f"chunk_table.{field}"
