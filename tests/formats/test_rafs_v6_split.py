"""Metadata in which each blob is several devices: every chunk is where it was, on the device of its range."""

from __future__ import annotations

import random
import struct
from bisect import bisect_right
from pathlib import Path

import pytest

from nydusd.errors import FormatError
from nydusd.formats.blob_id import blob_id_from_path
from nydusd.formats.chunk_info import CHUNK_INFO_SIZE
from nydusd.formats.rafs_v6 import RafsV6
from nydusd.formats.rafs_v6_super import read_super
from nydusd.formats.walk import walk
from nydusd.formats.write.rafs_v6_split import are_listed, split_devices
from tests.support.oracle import Image, images

PLAIN = [image for image in images() if "v6" in image.name and image.bootstrap.parent != image.blobs]
CHUNK = struct.Struct("<HHI")


def opened(path: Path) -> tuple[memoryview, RafsV6]:
    view = memoryview(path.read_bytes())
    return view, RafsV6(view, str(path), blob_id_from_path(str(path)))


def chunks(image: RafsV6, size: int, at: int, metadata: bytes) -> list[tuple[int, int]]:
    """Device and block of each chunk, as the kernel reads them."""
    count = -(-size // image.chunk_size)
    return [(device, block) for _, device, block in CHUNK.iter_unpack(metadata[at : at + CHUNK.size * count])]


@pytest.mark.parametrize("what", PLAIN, ids=lambda image: image.name)
def test_each_chunk_keeps_its_address_and_is_within_the_range_of_its_device(what: Image) -> None:
    view, image = opened(what.bootstrap)
    found = split_devices(view, image, "bootstrap", 1 << 16, 300)
    assert are_listed(view, image, "bootstrap") == [True] * len(image.blobs), "also where it is not split"
    if "tarfs" in what.name:
        assert found is None
        return
    assert found is not None and all(found.listed)
    devices = [(blob, number) for blob, cuts in enumerate(found.cuts) for number in range(len(cuts))]
    assert struct.unpack_from("<H", found.metadata, 1024 + 86)[0] == len(devices) <= 300
    ranges = {
        device: (found.cuts[blob] + [1 << 62])[number : number + 2] for device, (blob, number) in enumerate(devices, 1)
    }
    for ino in walk(image, image.root_ino, 1 << 20):
        size = image.inode(ino).size
        if not size:
            continue
        _, at = image.places(ino)
        before = chunks(image, size, at, bytes(view))
        for number, ((was, address), (device, block)) in enumerate(
            zip(before, chunks(image, size, at, found.metadata), strict=True)
        ):
            blob, _ = devices[device - 1]
            assert (blob, block) == ((was & 0xFF) - 1, address)
            begin, end = ranges[device]
            assert begin <= block * 4096
            assert block * 4096 + min(image.chunk_size, size - number * image.chunk_size) <= end


def test_the_slots_name_the_same_blobs_and_only_the_first_of_each_counts_its_blocks() -> None:
    view, image = opened(PLAIN[0].bootstrap)
    found = split_devices(view, image, "bootstrap", 1 << 16, 300)
    assert found is not None
    count, place = struct.unpack_from("<HH", found.metadata, 1024 + 86)
    slots = [struct.unpack_from("<64sII", found.metadata, 128 * (place + number)) for number in range(count)]
    tags = {tag for tag, _, _ in slots}
    assert len(tags) == len(image.blobs)
    assert sum(blocks for _, blocks, _ in slots) == struct.unpack_from("<64sI", view, 1408)[1]


def test_a_blob_is_told_of_which_the_chunk_table_lacks_what_a_file_refers_to() -> None:
    original, _ = opened(PLAIN[0].bootstrap)
    at = read_super(original, "bootstrap").chunk_table.offset
    raw = bytearray(original)
    raw[at : at + CHUNK_INFO_SIZE] = raw[at + CHUNK_INFO_SIZE : at + 2 * CHUNK_INFO_SIZE]
    view = memoryview(bytes(raw))
    image = RafsV6(view, "bootstrap")
    found = split_devices(view, image, "bootstrap", 1 << 16, 300)
    assert found is not None and not all(found.listed)
    assert are_listed(view, image, "bootstrap") == found.listed


def test_few_devices_are_made_where_few_are_allowed_and_none_of_what_is_small() -> None:
    view, image = opened(PLAIN[0].bootstrap)
    few = split_devices(view, image, "bootstrap", 4096, 6)
    assert few is not None and sum(map(len, few.cuts)) <= 6
    assert split_devices(view, image, "bootstrap", 1 << 40, 300) is None
    assert split_devices(view, image, "bootstrap", 4096, 1) is None


def test_metadata_that_was_changed_anywhere_is_refused_or_split_within_its_own_ranges() -> None:
    original = PLAIN[0].bootstrap.read_bytes()
    choose = random.Random(5)
    for _ in range(200):
        raw = bytearray(original)
        for _ in range(choose.randrange(1, 8)):
            raw[choose.randrange(1024, len(raw))] = choose.randrange(256)
        view = memoryview(bytes(raw))
        try:
            found = split_devices(view, RafsV6(view, "bootstrap"), "bootstrap", 1 << 16, 300)
        except FormatError:
            continue
        if found is not None:
            for cuts in found.cuts:
                assert cuts[0] == 0 and cuts == sorted(set(cuts))
                assert all(bisect_right(cuts, cut) - 1 == place for place, cut in enumerate(cuts))
