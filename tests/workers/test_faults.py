"""Worker jobs when something is broken: the blob, its metadata, the cache file, the disk. Never a wrong byte."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nydusd.errors import BackendError, CacheError, FormatError, InternalError, NoSuchBlobError, StaleCacheError
from nydusd.formats.model import BlobFeature, ChunkFlag, ChunkRecord, Extent
from nydusd.ipc.messages import Json
from nydusd.storage.api.device import BlobDevice
from nydusd.storage.cache.decode import ChunkDecoder
from nydusd.storage.cache.meta_info import BlobMetaInfo
from nydusd.storage.state.segment import EMPTY, READY, RECORD, VERIFY
from tests.support.disk import make_ext4, mounted
from tests.support.scarce import no_fd_left
from tests.workers.harness import Jobs, jobs, slot_of, small_disk

PLAIN = "v6-lz4-sha256"
UNPADDED = "v5-lz4-sha256"
"""Its last chunk ends where the cache file does."""
_FIBMAP = 1
_GROUPED = ChunkFlag.BATCH | ChunkFlag.ZRAN


def _flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x55]))


def _stored_at(image: Jobs, chunk: int) -> tuple[int, int]:
    with image.segment() as segment:
        record = segment.record(chunk)
    return record.coff, record.csize


# --- this process ---------------------------------------------------------------------------------------------


def test_chunk_that_cannot_be_looked_at_for_want_of_a_file_descriptor_is_not_taken_for_absent(folder: Path) -> None:
    """It would be fetched, though it may be in the cache file."""
    with jobs(PLAIN, folder) as image:
        image.prepare()
        image.fill([0])
        with no_fd_left(os.getpid()), pytest.raises(OSError, match="Too many open files"):
            image.fill([0], verify=[0])


# --- the blob -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["v6-zstd-blake3", "v6-none-sha256", "v6-batch", "v6-encrypt", "v6-targz-ref", "v5-aligned"]
)
def test_corrupt_byte_fails_the_chunks_it_is_in_and_no_others(
    name: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with jobs(name, folder) as image:
        count = image.prepare()["count"]
        victim = count // 2
        coff, csize = _stored_at(image, victim)
        _flip(image.blob, coff + csize // 2)
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
        coff, _ = _stored_at(image, 3)
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
        coff, csize = _stored_at(image, 3)
        _flip(image.blob, coff + csize // 2)
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
        coff, _ = _stored_at(image, count // 2)
        os.truncate(image.blob, coff + 1)
        with image.segment() as segment:
            whole = [c for c in range(count) if sum(segment.record(c)[0:3:2]) <= coff + 1]
        for chunk in range(count):
            image.fill([chunk])
        assert [chunk for chunk, state in enumerate(image.states()) if state == READY] == whole
        assert whole


# --- the metadata ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v6-targz-ref", PLAIN])
def test_no_metadata_and_no_backend_is_an_error(name: str, folder: Path) -> None:
    with jobs(name, folder) as image:
        shutil.rmtree(image.blobs)
        with pytest.raises(NoSuchBlobError):
            image.prepare()
        assert not list(image.work_dir.iterdir())


def test_blob_that_ends_before_its_metadata_is_an_error(folder: Path) -> None:
    with jobs(PLAIN, folder) as image:
        os.truncate(image.blobs / image.info.meta_blob_id, image.info.ci_offset)
        with pytest.raises(BackendError, match="shorter"):
            image.prepare()


@pytest.mark.parametrize("at", [0, 5000, -1, -4096])
def test_damaged_metadata_in_the_cache_is_fetched_again(
    folder: Path, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    with jobs("v6-targz-ref", folder) as image:
        image.prepare()
        meta = image.spec.meta_path
        good = meta.read_bytes()
        damaged = bytearray(good)
        damaged[at] ^= 0xFF
        for bad in (good[: at or 7], b"", bytes(len(good)), bytes(damaged)):
            meta.write_bytes(bad)
            image.new_daemon()
            try:
                image.prepare()
            finally:
                changed = meta.read_bytes()
            assert changed in (good, bytes(damaged))
            if changed == good:
                assert "fetching it again" in caplog.text
        image.fill_all()
        image.new_daemon()


@pytest.mark.parametrize("name", [PLAIN, "v6-encrypt"])
def test_stored_metadata_with_a_wrong_place_of_a_chunk_is_fetched_again(
    name: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is sound in itself, and no chunk map says otherwise yet."""
    with jobs(name, folder) as image:
        count = image.prepare()["count"]
        meta = image.spec.meta_path
        good = meta.read_bytes()
        damaged = bytearray(good)
        size, sizes_from = (24, 40) if image.info.features & BlobFeature.CHUNK_INFO_V2 else (16, 44)
        at = (count - 1) * size + 8
        place = int.from_bytes(damaged[at : at + 8], "little")
        later = place + 1 - (1 << sizes_from)  # begins one byte later, and so is one byte shorter
        damaged[at : at + 8] = later.to_bytes(8, "little")
        meta.write_bytes(damaged)
        image.new_daemon()
        image.prepare()
        assert "do not belong together; fetching it again" in caplog.text
        assert meta.read_bytes() == good
        image.fill_all()
        assert image.wrong_files() == []


def test_damaged_metadata_without_backend_is_an_error_and_recovers(folder: Path) -> None:
    with jobs(PLAIN, folder) as image:
        image.prepare()
        image.spec.meta_path.write_bytes(b"junk")
        image.new_daemon()
        image.blobs.rename(folder / "away")
        with pytest.raises(NoSuchBlobError):
            image.prepare()
        (folder / "away").rename(image.blobs)
        image.prepare()
        image.fill_all()
        assert image.wrong_files() == []


def test_unreadable_places_of_metadata_are_passed_over(folder: Path) -> None:
    with jobs("v6-targz-ref", folder) as image:
        image.spec.meta_path.mkdir()
        image.prepare()
        assert (image.meta_dir / image.spec.meta_path.name).is_file()
        image.fill_all()
        assert image.wrong_files() == []


def test_dictionaries_that_vanish_are_not_guessed(folder: Path) -> None:
    with jobs("v6-targz-ref", folder) as image:
        image.prepare()
        image.spec.meta_path.unlink()
        with pytest.raises(StaleCacheError, match="metadata"):
            image.fill_all()


@pytest.mark.parametrize("size", [0, 100, 4096, 20000])
def test_bootstrap_that_was_cut_is_a_format_error_not_a_crash(folder: Path, size: int) -> None:
    for name in (PLAIN, "v5-zstd-blake3"):
        (folder / name).mkdir()
        with jobs(name, folder / name) as image:
            os.truncate(image.bootstrap_file, size)
            with pytest.raises(FormatError):
                image.prepare()


# --- the cache file -------------------------------------------------------------------------------------------


def _delete(image: Jobs) -> None:
    image.data.unlink()


def _replace(image: Jobs) -> None:
    content = image.data.read_bytes()
    image.data.unlink()
    image.data.write_bytes(bytes(len(content)))


def _move_away(image: Jobs) -> None:
    image.data.rename(image.data.with_name("moved"))


def _cut(image: Jobs) -> None:
    os.truncate(image.data, image.data.stat().st_size // 2 + 1000)


def _empty(image: Jobs) -> None:
    os.truncate(image.data, 0)


DISASTERS: list[Callable[[Jobs], None]] = [_delete, _replace, _move_away, _cut, _empty]


@pytest.mark.parametrize("disaster", DISASTERS)
def test_cache_file_changed_between_jobs_is_noticed_before_a_byte_is_written(
    tmp_path: Path, disaster: Callable[[Jobs], None]
) -> None:
    with jobs(PLAIN, tmp_path) as image:
        count = image.prepare()["count"]
        image.fill(range(count // 2))
        image.checkpoint()
        disaster(image)
        before = image.data.read_bytes() if image.data.exists() else None
        with pytest.raises(StaleCacheError, match="cache file"):
            image.fill([count - 1])
        with pytest.raises(StaleCacheError, match="cache file"):
            image.fill([0], verify=[0])
        with pytest.raises(StaleCacheError, match="cache file"):
            image.checkpoint()
        assert (image.data.read_bytes() if image.data.exists() else None) == before


@pytest.mark.parametrize("restart", ["reopen", "killed", "stopped", "rebooted"])
@pytest.mark.parametrize("disaster", DISASTERS)
def test_cache_file_changed_is_made_anew_and_never_believed(
    tmp_path: Path, disaster: Callable[[Jobs], None], restart: str
) -> None:
    with jobs(PLAIN, tmp_path) as image:
        count = image.prepare()["count"]
        image.fill_all()
        image.checkpoint()
        reader = image.device()
        extent = an_extent(image, count - 1)
        assert reader.missing([extent]) == []
        disaster(image)
        if restart == "reopen":
            image.generation += 1
        else:
            image.new_daemon(same_boot=restart == "killed")
        assert image.prepare()["ready"] == 0
        chunks = [i for i, state in enumerate(image.states()) if state == VERIFY]
        assert not chunks or disaster is _replace
        if restart == "reopen":
            _never_zeros(image, reader, extent)
        assert image.fill(chunks, verify=chunks)["failed"] == []
        image.fill_all()
        assert image.wrong_files() == []
        image.checkpoint()
        image.new_daemon()
        assert image.prepare()["ready"] == count
        assert image.wrong_files() == []
        reader.close()


def an_extent(image: Jobs, chunk: int) -> Extent:
    with image.segment() as segment:
        record = segment.record(chunk)
    return Extent(0, chunk, record.uoff, 0, record.usize, record.usize)


def _never_zeros(image: Jobs, reader: BlobDevice, extent: Extent) -> None:
    """A front end that still has the old pair reads right bytes or hears that they are gone, also after a refill."""
    image.fill([0])
    buf = bytearray(extent.length)
    with memoryview(buf) as view:
        try:
            assert reader.missing([extent]) == []
            reader.read_into([extent], view)
        except StaleCacheError:
            assert reader.missing([extent]) != []
            return
    assert any(buf), "a hole was read as zeros"


def test_cache_file_cut_off_in_mid_job_stops_the_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with jobs(PLAIN, folder) as image:
        image.prepare()
        pwrite = os.pwrite
        writes = []

        def cut_after_two(fd: int, data: memoryview, at: int) -> int:
            done = pwrite(fd, data, at)
            writes.append(at)
            if len(writes) == 2:
                os.truncate(image.data, 100)
            return done

        monkeypatch.setattr(os, "pwrite", cut_after_two)
        with pytest.raises(StaleCacheError, match="cut off"):
            image.fill(range(10))
        assert len(writes) == 2
        assert image.data.stat().st_size == 100, "it stays short, so that readers see it"


def test_longer_cache_file_is_put_aside(folder: Path) -> None:
    with jobs(PLAIN, folder) as image:
        image.data.write_bytes(b"x" * (image.info.uncompressed_size + 1))
        size = image.prepare()["size"]
        assert image.data.stat().st_size == size
        assert image.data.with_name(image.data.name + ".bad").stat().st_size == size + 1
        assert set(image.states()) == {EMPTY}


def test_holes_that_the_map_denies_are_fetched_and_the_map_set_aside(folder: Path) -> None:
    with jobs(PLAIN, folder) as image:
        count = image.prepare()["count"]
        image.fill_all()
        image.checkpoint()
        content = image.data.read_bytes()
        identity = image.data.stat().st_ino
        os.truncate(image.data, 0)
        os.truncate(image.data, len(content))  # by somebody else, to the same size
        image.new_daemon()
        answer = image.prepare()
        assert image.data.stat().st_ino == identity
        with image.segment() as segment:
            empty = {c for c in range(count) if not segment.record(c).usize}
        assert {c for c, state in enumerate(image.states()) if state == READY} <= empty
        assert not image.spec.map_path.exists(), "a reference daemon must not read zeros by it either"
        assert answer["ready"] <= len(empty)
        image.fill_all()
        assert image.wrong_files() == []


def test_killed_daemon_loses_nothing_that_it_had_not_stored_yet(folder: Path) -> None:
    with jobs(PLAIN, folder) as image:
        count = image.prepare()["count"]
        image.fill_all()
        image.new_daemon(same_boot=True)
        shutil.rmtree(image.blobs)
        assert image.prepare()["ready"] == count
        assert image.wrong_files() == []


def test_nothing_on_disk_is_trusted_when_told_so(folder: Path) -> None:
    for same_boot in (False, True):
        (folder / str(same_boot)).mkdir()
        with jobs(PLAIN, folder / str(same_boot), verify=True) as image:
            count = image.prepare()["count"]
            image.fill_all()
            image.checkpoint()
            image.new_daemon(same_boot=same_boot)
            assert image.prepare()["ready"] == 0
            assert set(image.states()) == {VERIFY}
            with image.segment() as segment:
                record = segment.record(5)
            _flip(image.data, record.uoff)
            done = image.fill(range(count), verify=range(count))
            assert done["reads"] == 1 and done["failed"] == []
            assert set(image.states()) == {READY}
            assert image.wrong_files() == []


def test_what_only_the_page_cache_has_is_fetched_and_written_again(folder: Path) -> None:
    """The kernel takes a page that it could not write for clean; what is on the disk is seen when the page is dropped."""
    make_ext4(folder / "disk")
    with mounted(folder / "disk", folder / "mnt", "") as loop:
        (folder / "mnt/image").mkdir()
        with jobs(PLAIN, folder / "mnt/image") as image:
            count = image.prepare()["count"]
            image.fill_all()
            image.checkpoint()
            with image.segment() as segment:
                places = [segment.record(chunk).uoff for chunk in range(count)]
                segment.state[:] = bytes([VERIFY]) * count
            with open(image.data, "rb") as data, open(loop, "r+b") as disk:
                place = next(place for place in places if any(os.pread(data.fileno(), 4096, place)))
                block = struct.unpack("i", fcntl.ioctl(data, _FIBMAP, struct.pack("i", place // 4096)))[0]
                disk.seek(block * 4096)
                disk.write(bytes(4096))
                disk.flush()
                os.fsync(disk.fileno())
                assert any(os.pread(data.fileno(), 4096, place)), "the page cache has it no more"
            done = image.fill(range(count), verify=range(count))
            assert done["reads"] == 1 and done["failed"] == []
            assert set(image.states()) == {READY}
            image.checkpoint()
            with open(image.data, "rb") as data:
                os.posix_fadvise(data.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert image.wrong_files() == []


def test_bytes_that_cannot_be_read_for_a_check_are_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with jobs(PLAIN, folder, verify=True) as image:
        image.prepare()
        image.fill_all()
        image.checkpoint()
        image.new_daemon()
        image.prepare()

        def failing(read: Callable[..., object]) -> Callable[..., object]:
            def fails(fd: int, *more: object) -> object:
                if Path(f"/proc/self/fd/{fd}").readlink() == image.data:
                    raise OSError(errno.EIO, "Input/output error")
                return read(fd, *more)

            return fails

        for name in ("pread", "preadv"):
            monkeypatch.setattr(os, name, failing(getattr(os, name)))
        assert image.fill([3], verify=[3])["reads"] == 1
        assert image.states()[3] == READY


def test_segment_of_another_generation_is_not_used(folder: Path) -> None:
    with jobs(PLAIN, folder) as image:
        image.prepare()
        image.generation = 2
        with pytest.raises(StaleCacheError, match="generation"):
            image.fill([0])
        image.prepare()
        assert image.fill([0])["failed"] == []


def test_job_without_a_spec_is_our_bug(folder: Path) -> None:
    with jobs(PLAIN, folder) as image, pytest.raises(InternalError, match="spec"):
        image.open.get({"handle": 8})


def test_job_for_a_blob_that_was_never_prepared_is_our_bug(folder: Path) -> None:
    with jobs(PLAIN, folder) as image, pytest.raises(InternalError, match="not there"):
        image.fill([0])


# --- the disk -------------------------------------------------------------------------------------------------


def _write_up(folder: Path) -> None:
    """Leave no free block in a file system."""
    with open(folder / "ballast", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as e:
            assert e.errno == errno.ENOSPC


def test_full_disk_puts_metadata_into_the_run_time_folder(folder: Path) -> None:
    with jobs("v6-targz-ref", folder) as image, small_disk(image.work_dir, 64 << 10):
        _write_up(image.work_dir)
        image.prepare()
        assert not image.spec.meta_path.exists()
        assert (image.meta_dir / image.spec.meta_path.name).is_file()
        done = image.fill([0, 1, 2])
        assert done["unstored"] and done["why_unstored"] == os.strerror(errno.ENOSPC) and done["failed"] == []
        with slot_of(1 << 20) as (_, slot):
            done = image.fill([0, 1, 2], slot=slot)
        assert [chunk for chunk, _, _ in done["placed"]] == [0, 1, 2], "read with the dictionaries of the other folder"
        answer = image.checkpoint()
        assert "No space left" in answer["error"] and answer["synced"]
        assert not image.spec.map_path.exists()
        image.close()


def test_disk_that_fills_up_marks_only_what_it_took(folder: Path) -> None:
    with jobs(PLAIN, folder) as image, small_disk(image.work_dir, 400 << 10):
        count = image.prepare()["count"]
        unstored = []
        for done in image.fill_all():
            assert done["failed"] == []
            unstored += done["unstored"]
        ready = [chunk for chunk, state in enumerate(image.states()) if state == READY]
        assert ready and unstored and not set(ready) & set(unstored)
        assert sorted(ready + unstored) == list(range(count))
        (image.work_dir / f"{image.info.blob_id}.blob.meta").unlink()  # room for the map
        image.checkpoint()
        image.new_daemon()
        image.prepare()
        assert [chunk for chunk, state in enumerate(image.states()) if state == READY] == ready
        image.close()


def test_write_errors_leave_the_chunk_unmarked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with jobs(PLAIN, folder) as image:
        image.prepare()
        pwrite = os.pwrite

        def half(fd: int, data: memoryview, at: int) -> int:
            if len(data) > 1:
                return pwrite(fd, data[: len(data) // 2], at)
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "pwrite", half)
        done = image.fill(range(5))
        assert done["unstored"] == list(range(5)) and done["why_unstored"] == "Input/output error"
        assert set(image.states()) == {EMPTY}
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:100], at))
        assert image.fill(range(5))["unstored"] == []
        assert image.states()[:5] == [READY] * 5
        monkeypatch.undo()
        image.fill_all()
        assert image.wrong_files() == []


def test_data_that_may_be_lost_is_checked_before_it_is_used_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, after in ((PLAIN, VERIFY), ("v6-tarfs", EMPTY)):
        (folder / name).mkdir()
        with jobs(name, folder / name) as image:
            image.prepare()
            image.fill_all()

            def fails(_fd: int) -> None:
                raise OSError(errno.EIO, "Input/output error")

            with monkeypatch.context() as patch:
                patch.setattr(os, "fdatasync", fails)
                with pytest.raises(CacheError, match="Input/output error"):
                    image.checkpoint()
            assert set(image.states()) == {after}
            assert not image.spec.map_path.exists()
