"""Every image of the fixtures, read through its bootstrap alone, shows what its manifest says."""

from __future__ import annotations

import hashlib
import random
import stat
from pathlib import Path

import pytest

from nydusd.codec.compress import decompress
from nydusd.formats.model import TARFS_GRID, Bootstrap, Compressor, DirEntry, Extent
from nydusd.formats.walk import walk
from tests.support import manifest
from tests.support.larger import larger_fixtures
from tests.support.patched import resolve
from tests.support.tree import SMALL, image_names, load, manifest_path, manifest_rows, paths

_ROOTS = [SMALL, *filter(None, [larger_fixtures()])]
IMAGES = [
    pytest.param(root, name, id=f"{root.name}-{name}") for root in _ROOTS for name in image_names(root / "images")
]
BY_NAME = image_names()

NOT_BY_CHUNK_TABLE = ("v6-batch", "v6-encrypt", "v6-targz-ref")
"""Images whose chunks need more than the chunk table to be decoded: batches, keys, gzip contexts."""


class _Contents:
    """Reads files by `extents` and the chunk infos of the bootstrap, without any of the storage code."""

    def __init__(self, bootstrap: Bootstrap, image: Path) -> None:
        self._bootstrap = bootstrap
        self._blobs = [(image / "blobs" / blob.blob_id).read_bytes() for blob in bootstrap.blobs]
        self._chunks = {(chunk.blob_index, chunk.index): chunk for chunk in bootstrap.raw_chunks()}

    def __call__(self, ino: int) -> bytes:
        pieces = self._bootstrap.extents(ino, 0, self._bootstrap.inode(ino).size)
        return b"".join(self._chunk(piece)[piece.offset : piece.offset + piece.length] for piece in pieces)

    def _chunk(self, piece: Extent) -> bytes:
        blob = self._blobs[piece.blob]
        if not piece.chunk_len:
            return blob[piece.uoff : piece.uoff + TARFS_GRID]
        chunk = self._chunks[piece.blob, piece.chunk]
        assert (chunk.uoff, chunk.usize) == (piece.uoff, piece.chunk_len)
        stored = blob[chunk.coff : chunk.coff + chunk.csize]
        if not chunk.flags & 1:
            return stored
        return bytes(decompress(self._bootstrap.blobs[piece.blob].compressor, stored, chunk.usize))


@pytest.mark.parametrize(("root", "name"), IMAGES)
def test_image_shows_its_manifest(root: Path, name: str) -> None:
    bootstrap = load(root / "images" / name)
    expected = manifest.load(manifest_path(name, root))
    read_file = None
    if name in NOT_BY_CHUNK_TABLE:
        for row in expected.values():
            row.pop("sha256", None)
    else:
        read_file = _Contents(bootstrap, root / "images" / name)
    seen = {str(row["path"]): row for row in manifest_rows(bootstrap, read_file)}
    assert manifest.differences(expected, seen) == []


@pytest.mark.parametrize("name", BY_NAME)
def test_each_listed_name_is_found_and_no_other(name: str) -> None:
    bootstrap = load(SMALL / "images" / name)
    for _, ino in paths(bootstrap):
        if not stat.S_ISDIR(bootstrap.inode(ino).mode):
            continue
        listed = {entry.name: entry.ino for entry in bootstrap.readdir(ino, 0)}
        for entry in listed:
            for sought in (entry, entry + b"\x01", entry[:-1], b"!" + entry, entry[:-1] + b"\xff\xff"):
                assert bootstrap.lookup(ino, sought) == listed.get(sought)


@pytest.mark.parametrize("name", BY_NAME)
def test_listing_goes_on_after_any_entry_and_ends(name: str) -> None:
    bootstrap = load(SMALL / "images" / name)
    many = resolve(bootstrap, b"many")
    whole = list(bootstrap.readdir(many, 0))
    assert len(whole) > 200
    assert {b".", b".."} <= {entry.name for entry in whole}
    for position, entry in enumerate(whole, 1):
        assert entry.next_offset > 0
        rest: list[DirEntry] = list(bootstrap.readdir(many, entry.next_offset))
        assert rest == whole[position:]
    assert list(bootstrap.readdir(many, 1 << 63)) == []


@pytest.mark.parametrize("name", BY_NAME)
def test_entry_kinds_and_parents_agree_with_the_inodes(name: str) -> None:
    bootstrap = load(SMALL / "images" / name)
    directories = [ino for _, ino in paths(bootstrap) if stat.S_ISDIR(bootstrap.inode(ino).mode)]
    for ino in directories:
        for entry in bootstrap.readdir(ino, 0):
            mode = bootstrap.inode(entry.ino).mode
            assert entry.kind == stat.S_IFMT(mode) >> 12
            if entry.name == b"..":
                assert bootstrap.parent(ino) == entry.ino
            elif entry.name != b"." and stat.S_ISDIR(mode):
                assert bootstrap.parent(entry.ino) == ino
    assert bootstrap.parent(bootstrap.root_ino) == bootstrap.root_ino


@pytest.mark.parametrize("name", BY_NAME)
def test_extents_of_any_range_are_the_cut_of_those_of_the_whole_file(name: str) -> None:
    bootstrap = load(SMALL / "images" / name)
    choose = random.Random(name)
    for path in (b"sizes/1048577", b"sizes/2M-zero", b"sparse", b"dup/a", b"sizes/4097", b"empty"):
        ino = resolve(bootstrap, path)
        size = bootstrap.inode(ino).size
        whole = _bytes_of(bootstrap.extents(ino, 0, size))
        assert sum(length for _, _, length in whole) == size
        for _ in range(40):
            offset = choose.randrange(size + 4096)
            length = choose.choice((0, 1, 4096, 131072, 1 << 20, 1 << 40))
            end = max(offset, min(size, offset + length))
            assert _bytes_of(bootstrap.extents(ino, offset, length)) == _cut(whole, offset, end)


def _bytes_of(pieces: list[Extent]) -> list[tuple[int, int, int]]:
    """(blob, address, length) of pieces, with neighbours merged."""
    merged: list[tuple[int, int, int]] = []
    for piece in pieces:
        assert piece.length > 0
        at = piece.uoff + piece.offset
        if merged and merged[-1][0] == piece.blob and merged[-1][1] + merged[-1][2] == at:
            merged[-1] = (piece.blob, merged[-1][1], merged[-1][2] + piece.length)
        else:
            merged.append((piece.blob, at, piece.length))
    return merged


def _cut(whole: list[tuple[int, int, int]], begin: int, end: int) -> list[tuple[int, int, int]]:
    cut = []
    start = 0
    for blob, at, length in whole:
        first, last = max(begin, start), min(end, start + length)
        if first < last:
            cut.append((blob, at + first - start, last - first))
        start += length
    return cut


def test_tarfs_extents_are_pieces_of_the_grid() -> None:
    bootstrap = load(SMALL / "images" / "v6-tarfs")
    pieces = bootstrap.extents(resolve(bootstrap, b"sizes/2M-zero"), 0, 1 << 30)
    assert len(pieces) > 2, "the file does not begin at a border of the grid"
    for piece in pieces:
        assert piece.uoff == piece.chunk * TARFS_GRID
        assert piece.offset + piece.length <= TARFS_GRID
        assert piece.chunk_len == 0


def test_tarfs_symlink_longer_than_a_block_is_read_whole() -> None:
    bootstrap = load(SMALL / "images" / "v6-tarfs")
    assert bootstrap.readlink(resolve(bootstrap, b"long-symlink")) == b"x" * 4000


def test_contiguous_file_has_an_address_for_each_chunk_whatever_its_header_says() -> None:
    bootstrap = load(SMALL / "images" / "v6-zstd-blake3")
    pieces = bootstrap.extents(resolve(bootstrap, b"sizes/1048577"), 0, 1 << 30)
    assert [(piece.length, piece.chunk_len) for piece in pieces] == [(1 << 20, 1 << 20), (1, 1)]


def test_prefetch_table_names_the_paths_given_to_the_builder() -> None:
    bootstrap = load(SMALL / "images" / "v6-prefetch")
    assert sorted(bootstrap.prefetch_inodes()) == sorted(resolve(bootstrap, path) for path in (b"sizes", b"dup/a"))


@pytest.mark.parametrize("name", BY_NAME)
def test_walk_gives_each_regular_file_once(name: str) -> None:
    bootstrap = load(SMALL / "images" / name)
    files = list(walk(bootstrap, bootstrap.root_ino, 10_000))
    assert len(files) == len(set(files))
    assert set(files) == {ino for _, ino in paths(bootstrap) if stat.S_ISREG(bootstrap.inode(ino).mode)}
    single = resolve(bootstrap, b"dup/a")
    assert list(walk(bootstrap, single, 0)) == [single]
    assert list(walk(bootstrap, resolve(bootstrap, b"sym-link"), 10)) == []


def test_v5_chunk_infos_come_once_for_a_hard_link_and_their_digests_hold() -> None:
    image = SMALL / "images" / "v5-lz4-sha256"
    bootstrap = load(image)
    chunks = list(bootstrap.raw_chunks())
    files = [bootstrap.inode(ino) for ino in {ino for _, ino in paths(bootstrap)}]
    assert len(chunks) == sum((f.size + (1 << 20) - 1) >> 20 for f in files if stat.S_ISREG(f.mode))
    blob = (image / "blobs" / bootstrap.blobs[0].blob_id).read_bytes()
    for chunk in chunks:
        data = blob[chunk.coff : chunk.coff + chunk.csize]
        if chunk.flags & 1:
            data = bytes(decompress(Compressor.LZ4_BLOCK, data, chunk.usize))
        assert hashlib.sha256(data).digest() == chunk.digest


def test_v6_superblock_facts_have_the_reference_keys_in_its_order() -> None:
    facts = load(SMALL / "images" / "v6-prefetch").superblock_facts()
    assert " ".join(facts) == (
        "magic version sb_size root_inode chunk_size batch_size inodes_count flags inode_table_entries "
        "inode_table_offset blob_table_size blob_table_offset extended_blob_table_offset extended_blob_table_entries "
        "blob_device_table_count blob_device_table_offset prefetch_table_offset prefetch_table_entries attr_timeout "
        "entry_timeout is_chunk_dict meta_blkaddr root_nid chunk_table_offset chunk_table_size"
    )
    assert facts["magic"] == 3774210530
    assert facts["version"] == 1536
    assert facts["flags"] == {"bits": 0x10000B4}
    assert (facts["prefetch_table_offset"], facts["prefetch_table_entries"]) == (4352, 2)
    assert facts["attr_timeout"] == {"secs": 4294967296, "nanos": 0}
    assert (facts["meta_blkaddr"], facts["root_nid"], facts["blob_device_table_count"]) == (2, 128, 1)


def test_v5_superblock_facts_have_the_same_keys() -> None:
    facts = load(SMALL / "images" / "v5-lz4-sha256").superblock_facts()
    assert list(facts) == list(load(SMALL / "images" / "v6-prefetch").superblock_facts())
    assert (facts["magic"], facts["version"], facts["sb_size"]) == (0x52414653, 0x500, 8192)
    assert (facts["inode_table_entries"], facts["blob_table_size"], facts["extended_blob_table_entries"]) == (
        388,
        72,
        1,
    )
