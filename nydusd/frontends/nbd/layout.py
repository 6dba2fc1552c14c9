"""Where things are on the disk that a v6 image is: its metadata first, then each blob, uncompressed, at the block that the
device table says. What belongs to nothing reads as zeros. Pure.

Old builders wrote no block addresses: then blobs are laid out here, and the table that is exported tells of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from nydusd.errors import FormatError

_SUPER, _BITS, _DEVICES = 1024, 12, 86
_SLOTS, _SLOT = 1408, 128
_ADDRESS = Struct("<II")
"""Blocks and first block, at byte 64 of a slot."""
_ADDRESS_AT = 64
_U16 = Struct("<H")
_GRID = 512 << 10
"""To which blobs are aligned where the image says nothing."""
_BLOCK_MOST = (1 << 32) - 1
_INSTEAD = "use `nydusd fuse`"


class Piece(NamedTuple):
    """`length` bytes from `start` of the metadata (`blob` -1), of a blob, or of nothing (-2)."""

    blob: int
    start: int
    length: int


METADATA, NOTHING = -1, -2


def places_of(metadata: memoryview, sizes: Sequence[int], where: str) -> list[tuple[int, int, int]]:
    """Where on the disk each blob begins, where it ends, and its number: in the order of the disk.

    `sizes`: bytes of each blob, in the order of the table. Raises FormatError for blobs that overlap or have no room.
    """
    block = 1 << metadata[_SUPER + _BITS]
    (devices,) = _U16.unpack_from(metadata, _SUPER + _DEVICES)
    if block not in (512, 4096) or devices != len(sizes):
        raise FormatError(where, "device table", f"{devices} blobs in blocks of {block}, {len(sizes)} expected")
    blocks = [_ADDRESS.unpack_from(metadata, at)[1] for at in _slots(devices)]
    if 0 in blocks:
        blocks = _lay_out(len(metadata), block, sizes)
    places = sorted((first * block, first * block + sizes[index], index) for index, first in enumerate(blocks))
    end = len(metadata)
    for start, stop, index in places:
        field = f"devices[{index}].mapped_blkaddr"
        if start < end:
            raise FormatError(where, field, f"{start} is within what ends at {end}: this is no disk, {_INSTEAD}")
        if start // block > _BLOCK_MOST:
            raise FormatError(
                where, field, f"the blobs before it end at {end}, a disk has 2^32 blocks of {block}: {_INSTEAD}"
            )
        end = stop
    return places


def _slots(devices: int) -> range:
    return range(_SLOTS + _ADDRESS_AT, _SLOTS + _ADDRESS_AT + _SLOT * devices, _SLOT)


def _lay_out(end: int, block: int, sizes: Sequence[int]) -> list[int]:
    """The first block of each blob where the image says nothing. `end`: that of the metadata."""
    blocks = []
    for size in sizes:
        start = -(-end // _GRID) * _GRID
        blocks.append(start // block)
        end = start + size
    return blocks


class Layout:
    """The disk. `metadata` are the image's first bytes, as they are to be read; `size` its length, whole blocks of `block`."""

    def __init__(self, metadata: memoryview, sizes: Sequence[int], where: str) -> None:
        """Arguments and errors: see `places_of`."""
        self._places = places_of(metadata, sizes, where)
        self.block = 1 << metadata[_SUPER + _BITS]
        end = max([len(metadata), *(stop for _, stop, _ in self._places)])
        self.size = -(-end // self.block) * self.block
        self.metadata = self._told(metadata)

    def _told(self, metadata: memoryview) -> memoryview:
        """The metadata, or a copy of them that says where the blobs are if they do not."""
        slots = _slots(len(self._places))
        if all(_ADDRESS.unpack_from(metadata, at)[1] for at in slots):
            return metadata
        copy = bytearray(metadata)
        for start, _, index in self._places:
            _ADDRESS.pack_into(copy, slots[index], _ADDRESS.unpack_from(copy, slots[index])[0], start // self.block)
        return memoryview(bytes(copy))

    def pieces(self, offset: int, length: int) -> list[Piece]:
        """What a range of the disk is made of, in order. The range must be within `size`."""
        found: list[Piece] = []
        end = offset + length
        for start, stop, blob in ((0, len(self.metadata), METADATA), *self._places):
            if start >= end or stop <= offset:
                continue
            if start > offset:
                found.append(Piece(NOTHING, 0, start - offset))
                offset = start
            upto = min(stop, end)
            found.append(Piece(blob, offset - start, upto - offset))
            offset = upto
        if offset < end:
            found.append(Piece(NOTHING, 0, end - offset))
        return found
