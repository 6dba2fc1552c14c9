"""Worker jobs when the cache file is not what it was when they began, or when it was stored: never a wrong byte."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from nydusd.errors import InternalError, StaleCacheError
from nydusd.formats.model import Extent
from nydusd.storage.api.device import BlobDevice
from nydusd.storage.state.segment import EMPTY, READY, VERIFY
from tests.support.disk import make_ext4, mounted
from tests.workers.harness import PLAIN, Jobs, an_extent, flip, jobs

_FIBMAP = 1


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
            flip(image.data, record.uoff)
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
