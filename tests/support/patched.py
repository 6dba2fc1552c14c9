"""Bootstraps of the small fixtures with bytes changed at named places, to see what the parsers say about them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from struct import calcsize, pack, unpack_from

from nydusd.formats.model import Bootstrap
from nydusd.formats.rafs_v5 import RafsV5
from nydusd.formats.rafs_v6 import RafsV6
from tests.support.tree import SMALL, bootstrap_bytes

WHERE = "image.boot"


@cache
def original(image: str) -> tuple[bytes, str | None, bool]:
    """What `bootstrap_bytes` gives for an image of the small set."""
    return bootstrap_bytes(SMALL / "images" / image)


def all_calls(image: Bootstrap, ino: int) -> list[Callable[[], object]]:
    """Each call by which an inode is looked at."""
    return [
        lambda: image.inode(ino),
        lambda: image.readlink(ino),
        lambda: image.xattrs(ino),
        lambda: image.extents(ino, 0, 4096),
        lambda: image.lookup(ino, b"x"),
        lambda: image.readdir(ino, 0),
        lambda: image.parent(ino),
    ]


def resolve(bootstrap: Bootstrap, path: bytes) -> int:
    """The ino of a path below the root, "" for the root itself."""
    ino = bootstrap.root_ino
    for name in path.split(b"/") if path else ():
        found = bootstrap.lookup(ino, name)
        assert found is not None, path
        ino = found
    return ino


class _Patched:
    def __init__(self, image: str) -> None:
        self.data = bytearray(original(image)[0])

    def get(self, at: int, form: str) -> int:
        value: int = unpack_from("<" + form, self.data, at)[0]
        return value

    def put(self, at: int, form: str, *values: object) -> None:
        self.data[at : at + calcsize("<" + form)] = pack("<" + form, *values)


class PatchedV6(_Patched):
    """A v6 bootstrap. `ino` and `inode_at` look into the original."""

    def __init__(self, image: str = "v6-zstd-blake3") -> None:
        super().__init__(image)
        self._original = RafsV6(memoryview(bytes(self.data)), WHERE)
        self.block = 512 if image == "v6-tarfs" else 4096

    def open(self, path_id: str | None = None, *, extracted: bool = False) -> RafsV6:
        return RafsV6(memoryview(self.data), WHERE, path_id, extracted=extracted)

    def ino(self, path: bytes) -> int:
        return resolve(self._original, path)

    def nid_at(self, nid: int) -> int:
        """Where the inode with this nid is."""
        return self.get(1024 + 40, "I") * self.block + nid * 32

    def inode_at(self, path: bytes) -> int:
        return self.nid_at(self.ino(path))

    def body_at(self, path: bytes) -> int:
        """What follows the inode and its xattrs: the inline last block, or the chunk addresses."""
        at = self.inode_at(path)
        assert self.get(at, "H") & 1, "every inode of the fixtures is an extended one"
        count = self.get(at + 2, "H")
        return at + 64 + (8 + 4 * count if count else 0)

    def addresses_at(self, path: bytes) -> int:
        return (self.body_at(path) + 7) & ~7

    def block_at(self, path: bytes) -> int:
        """The first block of a directory or symlink."""
        at = self.inode_at(path)
        if self.get(at, "H") >> 1 == 2 and self.get(at + 8, "Q") <= self.block:
            return self.body_at(path)
        return self.get(at + 16, "I") * self.block


class PatchedV5(_Patched):
    """A v5 bootstrap."""

    def __init__(self, image: str = "v5-zstd-blake3") -> None:
        super().__init__(image)
        self._original = RafsV5(memoryview(bytes(self.data)), WHERE)

    def open(self, path_id: str | None = None, *, extracted: bool = False) -> RafsV5:
        return RafsV5(memoryview(self.data), WHERE, path_id, extracted=extracted)

    def ino(self, path: bytes) -> int:
        return resolve(self._original, path)

    def slot_at(self, slot: int) -> int:
        """Where the record of a slot of the inode table is."""
        return self.get(self.get(32, "Q") + 4 * (slot - 1), "I") << 3

    def record_at(self, path: bytes) -> int:
        return self.slot_at(self.ino(path))

    def after_name(self, path: bytes) -> int:
        """What follows the name: symlink target, xattrs or chunk infos."""
        at = self.record_at(path)
        return at + 128 + ((self.get(at + 100, "H") + 7) & ~7)
