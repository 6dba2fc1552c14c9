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
_SIZE_MOST = 1 << 62


class Piece(NamedTuple):
    """`length` bytes from `start` of the metadata (`blob` -1), of a blob, or of nothing (-2)."""

    blob: int
    start: int
    length: int


METADATA, NOTHING = -1, -2


class Layout:
    """The disk. `metadata` are the image's first bytes, as they are to be read; `size` its length, whole blocks of `block`."""

    def __init__(self, metadata: memoryview, sizes: Sequence[int], where: str) -> None:
        """`sizes`: bytes of each blob, in the order of the table. Raises FormatError for blobs that overlap."""
        self.block = 1 << metadata[_SUPER + _BITS]
        self.metadata = metadata
        (devices,) = _U16.unpack_from(metadata, _SUPER + _DEVICES)
        if self.block not in (512, 4096) or devices != len(sizes):
            raise FormatError(
                where, "device table", f"{devices} blobs in blocks of {self.block}, {len(sizes)} expected"
            )
        slots = [_SLOTS + _SLOT * i + _ADDRESS_AT for i in range(devices)]
        starts = [_ADDRESS.unpack_from(metadata, at)[1] * self.block for at in slots]
        if any(start == 0 for start in starts):
            starts = self._lay_out(slots, sizes)
        ends = [start + -(-size // self.block) * self.block for start, size in zip(starts, sizes, strict=True)]
        self._places = sorted(
            (start, start + size, index) for index, (start, size) in enumerate(zip(starts, sizes, strict=True))
        )
        end = len(metadata)
        for start, stop, index in self._places:
            if start < end:
                raise FormatError(where, f"devices[{index}].mapped_blkaddr", f"{start} is within what ends at {end}")
            end = stop
        self.size = -(-max([len(metadata), *ends]) // self.block) * self.block
        if self.size > _SIZE_MOST:
            raise FormatError(where, "device table", f"a disk of {self.size} bytes is too large")

    def _lay_out(self, slots: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Give each blob a place behind the one before, and write that into a copy of the metadata."""
        copy = bytearray(self.metadata)
        starts, end = [], len(copy)
        for at, size in zip(slots, sizes, strict=True):
            start = -(-end // _GRID) * _GRID
            _ADDRESS.pack_into(copy, at, _ADDRESS.unpack_from(copy, at)[0], start // self.block)
            starts.append(start)
            end = start + size
        self.metadata = memoryview(bytes(copy))
        return starts

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
