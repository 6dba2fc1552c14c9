"""Hostile bytes in the inodes, chunks and directories of RAFS v5, each with the field it is refused for."""

from __future__ import annotations

from collections.abc import Callable
from struct import pack

import pytest

from nydusd.errors import FormatError
from nydusd.formats.model import RawChunk
from nydusd.formats.walk import MAX_DEPTH, walk
from tests.support.patched import PatchedV5, all_calls

# --- hostile: refused when the inode is looked at ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "path", "at", "form", "value"),
    [
        ("inode.parent", b"empty", 32, "Q", 0),
        ("inode.parent", b"empty", 32, "Q", 1 << 63),
        ("inode.parent", b"deep/d0", 32, "Q", 380),
        ("inode.ino", b"empty", 40, "Q", 3),
        ("inode.mode", b"empty", 60, "I", 0),
        ("inode.size", b"empty", 64, "Q", 1 << 63),
        ("inode.child_count", b"empty", 64, "Q", 1),
        ("inode.child_count", b"empty", 64, "Q", (1 << 63) - 1),
        ("inode.child_count", b"empty", 96, "I", 0xFFFFFFFF),
        ("inode.nlink", b"empty", 88, "I", 0),
        ("inode.child_index", b"many", 92, "I", 0),
        ("inode.child_index", b"many", 92, "I", 1),
        ("inode.child_index", b"many", 92, "I", 388),
        ("inode.child_index", b"many", 96, "I", 0xFFFFFFFF),
        ("inode.name_size", b"empty", 100, "H", 0),
        ("inode.name_size", b"empty", 100, "H", 257),
        ("inode.symlink_size", b"sym-link", 102, "H", 0),
        ("inode.symlink_size", b"sym-link", 102, "H", 4097),
    ],
)
def test_bad_inode_is_refused_by_whatever_looks_at_it(
    v5: PatchedV5, field: str, path: bytes, at: int, form: str, value: int
) -> None:
    v5.put(v5.record_at(path) + at, form, value)
    image = v5.open()
    ino = v5.ino(path)
    for call in all_calls(image, ino):
        with pytest.raises(FormatError) as caught:
            call()
        assert caught.value.field == field


@pytest.mark.parametrize("ino", [-1, 0, 389, 1 << 64])
def test_ino_outside_the_table_is_refused(v5: PatchedV5, ino: int) -> None:
    with pytest.raises(FormatError) as caught:
        v5.open().inode(ino)
    assert caught.value.field == "inode.ino"


def test_record_cut_by_the_end_of_the_file_is_refused(v5: PatchedV5) -> None:
    slot = v5.ino(b"empty")
    v5.put(8192 + 4 * (slot - 1), "I", (len(v5.data) - 120) >> 3)
    with pytest.raises(FormatError) as caught:
        v5.open().inode(slot)
    assert caught.value.field == "inode_table"


@pytest.mark.parametrize("path", [b"empty", b"fifo", b"sym-link"])
def test_name_cut_by_the_end_of_the_file_is_refused(v5: PatchedV5, path: bytes) -> None:
    slot, at = v5.ino(path), v5.record_at(path)
    v5.data += v5.data[at : at + 128]
    v5.put(8192 + 4 * (slot - 1), "I", (len(v5.data) - 128) >> 3)
    image = v5.open()
    for call in (lambda: image.inode(slot), lambda: list(image.readdir(1, 0))):
        with pytest.raises(FormatError) as caught:
            call()
        assert caught.value.field == "inode.name_size"


@pytest.mark.parametrize("size", [1 << 63, (1 << 24) + 1, 1 << 20])
def test_xattrs_beyond_the_file_or_all_reason_are_refused(v5: PatchedV5, size: int) -> None:
    v5.put(v5.after_name(b"xattr/user"), "Q", size)
    with pytest.raises(FormatError) as caught:
        v5.open().xattrs(v5.ino(b"xattr/user"))
    assert caught.value.field == "xattr.size"


def test_call_for_another_type_of_file_is_refused(v5: PatchedV5) -> None:
    image = v5.open()
    file = v5.ino(b"dup/a")
    calls: list[Callable[[], object]] = [
        lambda: image.readlink(1),
        lambda: image.extents(1, 0, 1),
        lambda: image.lookup(file, b"x"),
        lambda: image.readdir(file, 0),
    ]
    for call in calls:
        with pytest.raises(FormatError) as caught:
            call()
        assert caught.value.field == "inode.mode"


def test_symlink_target_with_nul_is_refused(v5: PatchedV5) -> None:
    v5.put(v5.after_name(b"sym-link") + 1, "B", 0)
    with pytest.raises(FormatError) as caught:
        v5.open().readlink(v5.ino(b"sym-link"))
    assert caught.value.field == "symlink"


# --- hostile: chunks and children ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, 8])
@pytest.mark.parametrize(
    ("field", "at", "form", "value"),
    [
        ("chunk.blob_index", 32, "I", 1),
        ("chunk.blob_index", 32, "I", 0xFFFFFFFF),
        ("chunk.uncompressed_size", 44, "I", 0xFFFFFFFF),
        ("chunk.uncompressed_offset", 56, "Q", (1 << 64) - 1),
        ("chunk.index", 72, "I", 318),
    ],
)
def test_chunk_out_of_its_blob_is_refused(
    v5: PatchedV5, flags: int, field: str, at: int, form: str, value: int
) -> None:
    path = b"sizes/1048577"
    v5.put(v5.record_at(path) + 80, "Q", flags)
    v5.put(v5.after_name(path) + 80 + at, form, value)
    image = v5.open()
    ino = v5.ino(path)
    assert len(image.extents(ino, 0, 1 << 20)) == 1
    with pytest.raises(FormatError) as caught:
        image.extents(ino, 0, 1 << 21)
    assert caught.value.field == field


def test_files_that_share_one_array_of_chunks_do_not_list_more_than_the_file_has_room_for(v5: PatchedV5) -> None:
    """The time to open a blob would be the product of files and chunks."""
    info = v5.after_name(b"dup/a")
    many, start = len(v5.data) // 80, len(v5.data) + -len(v5.data) % 8
    v5.data += bytes(start - len(v5.data)) + v5.data[info : info + 80] * many
    for path in (b"dup/a", b"dup/b", b"empty"):
        area = v5.after_name(path)
        v5.put(v5.record_at(path) + 80, "Q", 4)  # it has xattrs, as long as it is to the array
        v5.put(v5.record_at(path) + 96, "I", many)
        v5.put(area, "Q", start - area - 8)
    listed: list[RawChunk] = []
    with pytest.raises(FormatError) as caught:
        listed += v5.open().raw_chunks()
    assert caught.value.field == "inode.child_count"
    assert len(listed) * 80 <= len(v5.data)
    assert len(v5.open().file_chunks(v5.ino(b"empty"))) == many


@pytest.mark.parametrize(("at", "field"), [(32, "chunk.blob_index"), (72, "chunk.index")])
def test_chunk_out_of_its_blob_is_refused_when_all_are_listed(v5: PatchedV5, at: int, field: str) -> None:
    v5.put(v5.after_name(b"dup/a") + at, "I", 0xFFFFFFFF)
    with pytest.raises(FormatError) as caught:
        list(v5.open().raw_chunks())
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "at", "form", "value"),
    [
        ("inode.parent", 32, "Q", 2),
        ("inode.mode", 60, "I", 0),
        ("inode.name_size", 100, "H", 0),
        ("inode.name_size", 100, "H", 0xFFFF),
        ("inode.name", 128, "B", ord("/")),
        ("inode.name", 129, "B", 0),
        ("inode.name", 128, "B", ord("z")),
        ("inode.name", 128, "B", ord("a")),
    ],
)
def test_bad_child_is_refused_by_the_listing(v5: PatchedV5, field: str, at: int, form: str, value: int) -> None:
    v5.put(v5.record_at(b"empty") + at, form, value)
    with pytest.raises(FormatError) as caught:
        list(v5.open().readdir(1, 0))
    assert caught.value.field == field


@pytest.mark.parametrize("name", [b".", b".."])
def test_stored_dot_entry_is_refused(v5: PatchedV5, name: bytes) -> None:
    at = v5.slot_at(v5.get(v5.slot_at(1) + 92, "I"))
    v5.put(at + 100, "H", len(name))
    v5.put(at + 128, f"{len(name)}s", name)
    with pytest.raises(FormatError) as caught:
        list(v5.open().readdir(1, 0))
    assert caught.value.field == "inode.name"


def test_directory_under_a_second_name_is_refused(v5: PatchedV5) -> None:
    v5.put(v5.record_at(b"dup") + 40, "Q", 1)
    image = v5.open()
    with pytest.raises(FormatError) as caught:
        image.lookup(1, b"dup")
    assert caught.value.field == "inode.ino"


def test_hard_link_to_a_directory_is_refused(v5: PatchedV5) -> None:
    v5.put(v5.record_at(b"empty") + 40, "Q", v5.ino(b"dup"))
    image = v5.open()
    for call in (lambda: image.lookup(1, b"empty"), lambda: list(image.readdir(1, 0))):
        with pytest.raises(FormatError) as caught:
            call()
        assert caught.value.field == "inode.mode"


def test_tree_deeper_than_any_path_ends_the_walk() -> None:
    with pytest.raises(FormatError) as caught:
        list(walk(PatchedChain(MAX_DEPTH + 5).open(), 1, 1 << 30))
    assert caught.value.field == "tree"
    assert list(walk(PatchedChain(MAX_DEPTH - 5).open(), 1, 1 << 30)) == []


class PatchedChain(PatchedV5):
    """A v5 image of nothing but `length` folders, each in the one before."""

    def __init__(self, length: int) -> None:
        super().__init__()
        head = bytearray(self.data[:8192])
        table = bytearray()
        records = bytearray()
        base = 8192 + (4 * length + 7 & ~7)
        root = bytes(self.data[self.slot_at(1) : self.slot_at(1) + 136])
        self.data = head
        self.put(24, "QQQQIIIIQ", length, 8192, 0, 0, length, 0, 0, 0, 0)
        for slot in range(1, length + 1):
            table += pack("<I", (base + len(records)) >> 3)
            record = bytearray(root)
            record[32:48] = pack("<QQ", slot - 1, slot)
            record[88:104] = pack("<IIIHH", 2, slot + 1, int(slot < length), 1, 0)
            record[128:136] = b"d".ljust(8, b"\0")
            records += record
        self.data += table.ljust(base - 8192, b"\0") + records
