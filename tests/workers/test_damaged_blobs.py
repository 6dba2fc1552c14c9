"""Worker jobs when the blob is damaged, cut off or gone: the chunks that are bad fail, and no others."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.formats.model import ChunkFlag, ChunkRecord
from nydusd.ipc.messages import Json
from nydusd.storage.cache.decode import ChunkDecoder
from nydusd.storage.cache.meta_info import BlobMetaInfo
from nydusd.storage.state.segment import EMPTY, READY, RECORD
from tests.workers.harness import PLAIN, Jobs, flip, jobs, slot_of, stored_at

_GROUPED = ChunkFlag.BATCH | ChunkFlag.ZRAN


@pytest.mark.parametrize(
    "name", ["v6-zstd-blake3", "v6-none-sha256", "v6-batch", "v6-encrypt", "v6-targz-ref", "v5-aligned"]
)
def test_corrupt_byte_fails_the_chunks_it_is_in_and_no_others(
    name: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with jobs(name, folder) as image:
        count = image.prepare()["count"]
        victim = count // 2
        coff, csize = stored_at(image, victim)
        flip(image.blob, coff + csize // 2)
        failed = {chunk: (code, why) for done in image.fill_all() for chunk, code, why in done["failed"]}
        with image.segment() as segment:
            touched = {
                chunk
                for chunk in range(count)
                if (record := segment.record(chunk)).coff < coff + csize and record.coff + record.csize > coff
            }
            if name != "v6-targz-ref":  # zran contexts begin before their chunks: more than its neighbours may fail
                assert failed.keys() <= touched
            assert failed, "a wrong byte went unnoticed"
            states = list(segment.state)
            assert {chunk for chunk in range(count) if states[chunk] != READY} == failed.keys()
            data = image.data.read_bytes()
            for chunk in failed:
                record = segment.record(chunk)
                assert not any(data[record.uoff : record.uoff + record.usize]), "some of a bad chunk was stored"
        for chunk, (code, why) in failed.items():
            assert code == errno.EIO
            line = f"blob {image.info.blob_id} chunk {chunk}: "
            assert why.startswith(line)
            assert [r for r in caplog.records if r.levelname == "ERROR" and r.getMessage().startswith(line)]
            assert f"{line}" in "".join(
                r.getMessage() for r in caplog.records if "reading it once more" in r.getMessage()
            )


def test_corrupt_chunk_that_is_good_at_the_second_read_is_stored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with jobs(PLAIN, folder) as image:
        count = image.prepare()["count"]
        coff, _ = stored_at(image, 3)
        reader = image.open.get({"handle": 7}).reader()
        read = type(reader).read
        reads = []

        def flaky(self: object, offset: int, size: int) -> bytearray:
            data = read(self, offset, size)  # type: ignore[arg-type]
            reads.append((offset, size))
            if len(reads) == 1:
                data[coff - offset] ^= 1
            return data

        monkeypatch.setattr(type(reader), "read", flaky)
        done = image.fill(range(10))
        assert done["failed"] == [] and done["reads"] == len(reads) == 2
        assert reads[1][0] == coff, "only what was not decoded is read again"
        assert image.states() == [READY] * 10 + [EMPTY] * (count - 10)


def test_corrupt_chunk_is_not_put_in_a_slot(folder: Path) -> None:
    with jobs(PLAIN, folder, cached=False) as image:
        image.prepare()
        coff, csize = stored_at(image, 3)
        flip(image.blob, coff + csize // 2)
        with slot_of(10 << 20) as (_, slot):
            done = image.fill(range(10), slot=slot)
        assert [chunk for chunk, _, _ in done["failed"]] == [3]
        assert [chunk for chunk, _, _ in done["placed"]] == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_slot_that_is_too_small_takes_what_fits(folder: Path) -> None:
    with jobs(PLAIN, folder, cached=False) as image:
        image.prepare()
        with image.segment() as segment:
            sizes = [segment.record(chunk).usize for chunk in range(10)]
        with slot_of(sum(sizes[:4])) as (arena, slot):
            slot["length"] = sum(sizes[:4])
            done = image.fill(range(10), slot=slot)
            assert arena.size >= slot["offset"] + slot["length"]
        placed = [chunk for chunk, _, _ in done["placed"]]
        assert sorted(placed + done["unstored"]) == list(range(10))
        assert sum(length for _, _, length in done["placed"]) <= slot["length"]


def test_blob_of_garbage_costs_a_bounded_number_of_reads(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with jobs("v6-smallchunk", folder) as image:
        count = image.prepare()["count"]
        image.blob.write_bytes(os.urandom(image.blob.stat().st_size))
        done = image.fill(range(count))
        assert count > 100 and sorted(chunk for chunk, _, _ in done["failed"]) == list(range(count))
        assert done["reads"] <= 64
        assert len(caplog.records) <= 70
        assert set(image.states()) == {EMPTY}
        assert not any(image.data.read_bytes())


@pytest.mark.parametrize("cached", [True, False])
def test_chunks_far_apart_in_a_local_blob_are_not_read_with_all_that_is_between(
    folder: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with jobs(PLAIN, folder, cached=cached) as image:
        image.prepare()
        with image.segment() as segment, open(image.blob, "r+b") as file:
            plain = sum(segment.record(chunk).usize for chunk in range(10))
            for chunk, coff in ((3, 1 << 33), (9, 1 << 35)):
                record = segment.record(chunk)
                os.pwrite(file.fileno(), os.pread(file.fileno(), record.csize, record.coff), coff)
                at = chunk * RECORD.size
                segment.records[at : at + RECORD.size] = RECORD.pack(*record._replace(coff=coff))
        reader = image.open.get({"handle": 7}).reader()
        read = type(reader).read

        def measured(self: object, offset: int, size: int) -> bytearray:
            assert size <= 1 << 25
            return read(self, offset, size)  # type: ignore[arg-type]

        monkeypatch.setattr(type(reader), "read", measured)
        with slot_of(plain) as (_, slot):
            done = image.fill(range(10), slot=None if cached else slot)
        assert not done["failed"] and not done["unstored"]
        if cached:
            assert image.states()[:10] == [READY] * 10
        else:
            assert [chunk for chunk, _, _ in done["placed"]] == list(range(10))
        assert done["reads"] <= 10


@contextlib.contextmanager
def _fetched(image: Jobs, content: bytes) -> Iterator[Json]:
    """A blob's bytes as a fetch worker leaves them in shared memory, the first time that they are fetched."""
    with slot_of(len(content)) as (arena, slot):
        arena.view(slot["offset"], len(content))[:] = content
        yield slot | {"coff": 0, "final": False}


@pytest.mark.parametrize("name", ["v6-batch", "v6-targz-ref"])
def test_damaged_unit_that_was_fetched_is_decoded_once_and_not_for_each_of_its_chunks(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[int, int]] = []
    real = ChunkDecoder._decode_unit

    def counted(self: ChunkDecoder, record: ChunkRecord, base: int, data: memoryview, contexts: bytes) -> object:
        decoded.append((record.flags & _GROUPED, record.ctx))
        return real(self, record, base, data, contexts)

    monkeypatch.setattr(ChunkDecoder, "_decode_unit", counted)
    with jobs(name, folder) as image:
        count = image.prepare()["count"]
        content = bytearray(image.blob.read_bytes())
        with image.segment() as segment:
            meta = BlobMetaInfo(segment)
            unit = max((meta.unit(chunk) for chunk in range(count)), key=len)
            damaged = segment.record(unit[1])
            for chunk in unit[1:]:  # metadata that promises other bytes than the unit has
                segment.digests[32 * chunk] ^= 1
        with _fetched(image, bytes(content)) as source:
            answer = image.fill(range(count), source=source)
        assert len(unit) > 5 and answer["corrupt"] == list(unit[1:]) and not answer["failed"]
        assert decoded.count((damaged.flags & _GROUPED, damaged.ctx)) == 1
        assert [chunk for chunk, state in enumerate(image.states()) if state != READY] == list(unit[1:])
        with image.segment() as segment:
            for chunk in unit[1:]:
                segment.digests[32 * chunk] ^= 1
        with _fetched(image, bytes(content)) as source:
            answer = image.fill(unit, source=source | {"final": True})
        assert not answer["corrupt"] and not answer["failed"]
        assert image.wrong_files() == []


def test_garbage_that_was_fetched_is_given_up_after_some_chunks(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with jobs("v6-smallchunk", folder) as image:
        count = image.prepare()["count"]
        with _fetched(image, os.urandom(image.blob.stat().st_size)) as source:
            answer = image.fill(range(count), source=source)
        assert count > 100 and answer["corrupt"] == list(range(count)) and not answer["failed"]
        assert len(caplog.records) == 32
        with _fetched(image, image.blob.read_bytes()) as source:
            image.fill(answer["corrupt"], source=source | {"final": True})
        assert image.wrong_files() == []


def test_missing_blob_fails_its_chunks_with_one_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with jobs(PLAIN, folder) as image:
        count = image.prepare()["count"]
        image.close()  # an open file stays readable without its name
        image.blob.unlink()
        done = image.fill(range(count))
        assert {(chunk, code) for chunk, code, _ in done["failed"]} == {(i, errno.EIO) for i in range(count)}
        assert done["read_errors"] == done["reads"] == 1
        (line,) = [r.getMessage() for r in caplog.records]
        assert image.info.blob_id in line and "no file has it" in line
        shutil.copy(image.image.blobs / image.info.blob_id, image.blob)
        image.fill_all()
        assert image.wrong_files() == []


def test_truncated_blob_gives_what_it_still_has(folder: Path) -> None:
    with jobs(PLAIN, folder) as image:
        count = image.prepare()["count"]
        coff, _ = stored_at(image, count // 2)
        os.truncate(image.blob, coff + 1)
        with image.segment() as segment:
            whole = [c for c in range(count) if sum(segment.record(c)[0:3:2]) <= coff + 1]
        for chunk in range(count):
            image.fill([chunk])
        assert [chunk for chunk, state in enumerate(image.states()) if state == READY] == whole
        assert whole
