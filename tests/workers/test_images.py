"""Every packed image through the jobs of the workers: into the cache file, into slots, from another daemon's cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nydusd.ipc.arena import PAGE
from nydusd.storage.state.map_file import record_path
from nydusd.storage.state.segment import EMPTY, READY, VERIFY
from tests.support import oracle
from tests.workers.harness import jobs, slot_of

NAMES = [image.name for image in oracle.images()]
FEWER = [image.name for image in oracle.fewer_images()]
CLEAN = {"failed": [], "corrupt": [], "unstored": [], "why_unstored": "", "placed": [], "read_errors": 0}


@pytest.mark.parametrize("name", NAMES)
def test_filled_cache_holds_the_files_that_were_packed_and_is_used_again(name: str, folder: Path) -> None:
    """After a clean stop, and as a reference daemon leaves it: in both cases without the backend."""
    with jobs(name, folder) as image:
        answer = image.prepare()
        assert answer["ready"] == 0 and answer["count"] > 0
        for done in image.fill_all():
            assert done["reads"] > 0 and {key: done[key] for key in CLEAN} == CLEAN
        assert set(image.states()) == {READY}
        assert image.data.stat().st_size == answer["size"]
        assert image.wrong_files() == []
        assert image.checkpoint() == {"stored": answer["count"]}

        shutil.rmtree(image.blobs)
        image.new_daemon()
        assert image.prepare() == {**answer, "ready": answer["count"]}, "after a clean stop nothing is fetched again"
        assert image.wrong_files() == []

        record_path(image.spec.map_path).unlink()  # the reference leaves data, map and metadata, and no record
        image.new_daemon()
        answer = image.prepare()
        assert answer["ready"] == 0
        if not image.is_checkable():
            assert set(image.states()) == {EMPTY}, "nothing proves the bytes of a bare tar: they are fetched"
            return
        chunks = range(answer["count"])
        assert set(image.states()) == {VERIFY}
        done = image.fill(chunks, verify=chunks)
        assert done == {**CLEAN, "reads": 0, "read_bytes": 0, "timed": []}
        assert set(image.states()) == {READY}
        assert image.wrong_files() == []


@pytest.mark.parametrize("name", FEWER)
def test_slots_hold_the_same_bytes_as_the_cache_file(name: str, folder: Path) -> None:
    with jobs(name, folder) as image:
        count = image.prepare()["count"]
        image.fill_all()
        data = image.data.read_bytes()
        with image.segment() as segment:
            records = [segment.record(chunk) for chunk in range(count)]
    (folder / "dummy").mkdir()
    with jobs(name, folder / "dummy", cached=False) as image:
        assert image.prepare()["count"] == count
        with slot_of(sum(record.usize for record in records)) as (arena, slot):
            done = image.fill(range(count), slot=slot)
            assert done["failed"] == [] and done["unstored"] == []
            assert [chunk for chunk, _, _ in done["placed"]] == list(range(count))
            for chunk, at, length in done["placed"]:
                record = records[chunk]
                assert at >= PAGE and length == record.usize
                assert bytes(arena.view(at, length)) == data[record.uoff : record.uoff + record.usize]
        assert set(image.states()) == {EMPTY}, "what is in a slot is not in the cache"
        assert not list(image.work_dir.iterdir())


@pytest.mark.parametrize("name", ["v6-batch", "v6-targz-ref", "v6-zstd-blake3", "v5-lz4-sha256", "v6-encrypt"])
def test_some_chunks_alone_are_right_and_the_others_stay_empty(name: str, folder: Path) -> None:
    with jobs(name, folder) as whole:
        count = whole.prepare()["count"]
        whole.fill_all()
        data = whole.data.read_bytes()
    (folder / "part").mkdir()
    with jobs(name, folder / "part") as image:
        image.prepare()
        wanted = [chunk for chunk in range(count) if chunk % 3 == 1 or chunk % 7 == 0]
        assert image.fill(wanted)["failed"] == []
        assert [chunk for chunk, state in enumerate(image.states()) if state == READY] == wanted
        with image.segment() as segment:
            found = image.data.read_bytes()
            for chunk in range(count):
                record = segment.record(chunk)
                part = slice(record.uoff, record.uoff + record.usize)
                assert found[part] == (data[part] if chunk in wanted else bytes(record.usize))
        assert image.fill(wanted)["reads"] == 0, "what is ready is not fetched again"
