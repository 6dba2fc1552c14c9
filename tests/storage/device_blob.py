"""Two cache files with their segments, and a device that looks at them."""

from __future__ import annotations

import os
from pathlib import Path

from nydusd.formats.model import Extent
from nydusd.storage.api.device import BlobDevice
from nydusd.storage.state.segment import Identity, Segment
from tests.support.segments import Place, make_segment

PLACES = [Place(0, 5000), Place(5000, 100), Place(8192, 4096), Place(12288, 1), Place(16384, 3000)]
SIZE = 20000
CONTENT = bytes(i * 7 % 251 for i in range(SIZE))


class Blob:
    """A cache file with its segment, and a device that looks at it as blob 0 of an image; blob 1 is a second one."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.names = names
        self.paths = [folder / f"{i}.blob.data" for i in range(2)]
        self.segments = [self._make(i) for i in range(2)]
        self.device = self.open_device(0)

    def _make(self, index: int, generation: int = 1) -> Segment:
        self.paths[index].write_bytes(CONTENT)
        fd = os.open(self.paths[index], os.O_RDONLY)
        identity = Identity.of(fd, SIZE, b"L" * 32)
        os.close(fd)
        return make_segment(self.names[index], PLACES, identity=identity, generation=generation)

    def open_device(self, row: int) -> BlobDevice:
        blobs = [
            {"blob_id": f"b{i}", "handle": 70 + i, "segment": self.names[i], "data": str(self.paths[i])}
            for i in range(2)
        ]
        return BlobDevice.from_spec(blobs, row)

    def replace(self) -> None:
        """A new file and a new segment, nothing of it ready."""
        self.paths[0].unlink()
        self.segments[0].close()
        self.segments[0] = self._make(0, 2)

    def close(self) -> None:
        self.device.close()
        for segment in self.segments:
            segment.close()


def extent_of(chunk: int, offset: int = 0, length: int | None = None, blob: int = 0) -> Extent:
    place = PLACES[chunk]
    return Extent(blob, chunk, place.uoff, offset, place.usize - offset if length is None else length, place.usize)


def read_of(device: BlobDevice, vec: list[Extent]) -> bytes:
    buf = bytearray(sum(e.length for e in vec))
    with memoryview(buf) as view:
        assert device.read_into(vec, view) == len(buf)
    return bytes(buf)
