"""Cache files that somebody cuts off while a chunk is written to them, and what looks like that and is none."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from nydusd.errors import StaleCacheError
from nydusd.storage.state import map_file
from nydusd.storage.state.eviction import punch
from nydusd.storage.state.segment import EMPTY, READY
from tests.workers.harness import PLAIN, UNPADDED, an_extent, jobs
from workers import cut_off


@pytest.mark.parametrize(("name", "last"), [(PLAIN, False), (UNPADDED, True)], ids=["in the middle", "at the end"])
def test_cache_file_cut_off_while_a_chunk_is_written_behind_that_never_passes_for_whole(
    name: str, last: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that chunk gives it back its size."""
    with jobs(name, folder) as image:
        count = image.prepare()["count"]
        with image.segment() as segment:
            chunks = [chunk for chunk in range(count) if segment.record(chunk).usize > 4096]
            end = segment.record(chunks[-1])
            assert not last or end.uoff + end.usize == segment.identity.size
        kept, gone, victim = chunks[0], chunks[2], chunks[-1] if last else chunks[5]
        image.fill(chunks[:4])
        reader, extents = image.device(), {chunk: an_extent(image, chunk) for chunk in (kept, gone)}
        assert reader.missing(list(extents.values())) == []
        whole = image.data.read_bytes()[: extents[gone].uoff]
        pwrite = os.pwrite

        def cut_before(fd: int, data: memoryview, at: int) -> int:
            os.truncate(image.data, extents[gone].uoff + 100)
            return pwrite(fd, data, at)

        monkeypatch.setattr(os, "pwrite", cut_before)
        with pytest.raises(StaleCacheError, match="cut off"):
            image.fill([victim])
        assert image.states()[victim] != READY
        assert image.data.read_bytes() == whole, "what is lost is read as zeros, or more was taken than that"
        with memoryview(bytearray(extents[gone].length)) as view:
            assert reader.read_into([extents[kept]], view[: extents[kept].length]) == extents[kept].length
            with pytest.raises(StaleCacheError):
                reader.read_into([extents[gone]], view)
        reader.close()


def test_last_chunk_of_a_cache_file_with_holes_that_are_nobodys_is_stored(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what is not there, nor what is taken out just now, nor what a disk has lost, was cut off."""
    with jobs(UNPADDED, folder) as image:
        count = image.prepare()["count"]
        with image.segment() as segment:
            chunks = [chunk for chunk in range(count) if segment.record(chunk).usize > 4096]
            lost, taken, victim = segment.record(chunks[0]), segment.record(chunks[4]), chunks[-1]
            image.fill([*chunks[:3], chunks[4]])
            with open(image.data, "r+b") as file:
                punch(file.fileno(), [(lost.uoff, lost.usize)])
            look = map_file.drop_holes

            def take_out(fd: int, state: bytearray, ranges: Iterable[tuple[int, int]], size: int) -> int:
                if segment.state[chunks[4]] == READY:
                    segment.state[chunks[4]] = EMPTY
                    segment.epoch[0] += 1
                    punch(fd, [(taken.uoff, taken.usize)])
                return look(fd, state, ranges, size)

            monkeypatch.setattr(map_file, "drop_holes", take_out)
            size = image.data.stat().st_size
            assert image.fill([victim])["unstored"] == []
            assert segment.state[victim] == READY
        assert image.data.stat().st_size == size


@pytest.mark.parametrize("of_zeros", [True, False])
def test_chunk_of_zeros_that_a_file_system_does_not_store_is_not_taken_for_lost(
    of_zeros: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with jobs(UNPADDED, folder) as image:
        count = image.prepare()["count"]
        with image.segment() as segment:
            chunks = [chunk for chunk in range(count) if segment.record(chunk).usize > 4096]
            hole, victim = segment.record(chunks[4]), chunks[-1]
        image.fill(chunks[:5])
        with open(image.data, "r+b") as file:
            punch(file.fileno(), [(hole.uoff, hole.usize)])
        monkeypatch.setattr(cut_off, "is_on_disk", lambda _fd, _segment, chunk: of_zeros and chunk == chunks[4])
        if of_zeros:
            assert image.fill([victim])["unstored"] == []
        else:
            with pytest.raises(StaleCacheError, match="cut off"):
                image.fill([victim])


def test_job_that_knows_less_than_others_by_now_cuts_off_nothing(folder: Path) -> None:
    """The blob was opened anew: what is ready by the former segment may have been taken out since."""
    with jobs(UNPADDED, folder) as image:
        count = image.prepare()["count"]
        with image.segment() as segment:
            chunks = [chunk for chunk in range(count) if segment.record(chunk).usize > 4096]
            image.fill(chunks[:5])
            hole, last = segment.record(chunks[4]), segment.record(chunks[-1])
            size = image.data.stat().st_size
            segment.retire()
            with open(image.data, "r+b") as file:
                punch(file.fileno(), [(hole.uoff, hole.usize)])
                cut_off.check(file.fileno(), segment, last.uoff, last.uoff + last.usize)
        assert image.data.stat().st_size == size
