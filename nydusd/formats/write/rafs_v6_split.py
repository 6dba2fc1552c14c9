"""A copy of a v6 image's metadata in which each blob is several devices: ranges of it, that the kernel reads as files of
their own.

All devices of a blob are the same file, and all addresses stay: only which device a chunk is said to be on is another. So
whoever mounts the copy can tell by the file that is read which range is meant, and have each range watched by itself. Of no
use to anybody but the kernel: the upper bits of chunk numbers, which it does not know, make room for the numbers of devices.

Pure. A range begins with a chunk, and no chunk reaches beyond the end of its range.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from nydusd.errors import FormatError
from nydusd.formats.model import NAME_LEAST
from nydusd.formats.rafs_v6 import RafsV6
from nydusd.formats.rafs_v6_super import SLOT_SIZE, SLOTS_OFFSET, V6Super, read_super
from nydusd.formats.walk import walk

_DEVICES = Struct("<HH")
"""Number of devices, and where their table is, in units of a slot; at byte 86 of the superblock."""
_DEVICES_AT = 1024 + 86
_TABLE_MOST = 0xFFFF * SLOT_SIZE
_SLOT = Struct("<64sII56x")
_CHUNK = Struct("<HHI")
_HEADER = Struct("<I")
_INDEXED = 0x20
INODES_MOST = 200_000
"""Images with more are left as they are: each file costs about ten microseconds."""


class Split(NamedTuple):
    """`metadata` is the copy. `cuts`: of each blob, where its ranges begin; its devices follow those of the blob before it.

    `listed`: of each blob, whether the chunk table has each chunk that a file refers to.
    """

    metadata: bytes
    cuts: list[list[int]]
    listed: list[bool]


def split_devices(buf: memoryview, image: RafsV6, where: str, least: int, most: int) -> Split | None:
    """Ranges of about `least` bytes or more, `most` at most in all; None for an image that cannot be split, or need not be.

    Raises FormatError for metadata that breaks the format.
    """
    top = read_super(buf, where)
    sizes = [blob.uncompressed_size for blob in image.blobs]
    if top.tarfs or top.inodes > INODES_MOST or not any(size > least for size in sizes):
        return None
    if len(buf) > _TABLE_MOST:
        most = min(most, _room(top))
    if most < 2 * len(sizes):
        return None
    arrays, ends = _references(image, top, where)
    least = max(least, -(-sum(sizes) // (most - len(sizes))))
    cuts = [_cut(of_blob, least) for of_blob in ends]
    copy = bytearray(buf)
    bases, count = [], 1
    for of_blob in cuts:
        bases.append(count)
        count += len(of_blob)
    exponent = (top.chunk_size.bit_length() - 1) - (top.block.bit_length() - 1)
    for (header, array), addresses in arrays:
        _HEADER.pack_into(copy, header, _INDEXED | exponent)
        for number, (blob, _, start) in enumerate(addresses):
            at = array + number * _CHUNK.size
            device = bases[blob] + bisect_right(cuts[blob], start) - 1
            _CHUNK.pack_into(copy, at, 0, device, start // top.block)
    return Split(_with_table(copy, cuts, count - 1, where), cuts, _are_listed(image, ends, top.block))


def are_listed(buf: memoryview, image: RafsV6, where: str) -> list[bool]:
    """The same as `Split.listed`, of any image, for about ten microseconds a file. Raises FormatError.

    The chunks of a tar are a grid of ours: they are all of it.
    """
    top = read_super(buf, where)
    if top.tarfs:
        return [True] * len(image.blobs)
    _, ends = _references(image, top, where)
    return _are_listed(image, ends, top.block)


def _references(
    image: RafsV6, top: V6Super, where: str
) -> tuple[list[tuple[tuple[int, int], list[tuple[int, int, int]]]], list[dict[int, int]]]:
    """Of each file, where its chunks are told of, and their addresses; of each blob, from where to where chunks are read."""
    arrays = []
    ends: list[dict[int, int]] = [{} for _ in image.blobs]
    room = image.length // _CHUNK.size
    for ino in walk(image, image.root_ino, min(2 * top.inodes + 2, image.length // NAME_LEAST), where):
        size = image.inode(ino).size
        if not size:
            continue
        room -= -(-size // top.chunk_size)
        if room < 0:
            raise FormatError(
                where, "inode.size", f"inode {ino}: more chunk addresses than there is room for: files share them"
            )
        arrays.append((image.places(ino), addresses := image.chunk_addresses(ino)))
        left = size
        for blob, _, start in addresses:
            end = start + -(-min(top.chunk_size, left) // top.block) * top.block
            left -= top.chunk_size
            ends[blob][start] = max(end, ends[blob].get(start, 0))
    return arrays, ends


def _room(top: V6Super) -> int:
    """How many slots there is room for where the device table is, in front of everything else."""
    tables = top.blob_table, top.chunk_table, top.prefetch_table
    places = [table.offset for table in tables if table.length] + [top.meta_blkaddr * top.block]
    return max(0, min(places) - SLOTS_OFFSET) // SLOT_SIZE


def _cut(ends: dict[int, int], least: int) -> list[int]:
    """Where ranges begin, of a blob that has chunks from these bytes to those."""
    cuts, reached = [0], 0
    for start in sorted(ends):
        if start >= cuts[-1] + least and start >= reached:
            cuts.append(start)
        reached = max(reached, ends[start])
    return cuts


def _are_listed(image: RafsV6, ends: Sequence[dict[int, int]], block: int) -> list[bool]:
    """Of each blob, whether all that files read of it, which is from these bytes to those, is of chunks in the chunk table."""
    left = [dict(of_blob) for of_blob in ends]
    for chunk in image.raw_chunks():
        end = left[chunk.blob_index].get(chunk.uoff)
        if end is not None and end <= -(-(chunk.uoff + chunk.usize) // block) * block:
            del left[chunk.blob_index][chunk.uoff]
    return [not of_blob for of_blob in left]


def _with_table(copy: bytearray, cuts: Sequence[Sequence[int]], count: int, where: str) -> bytes:
    """The copy with another device table: behind it, or where the old one is if that would be too far for its address."""
    slots = b""
    for blob, of_blob in enumerate(cuts):
        tag, blocks, _ = _SLOT.unpack_from(copy, SLOTS_OFFSET + blob * SLOT_SIZE)
        if not any(tag):
            raise FormatError(where, f"device[{blob}].tag", "is empty")
        for number in range(len(of_blob)):
            slots += _SLOT.pack(tag, 0 if number else blocks, 0)
    place = len(copy) if len(copy) <= _TABLE_MOST else SLOTS_OFFSET
    copy[place : place + len(slots)] = slots
    copy += bytes(-len(copy) % 4096)
    _DEVICES.pack_into(copy, _DEVICES_AT, count, place // SLOT_SIZE)
    return bytes(copy)
