"""BlobDevice: when it says where a sequential reader will miss soon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.formats.model import Extent
from nydusd.storage.api.device import BlobDevice
from nydusd.storage.state.segment import EMPTY, PENDING, READY, Identity, Segment
from tests.support.segments import Place, make_segment, segment_name


class TestHints:
    """Chunks of 64 KiB; 16 MiB are 256 of them, and a reader is looked at again after 16."""

    COUNT = 1000

    @pytest.fixture
    def long(self, tmp_path: Path) -> Iterator[tuple[BlobDevice, Segment]]:
        with segment_name() as name:
            places = [Place(i << 16, 1 << 16) for i in range(self.COUNT)]
            data = tmp_path / "data"
            with open(data, "wb+") as file:
                file.truncate(self.COUNT << 16)
                identity = Identity.of(file.fileno(), self.COUNT << 16)
            segment = make_segment(name, places, identity=identity, state=bytes([READY]) * self.COUNT)
            device = BlobDevice.from_spec([{"blob_id": "b", "handle": 7, "segment": name, "data": str(data)}], 0)
            yield device, segment
            device.close()
            segment.close()

    @staticmethod
    def read(device: BlobDevice, chunks: range | list[int]) -> list[int]:
        """The chunks at which the device gave a hint while these were read."""
        for chunk in chunks:
            assert device.missing([Extent(0, chunk, chunk << 16, 0, 1 << 16, 1 << 16)]) == []
        assert all(run.blob == 7 and run.count == 1 for run in device.hints)
        found = [run.first for run in device.hints]
        device.hints.clear()
        return found

    def test_come_every_mebibyte_from_a_sequential_reader_of_what_ends_soon(
        self, long: tuple[BlobDevice, Segment]
    ) -> None:
        device, segment = long
        segment.state[400:] = bytes([EMPTY]) * (self.COUNT - 400)
        assert self.read(device, range(200)) == [144, 160, 176, 192]

    def test_do_not_come_when_all_is_there_or_on_its_way(self, long: tuple[BlobDevice, Segment]) -> None:
        device, segment = long
        segment.state[400:] = bytes([PENDING]) * (self.COUNT - 400)
        assert self.read(device, range(400)) == []

    def test_do_not_come_from_a_reader_that_jumps(self, long: tuple[BlobDevice, Segment]) -> None:
        device, segment = long
        segment.state[500:] = bytes([EMPTY]) * (self.COUNT - 500)
        assert self.read(device, [499, 100, 400, 3, 499, 300, 120]) == []

    def test_come_from_a_reader_whose_other_half_another_front_end_serves(
        self, long: tuple[BlobDevice, Segment]
    ) -> None:
        device, segment = long
        segment.state[400:] = bytes([EMPTY]) * (self.COUNT - 400)
        assert len(self.read(device, [chunk for chunk in range(200) if chunk // 16 % 2])) >= 2
