"""BlobDevice: a cache file of which the kernel may have lost writes."""

from __future__ import annotations

import os

import pytest

from nydusd.errors import (
    EvictedError,
    SyncingError,
    UnreadableError,
)
from nydusd.storage.api import losses
from nydusd.storage.api.device import BlobDevice
from nydusd.storage.state.doubts import doubt
from nydusd.storage.state.segment import READY, Segment
from tests.storage.device_blob import CONTENT, PLACES, Blob, extent_of, read_of
from tests.support.segments import make_segment, segment_name


class TestLosses:
    """The kernel's answer is the test's; `tests/supervisor/test_lost_writes.py` has the kernel's own."""

    VEC = (extent_of(0), extent_of(2))

    @pytest.fixture(autouse=True)
    def _kernel(self, blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self.lost = False
        self.now = 100.0
        monkeypatch.setattr(losses, "has_lost_writes", self._answer)
        monkeypatch.setattr("nydusd.storage.api.losses.time.monotonic", lambda: self.now)
        for segment in blob.segments:
            segment.state[:] = bytes([READY]) * len(PLACES)

    def _answer(self, _fd: int) -> bool:
        self.asked += 1
        lost, self.lost = self.lost, False
        return lost

    def read(self, device: BlobDevice) -> None:
        """AssertionError if it gives anything but what is there."""
        assert device.missing(self.VEC) == []
        assert read_of(device, list(self.VEC)) == CONTENT[:5000] + CONTENT[8192:12288]

    def doubt(self, segment: Segment) -> None:
        """What a worker does, but for the states."""
        segment.syncing[0] = 1
        segment.lost[0] = 0
        segment.doubts[0] += 2
        segment.syncing[0] = 0

    def test_kernel_is_asked_only_while_the_disk_may_not_have_it(self, blob: Blob) -> None:
        self.read(blob.device)
        known = blob.device.known(1, self.VEC[0])
        target = [memoryview(bytearray(100))]
        assert known is not None and known.read(0, 100, target)
        assert self.asked == 0
        segment = blob.segments[0]
        for marks in (segment.dirty, segment.syncing):
            self.asked, marks[0] = 0, 1
            assert known.read(0, 100, target)
            assert self.asked == 1
            self.read(blob.device)
            assert self.asked > 1
            marks[0] = 0
        assert blob.segments[1].dirty[0] == 0

    def test_what_may_be_lost_is_read_past_the_file_until_all_was_doubted(self, blob: Blob) -> None:
        """Others, who open the file now, hear of it by the segments, of whichever image."""
        segment = blob.segments[0]
        with segment_name() as name:
            twin = make_segment(name, PLACES, identity=segment.identity)
            other = blob.open_device(1)
            segment.dirty[0] = 1
            self.read(blob.device)
            known = blob.device.known(1, self.VEC[0])
            self.lost = True
            assert known is not None and not known.read(0, 100, [memoryview(bytearray(100))])
            assert segment.lost[0] == twin.lost[0] == 1
            for device in (blob.device, other) * 2:
                with pytest.raises(UnreadableError, match="its disk did not take all that was written"):
                    self.read(device)
            segment.syncing[0], segment.lost[0] = 1, 0
            segment.doubts[0] += 1
            for device in (blob.device, other):
                with pytest.raises(UnreadableError):
                    self.read(device)
            segment.doubts[0] += 1
            segment.syncing[0] = 0
            for device in (blob.device, other):
                self.read(device)
            other.close()
            twin.close()

    def test_read_during_which_all_was_doubted_does_not_count(
        self, blob: Blob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        segment = blob.segments[0]
        real = os.preadv
        self.read(blob.device)
        known = blob.device.known(1, self.VEC[0])
        assert known is not None

        def preadv(*args: object) -> int:
            got = real(*args)  # type: ignore[arg-type]
            self.doubt(segment)
            return got

        monkeypatch.setattr(os, "preadv", preadv)
        assert not known.read(0, 100, [memoryview(bytearray(100))])
        with pytest.raises(EvictedError, match="doubted"):
            self.read(blob.device)
        monkeypatch.setattr(os, "preadv", real)
        self.read(blob.device)

    def test_who_opens_the_file_during_a_sync_waits_for_its_end(self, blob: Blob) -> None:
        """Its worker may have been told already, and nobody is told again."""
        segment = blob.segments[0]
        segment.syncing[0] = 1
        for _ in range(2):
            with pytest.raises(SyncingError, match="is being synced"):
                self.read(blob.device)
        segment.syncing[0] = 0
        self.read(blob.device)
        segment.syncing[0] = 1
        self.read(blob.device)  # has been told of nothing, and was there when this one began
        blob.device.close()
        with pytest.raises(SyncingError):
            self.read(blob.device)
        self.now += 40.0
        with pytest.raises(UnreadableError, match="not on the disk yet"):
            self.read(blob.device)
        blob.device.close()
        with pytest.raises(SyncingError):
            self.read(blob.device)
        segment.syncs[0] += 1
        self.read(blob.device)  # it is the next one, of which we are told

    def test_after_one_who_was_killed_while_he_doubted_nothing_is_believed_before_the_next_one_is_done(
        self, blob: Blob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        segment = blob.segments[0]
        segment.dirty[0] = 1
        self.read(blob.device)
        self.lost = True
        with pytest.raises(UnreadableError):
            self.read(blob.device)
        segment.lost[0], segment.doubts[0] = 0, 1  # killed here

        def states_change(what: str) -> None:
            if what == "doubts: begun":
                with pytest.raises(UnreadableError):
                    self.read(blob.device)

        monkeypatch.setattr("nydusd.points.reach", states_change)
        doubt(segment)
        assert not segment.doubts[0] % 2
        segment.state[:] = bytes([READY]) * len(PLACES)
        self.read(blob.device)
