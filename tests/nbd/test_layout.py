"""Where an image's blobs are on the disk that is exported."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from nydusd.errors import FormatError
from nydusd.frontends.nbd.layout import METADATA, NOTHING, Layout, Piece

BLOCK = 4096
MOST = 1 << 44
"""Bytes that the blob table may give a blob."""


def metadata(addresses: Sequence[int], block: int = BLOCK) -> memoryview:
    """8192 bytes that name the first block of each blob."""
    raw = bytearray(8192)
    raw[1024 + 12] = block.bit_length() - 1
    struct.pack_into("<H", raw, 1024 + 86, len(addresses))
    for index, address in enumerate(addresses):
        struct.pack_into("<II", raw, 1408 + 128 * index + 64, 5, address)
    return memoryview(bytes(raw))


def test_blobs_may_be_in_any_order_and_what_is_between_belongs_to_nothing() -> None:
    disk = Layout(metadata([4, 2]), [5000, 4096], "boot")
    assert disk.size == 6 * BLOCK
    assert disk.pieces(0, disk.size) == [
        Piece(METADATA, 0, 8192),
        Piece(1, 0, 4096),
        Piece(NOTHING, 0, 4096),
        Piece(0, 0, 5000),
        Piece(NOTHING, 0, 3192),
    ]


def test_where_no_address_is_known_the_exported_metadata_say_what_was_chosen() -> None:
    disk = Layout(metadata([0, 0]), [5000, 4096], "boot")
    told = [struct.unpack_from("<II", disk.metadata, 1408 + 128 * index + 64) for index in range(2)]
    assert told == [(5, 128), (5, 256)]
    assert disk.pieces(128 * BLOCK, 4096) == [Piece(0, 0, 4096)]
    assert disk.pieces(256 * BLOCK, 4096) == [Piece(1, 0, 4096)]


@pytest.mark.parametrize(
    ("addresses", "sizes", "block", "field"),
    [
        ([1], [4096], BLOCK, r"devices\[0\].mapped_blkaddr: 4096 is within what ends at 8192"),
        ([2, 3], [4097, 4096], BLOCK, r"devices\[1\].mapped_blkaddr: 12288 is within what ends at 12289"),
        ([3, 2], [4096, MOST], BLOCK, r"devices\[0\].mapped_blkaddr"),
        ([0, 0], [MOST, 4096], BLOCK, r"devices\[1\].mapped_blkaddr: the blobs before it end at"),
        ([0, 0, 0], [4096, MOST, 4096], 512, r"devices\[2\].mapped_blkaddr: the blobs before it end at"),
    ],
)
def test_blobs_that_are_no_disk_are_refused(addresses: list[int], sizes: list[int], block: int, field: str) -> None:
    with pytest.raises(FormatError, match=f"^boot: {field}.*: .*use `nydusd fuse`"):
        Layout(metadata(addresses, block), sizes, "boot")
