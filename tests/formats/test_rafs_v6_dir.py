"""Directories and extended attributes of RAFS v6: generated ones, and hostile bytes, each with the field it is refused for."""

from __future__ import annotations

from struct import Struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.errors import FormatError
from nydusd.formats.model import DirEntry
from nydusd.formats.rafs_v6_dir import Directory
from nydusd.formats.rafs_v6_xattr import read_xattrs
from nydusd.formats.walk import walk
from tests.support.patched import PatchedV6

HEAD = Struct("<QHBB")


# --- directories and xattrs, generated ----------------------------------------------------------------------------


def _directory_blocks(names: list[bytes], block: int) -> tuple[bytes, list[int]]:
    """Directory data as a builder writes it, and the numbers of names in its blocks. Nid i is that of name i."""
    groups: list[list[bytes]] = [[]]
    used = 0
    for name in names:
        if used + 12 + len(name) > block:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += 12 + len(name)
    data = b""
    number = 0
    for group in groups:
        data = data.ljust(-(-len(data) // block) * block, b"\0")
        at = 12 * len(group)
        heads = b""
        for name in group:
            heads += HEAD.pack(number, at, 1, 0)
            at += len(name)
            number += 1
        data += heads + b"".join(group)
    return data, [len(group) for group in groups]


names_strategy = st.sets(
    st.binary(min_size=1, max_size=255).filter(lambda name: not set(name) & {0, 0x2F} and name != b"."), min_size=1
)


@given(names=names_strategy, block=st.sampled_from((512, 4096)), inline=st.booleans(), probe=st.binary(max_size=300))
def test_directory_of_any_names_is_listed_and_searched(
    names: set[bytes], block: int, inline: bool, probe: bytes
) -> None:
    ordered = sorted(names)
    data, _ = _directory_blocks(ordered, block)
    whole = (len(data) - 1) // block * block if inline else len(data)
    buf = memoryview(b"#" * 64 + data[:whole] + b"#" * 100 + data[whole:])
    directory = Directory(buf, "x", 1 << 40, len(data), 64, 164 + whole if inline else 0, block, len(names))
    listed = list(directory.entries(0))
    assert [(entry.name, entry.ino, entry.kind) for entry in listed] == [(n, i, 8) for i, n in enumerate(ordered)]
    for position, entry in enumerate(listed):
        assert directory.find(entry.name) == position
        assert list(directory.entries(entry.next_offset)) == listed[position + 1 :]
    assert directory.find(probe) == (ordered.index(probe) if probe in names else None)


@given(names=names_strategy, offset=st.integers(min_value=0, max_value=1 << 64))
def test_listing_from_any_offset_gives_a_tail_of_the_listing(names: set[bytes], offset: int) -> None:
    data, _ = _directory_blocks(sorted(names), 4096)
    directory = Directory(memoryview(data), "x", 1 << 40, len(data), 0, 0, 4096, len(names))
    listed = list(directory.entries(0))
    tail = list(directory.entries(offset))
    assert tail == listed[len(listed) - len(tail) :]
    assert all(entry.next_offset > offset for entry in tail)


@given(data=st.binary(max_size=1500), block=st.sampled_from((512, 4096)), offset=st.integers(0, 2000), name=st.binary())
def test_directory_of_random_bytes_ends_or_is_refused(data: bytes, block: int, offset: int, name: bytes) -> None:
    directory = Directory(memoryview(data), "x", 5, len(data), 0, 0, block, 100)
    listed: list[DirEntry] = []
    try:
        listed += directory.entries(offset)
        directory.find(name)
    except FormatError as error:
        assert error.field.startswith("dirent.")
    assert len(listed) <= len(data) // 12


PREFIXES = {1: b"user.", 2: b"system.posix_acl_access", 3: b"system.posix_acl_default", 4: b"trusted.", 6: b"security."}


def _xattr_area(entries: list[tuple[int, bytes, bytes]]) -> bytes:
    area = bytes(12)
    for index, suffix, value in entries:
        area += bytes((len(suffix), index)) + len(value).to_bytes(2, "little") + suffix + value
        area += bytes(-len(area) % 4)
    return area


xattr_entries = st.lists(
    st.tuples(st.sampled_from((1, 4, 6)), st.binary(min_size=1, max_size=200).filter(lambda n: 0 not in n), st.binary())
    | st.tuples(st.sampled_from((2, 3)), st.just(b""), st.binary()),
    unique_by=lambda entry: entry[:2],
)


@given(entries=xattr_entries)
def test_xattrs_are_read_back_with_their_full_names(entries: list[tuple[int, bytes, bytes]]) -> None:
    expected = {PREFIXES[index] + suffix: value for index, suffix, value in entries}
    assert read_xattrs(memoryview(_xattr_area(entries)), "x", 1) == expected


@pytest.mark.parametrize(
    ("entries", "field"),
    [
        ([(5, b"x", b"")], "xattr.name_index"),
        ([(0, b"", b"")], "xattr.name_index"),
        ([(1, b"", b"v")], "xattr.name"),
        ([(2, b"more", b"v")], "xattr.name"),
        ([(1, b"a\0b", b"v")], "xattr.name"),
        ([(1, b"n" * 251, b"v")], "xattr.name"),
        ([(1, b"a", b"v"), (1, b"a", b"w")], "xattr.name"),
    ],
)
def test_xattr_that_breaks_a_rule_is_refused(entries: list[tuple[int, bytes, bytes]], field: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_xattrs(memoryview(_xattr_area(entries)), "x", 1)
    assert caught.value.field == field


def test_xattr_longer_than_its_area_is_refused() -> None:
    area = _xattr_area([(1, b"a", b"value")])[:-4]
    with pytest.raises(FormatError) as caught:
        read_xattrs(memoryview(area), "x", 1)
    assert caught.value.field == "xattr.value_size"


def test_shared_xattrs_are_refused() -> None:
    area = bytearray(_xattr_area([(1, b"a", b"value")]))
    area[4] = 1
    with pytest.raises(FormatError) as caught:
        read_xattrs(memoryview(area), "x", 1)
    assert caught.value.field == "xattr.shared_count"


# --- hostile: directories ------------------------------------------------------------------------------------------


def _listed(image: PatchedV6, path: bytes) -> list[DirEntry]:
    return list(image.open().readdir(image.ino(path), 0))


@pytest.mark.parametrize(
    ("field", "at", "form", "value"),
    [
        ("dirent.nameoff", 8, "H", 0),
        ("dirent.nameoff", 8, "H", 13),
        ("dirent.nameoff", 8, "H", 0xFFFC),
        ("dirent.nameoff", 20, "H", 0),
        ("dirent.nameoff", 20, "H", 0xFFFF),
        ("dirent.nid", 0, "Q", 0),
        ("dirent.nid", 24, "Q", 1 << 63),
        ("dirent.file_type", 10, "B", 8),
    ],
)
def test_bad_head_of_an_entry_is_refused(v6: PatchedV6, field: str, at: int, form: str, value: int) -> None:
    v6.put(v6.block_at(b"dup") + at, form, value)
    with pytest.raises(FormatError) as caught:
        _listed(v6, b"dup")
    assert caught.value.field == field


@pytest.mark.parametrize("name", [b"a/", b"a\0b", b"/"])
def test_name_that_is_no_component_of_a_path_is_refused(v6: PatchedV6, name: bytes) -> None:
    at = v6.block_at(b"emptydir")
    names = v6.get(at + 8, "H")
    v6.data[at + names : at + names + 1] = b"\xff"  # "." and ".." become "\xff" and a bad name
    v6.put(at, "QHBB", v6.ino(b"dup"), names, 2, 0)
    stored = v6.get(v6.inode_at(b"emptydir") + 8, "Q") - names - 1
    v6.data[at + names + 1 : at + names + 1 + stored] = name.ljust(stored, b"\xff")[:stored]
    with pytest.raises(FormatError) as caught:
        _listed(v6, b"emptydir")
    assert caught.value.field == "dirent.name"


def test_name_longer_than_255_bytes_is_refused() -> None:
    data, _ = _directory_blocks([b"n" * 256], 4096)
    with pytest.raises(FormatError) as caught:
        list(Directory(memoryview(data), "x", 1, len(data), 0, 0, 4096, 9).entries(0))
    assert caught.value.field == "dirent.name"


def test_name_that_is_there_twice_is_refused() -> None:
    for names in ([b".", b"."], [b"b", b"a"]):
        data, _ = _directory_blocks(names, 4096)
        with pytest.raises(FormatError) as caught:
            list(Directory(memoryview(data), "x", 0, len(data), 0, 0, 4096, 9).entries(0))
        assert caught.value.field == "dirent.name"


def test_directory_inside_itself_ends_the_walk(v6: PatchedV6) -> None:
    at = v6.block_at(b"dup")
    names = [v6.get(at + 12 * i, "Q") for i in range(v6.get(at + 8, "H") // 12)]
    deep = names.index(v6.ino(b"dup/deep"))
    for target in (v6.ino(b""), v6.ino(b"dup")):
        v6.put(at + 12 * deep, "Q", target)
        image = v6.open()
        assert image.lookup(v6.ino(b"dup"), b"deep") == target
        with pytest.raises(FormatError, match="twice"):
            list(walk(image, image.root_ino, 1 << 30))


def test_walk_ends_at_its_limit(v6: PatchedV6) -> None:
    image = v6.open()
    with pytest.raises(FormatError) as caught:
        list(walk(image, image.root_ino, 100))
    assert caught.value.field == "tree"


def test_directory_without_dot_dot_has_no_parent(v6: PatchedV6) -> None:
    at = v6.block_at(b"emptydir")
    v6.data[at + 26] = ord("/")
    with pytest.raises(FormatError) as caught:
        v6.open().parent(v6.ino(b"emptydir"))
    assert caught.value.field == "dirent.name"
