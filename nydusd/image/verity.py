"""dm-verity data of a disk image: the digests of its blocks, and of the blocks of those digests, up to one.

Runs in the process of the command. The layout is the kernel's (hash version 1, sha256, no salt, blocks of 4 KiB that end
with zeros), the uppermost level first. Everything goes through the file, so memory does not grow with the image.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Protocol

HASH_BLOCK = 4096
_DIGEST = 32
_PIECE = 1 << 20


class Disk(Protocol):
    """The file: bytes are read from, and put at, any place of it."""

    def read(self, at: int, size: int) -> bytes: ...
    def put(self, at: int, data: bytes | memoryview) -> None: ...


class Verity(NamedTuple):
    """What a mount needs: the block size and number of data blocks, where the digests begin, the digest of all, and
    the length of the file with them. Bytes."""

    block: int
    blocks: int
    offset: int
    root: str
    size: int

    def options(self) -> str:
        """Options of `veritysetup open`, in the words in which callers of the reference look for them."""
        return (
            f'--no-superblock --format=1 -s "" --hash=sha256 --data-block-size={self.block} '
            f"--hash-block-size={HASH_BLOCK} --data-blocks {self.blocks} --hash-offset {self.offset} {self.root}"
        )


def add_verity(disk: Disk, size: int, block: int) -> Verity:
    """Put the digests behind the `size` bytes of the disk, a whole number of blocks."""
    blocks = size // block
    begin = -(-size // HASH_BLOCK) * HASH_BLOCK
    levels = _levels(blocks)
    places, at = [], begin
    for count in reversed(levels):
        places.append(at)
        at += count * HASH_BLOCK
    source, unit, count = 0, block, blocks
    for place in reversed(places):
        count = _hash_level(disk, source, unit, count, place)
        source, unit = place, HASH_BLOCK
    return Verity(block, blocks, begin, hashlib.sha256(disk.read(source, unit)).hexdigest(), at)


def _levels(blocks: int) -> list[int]:
    """How many blocks of digests each level has, that of the data's digests first."""
    levels = []
    while blocks > 1:
        blocks = -(-blocks * _DIGEST // HASH_BLOCK)
        levels.append(blocks)
    return levels


def _hash_level(disk: Disk, source: int, unit: int, count: int, place: int) -> int:
    """Write the digests of `count` blocks of `unit` bytes to `place`; the number of blocks that they fill."""
    zeros = bytes(unit)
    of_zeros = hashlib.sha256(zeros).digest()
    step = _PIECE // unit
    for first in range(0, count, step):
        some = min(step, count - first)
        data = memoryview(disk.read(source + first * unit, some * unit))
        digests = bytearray()
        for at in range(0, some * unit, unit):
            part = data[at : at + unit]
            digests += of_zeros if part == zeros else hashlib.sha256(part).digest()
        disk.put(place + first * _DIGEST, bytes(digests))
    filled = -(-count * _DIGEST // HASH_BLOCK)
    disk.put(place + count * _DIGEST, bytes(filled * HASH_BLOCK - count * _DIGEST))
    return filled
