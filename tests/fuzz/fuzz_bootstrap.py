"""Mutations of bootstraps: each must be refused with `FormatError` or be read in bounded steps, with answers in bounds.

`run(seed, iterations)` is the whole interface; it needs the packed images in tests/data. A mutation goes where it
hurts (superblocks, tables, an inode and what follows it, the heads of a directory), and what is read afterwards
begins with the inode that was changed.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from nydusd.errors import FormatError
from nydusd.formats import open_bootstrap
from nydusd.formats.model import Bootstrap, DirEntry
from nydusd.formats.walk import walk
from tests.support.patched import PatchedV5, PatchedV6, original
from tests.support.tree import SMALL, image_names, load, paths

_NUMBERS = (0, 1, 2, 7, 11, 12, 0x7F, 0x80, 0xFF, 0x1FF, 0xFFF, 4096, 0x7FFF, 0xFFFF, 1 << 24, 0x7FFFFFFF, 0xFFFFFFFF)
_LARGE = ((1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1, 1 << 40, 1 << 44)
_S_IFMT, _S_IFDIR, _S_IFREG, _S_IFLNK = 0xF000, 0x4000, 0x8000, 0xA000
_WALK_LIMIT = 40
_V5_HEAD, _V6_HEAD = 8192 + 256, 4096 + 512


class Site(NamedTuple):
    """A range of bytes worth changing, and the inode that it belongs to (0: none)."""

    begin: int
    end: int
    ino: int


class Base(NamedTuple):
    """An image to mutate."""

    name: str
    data: bytes
    version: int
    inos: list[int]
    names: list[bytes]
    tables: list[Site]
    inodes: list[Site]


@functools.cache
def _base(name: str) -> Base:
    data = original(name)[0]
    bootstrap = load(SMALL / "images" / name)
    found = list(paths(bootstrap))
    inos = sorted({ino for _, ino in found})
    place: Callable[[int], int]
    if bootstrap.version == 6:
        v6 = PatchedV6(name)
        place, record, step = v6.nid_at, 64, 512
        chunk_table = v6.get(1152 + 24, "Q")
        tables = [Site(1024, 1536, 0), Site(4096, _V6_HEAD, 0), Site(chunk_table, chunk_table + 800, 0)]
    else:
        v5 = PatchedV5(name)
        place, record, step = v5.slot_at, 136, 400
        tables = [Site(0, 80, 0), Site(8192, 8192 + 1552, 0), Site(v5.get(48, "Q"), v5.get(72, "Q") + 64, 0)]
    inodes = []
    for ino in inos:
        at = place(ino)
        inodes += [Site(at, at + record, ino)] * 2 + [Site(at + record, min(at + record + step, len(data)), ino)]
        inode = bootstrap.inode(ino)
        if bootstrap.version == 6 and inode.mode & _S_IFMT == _S_IFDIR and inode.size > 4096:
            block = PatchedV6(name).get(at + 16, "I") * (512 if name == "v6-tarfs" else 4096)
            inodes += [Site(block, block + 2048, ino)] * 20
    names = [path.rpartition(b"/")[2] for path, _ in found]
    return Base(name, data, bootstrap.version, inos, names, tables, inodes)


def mutate(rng: random.Random, base: Base) -> tuple[bytearray, list[int]]:
    """A changed copy of the image, and the inodes whose bytes were changed."""
    data = bytearray(base.data)
    touched: list[int] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        site = rng.choice(base.tables if rng.random() < 0.15 else base.inodes)
        touched.append(site.ino)
        at = rng.randrange(site.begin, site.end)
        kind = rng.random()
        if kind < 0.2:
            data[at] ^= 1 << rng.randrange(8)
        elif kind < 0.75:
            width = rng.choice((1, 2, 4, 8))
            at -= (at - site.begin) % width
            number = _number(rng, base, int.from_bytes(data[at : at + width], "little"))
            data[at : at + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        elif kind < 0.9:  # one record over another: links, cycles, another type of file
            source = rng.choice(base.inodes)
            length = rng.choice((8, 12, 32, site.end - site.begin))
            data[site.begin : site.begin + length] = data[source.begin : source.begin + length]
        elif kind < 0.95:
            data[at : at + rng.randrange(1, 200)] = rng.randbytes(rng.randrange(1, 200))
        else:
            del data[_cut(rng, len(data)) :]
            break
    return data, [ino for ino in touched if ino]


def _number(rng: random.Random, base: Base, old: int) -> int:
    kind = rng.randrange(6)
    if kind == 0:
        return old + rng.choice((-12, -8, -1, 1, 8, 12))
    if kind == 1:
        return rng.choice(base.inos)
    if kind == 2:
        return rng.choice(_LARGE)
    if kind == 3:
        return (len(base.data) + rng.choice((-64, -32, -8, -1, 0, 1, 8))) // rng.choice((1, 8, 32, 512, 4096))
    return rng.choice(_NUMBERS)


def _cut(rng: random.Random, size: int) -> int:
    at = rng.randrange(size)
    return at - at % rng.choice((1, 8, 512, 4096))


class Reader:
    """Reads a mutated image as front ends and workers would, and checks that every answer is within its bounds."""

    def __init__(self, image: Bootstrap, size: int, rng: random.Random, base: Base) -> None:
        self._image = image
        self._rng = rng
        self._base = base
        # An entry takes 12 bytes at least (v6) or a slot of 4 (v5); "." and ".." of v5 are not stored.
        self._most_entries = size // (12 if image.version == 6 else 4) + 2
        self.counts: Counter[str] = Counter()

    def read(self, touched: list[int]) -> None:
        image, rng = self._image, self._rng
        inos = [*touched, image.root_ino, *(rng.choice(self._base.inos) for _ in range(3)), rng.choice(_LARGE)]
        for ino in inos:
            for call in (self._inode, self._xattrs, self._directory, self._parent, self._symlink, self._file):
                self._guarded(call, ino)
        self._guarded(self._walk, rng.choice((image.root_ino, *touched)))
        self._guarded(self._tables, 0)

    def _guarded(self, call: Callable[[int], None], ino: int) -> None:
        try:
            call(ino)
            self.counts["answers"] += 1
        except FormatError as error:
            assert error.where and error.field and error.message
            self.counts["refused calls"] += 1

    def _inode(self, ino: int) -> None:
        inode = self._image.inode(ino)
        assert inode.ino == ino
        assert inode.nlink > 0
        assert 0 <= inode.size < 1 << 63

    def _xattrs(self, ino: int) -> None:
        for name, value in self._image.xattrs(ino).items():
            assert 0 < len(name) <= 255
            assert b"\0" not in name
            assert len(value) <= len(self._base.data) * 2

    def _directory(self, ino: int) -> None:
        offset = self._rng.choice((0, 0, 1, 12, 4096, self._rng.randrange(20_000), 1 << 63))
        steps = 0
        last = offset
        for entry in islice(self._image.readdir(ino, offset), self._most_entries + 1):
            steps += 1
            _check_entry(entry, last)
            last = entry.next_offset
        assert steps <= self._most_entries, "a directory has more entries than there is room for"
        for name in (self._rng.choice(self._base.names), b"..", b"\xff" * 300, b""):
            found = self._image.lookup(ino, name)
            assert found is None or found >= 0

    def _parent(self, ino: int) -> None:
        assert self._image.parent(ino) >= 0

    def _symlink(self, ino: int) -> None:
        target = self._image.readlink(ino)
        assert 0 < len(target) <= 4096
        assert b"\0" not in target

    def _file(self, ino: int) -> None:
        size = self._image.inode(ino).size
        for offset, length in ((0, 131072), (self._rng.randrange(size + 2), 1 << 21), (size - 1, 4096), (size, 1)):
            wanted = max(0, min(size, offset + length) - offset) if offset >= 0 else 0
            pieces = self._image.extents(ino, offset, length)
            assert sum(piece.length for piece in pieces) == wanted
            for piece in pieces:
                blob = self._image.blobs[piece.blob]
                assert piece.blob >= 0
                assert piece.length > 0
                assert piece.offset >= 0
                assert not piece.chunk_len or piece.offset + piece.length <= piece.chunk_len
                if blob.chunk_count:
                    limit = (blob.uncompressed_size + 4095) & ~4095
                    assert piece.uoff + piece.offset + piece.length <= limit

    def _walk(self, ino: int) -> None:
        files: Iterator[int] = walk(self._image, ino, _WALK_LIMIT)
        assert sum(1 for _ in islice(files, _WALK_LIMIT + 2)) <= _WALK_LIMIT + 1

    def _tables(self, _: int) -> None:
        assert self._image.superblock_facts()["magic"] in (0x52414653, 0xE0F5E1E2)
        assert all(ino > 0 for ino in self._image.prefetch_inodes())
        for chunk in islice(self._image.raw_chunks(), 40):
            assert chunk.blob_index < len(self._image.blobs)


def _check_entry(entry: DirEntry, last: int) -> None:
    assert 0 < len(entry.name) <= 255
    assert b"/" not in entry.name
    assert b"\0" not in entry.name
    assert entry.ino >= 0
    assert 0 <= entry.kind <= 12
    assert entry.next_offset > last


def run(seed: int, iterations: int) -> dict[str, int]:
    """Parse and read `iterations` mutated bootstraps. Raises AssertionError, naming seed and iteration, for the first
    that comes out wrong; else counts what came of them."""
    counts: Counter[str] = Counter()
    images = image_names()
    for iteration in range(iterations):
        rng = random.Random(f"{seed}/{iteration}")
        base = _base(images[iteration % len(images)])
        data, touched = mutate(rng, base)
        counts["inputs"] += 1
        try:
            try:
                image = open_bootstrap(memoryview(data), base.name)
            except FormatError as error:
                assert error.where == base.name and error.field and error.message
                counts["refused when opened"] += 1
                continue
            reader = Reader(image, len(data), rng, base)
            reader.read(touched)
            counts.update(reader.counts)
        except Exception as error:
            raise AssertionError(f"seed {seed}, iteration {iteration}, image {base.name}: {error!r}") from error
    return dict(counts)
