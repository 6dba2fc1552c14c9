"""BlobDevice: chunks that are taken out of a cache file while it is looked at, or read."""

from __future__ import annotations

import os

import pytest

from nydusd.errors import (
    EvictedError,
)
from nydusd.storage.api.io import ChunkRun
from nydusd.storage.state.segment import EMPTY, READY, Identity
from tests.storage.device_blob import PLACES, SIZE, Blob, extent_of
from tests.support.segments import make_segment


class TestEviction:
    def ready(self, blob: Blob) -> None:
        for segment in blob.segments:
            segment.state[:] = bytes([READY]) * len(PLACES)

    def test_read_during_which_chunks_are_taken_away_does_not_count(
        self, blob: Blob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.ready(blob)
        vec = [extent_of(0), extent_of(2)]
        buf = memoryview(bytearray(SIZE))
        real = os.preadv

        def preadv(*args: object) -> int:
            got = real(*args)  # type: ignore[arg-type]
            blob.segments[0].epoch[0] += 1
            return got

        assert blob.device.missing(vec) == []
        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(EvictedError):
            blob.device.read_into(vec, buf)
        monkeypatch.undo()
        blob.segments[0].state[2] = EMPTY
        assert blob.device.missing(vec, again=True) == [ChunkRun(0, 2, 1)]
        assert blob.device.missing([extent_of(0)]) == []
        assert blob.device.read_into([extent_of(0)], buf) == PLACES[0].usize

    def test_eviction_between_the_look_and_the_read_is_noticed_in_every_blob_of_the_read(self, blob: Blob) -> None:
        """The first blob comes twice: its first look counts."""
        self.ready(blob)
        vec = [extent_of(0), extent_of(1, blob=1), extent_of(2)]
        for index in (0, 1):
            assert blob.device.missing(vec) == []
            blob.segments[index].epoch[0] += 1
            with pytest.raises(EvictedError):
                blob.device.read_into(vec, memoryview(bytearray(SIZE)))
        assert blob.device.missing(vec) == []
        assert blob.device.read_into(vec, memoryview(bytearray(SIZE))) > 0

    def test_eviction_before_the_look_costs_nothing(self, blob: Blob) -> None:
        self.ready(blob)
        blob.segments[0].epoch[0] += 1
        assert blob.device.missing([extent_of(0)]) == []
        assert blob.device.read_into([extent_of(0)], memoryview(bytearray(SIZE))) == PLACES[0].usize

    def test_number_of_evictions_changes_with_each(self, blob: Blob) -> None:
        vec = [extent_of(0), extent_of(1, blob=1)]
        blob.device.missing(vec)
        seen = {blob.device.evictions(vec)}
        for segment in blob.segments:
            segment.epoch[0] += 1
            seen.add(blob.device.evictions(vec))
        assert len(seen) == 3

    def test_segment_that_was_replaced_is_looked_at_no_more(self, blob: Blob) -> None:
        """Same file, another segment: the old one knows nothing of what is taken away from now on."""
        self.ready(blob)
        assert blob.device.missing([extent_of(0)]) == []
        old = blob.segments[0]
        fd = os.open(blob.paths[0], os.O_RDONLY)
        identity = Identity.of(fd, SIZE, b"L" * 32)
        os.close(fd)
        blob.segments[0] = make_segment(blob.names[0], PLACES, identity=identity, generation=2)
        old.retire()
        assert blob.device.missing([extent_of(0)]) == [ChunkRun(0, 0, 1)]
        with pytest.raises(EvictedError):
            # What had been looked at before the old one was retired.
            blob.device._views[0].before = 0
            blob.segments[0].epoch[0] = 1
            blob.device.read_into([extent_of(0)], memoryview(bytearray(SIZE)))
        old.close()

    def test_retired_segment_that_has_its_name_still_is_believed_nowhere_in_a_read(self, blob: Blob) -> None:
        """The first blob comes twice; the worker that was to publish its next segment was killed."""
        self.ready(blob)
        blob.segments[0].retire()
        missing = blob.device.missing([extent_of(0), extent_of(1, blob=1), extent_of(2)])
        assert missing == [ChunkRun(0, 0, 1), ChunkRun(0, 2, 1)]

    def test_what_is_asked_for_is_marked_with_the_clock(self, blob: Blob) -> None:
        self.ready(blob)
        blob.segments[0].clock[0] = 77
        blob.segments[0].state[4] = EMPTY
        blob.device.missing([extent_of(0), extent_of(4)])
        assert list(blob.segments[0].touched) == [77, 0, 0, 0, 77]
        assert not any(blob.segments[1].touched)
