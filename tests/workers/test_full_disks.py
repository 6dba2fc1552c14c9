"""Worker jobs when something is used up: the disk, which may fail as well, and the file descriptors."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nydusd.errors import CacheError
from nydusd.storage.state.segment import EMPTY, READY, VERIFY
from tests.support.scarce import no_fd_left
from tests.workers.harness import PLAIN, UNPADDED, jobs, slot_of, small_disk


def test_chunk_that_cannot_be_looked_at_for_want_of_a_file_descriptor_is_not_taken_for_absent(folder: Path) -> None:
    """It would be fetched, though it may be in the cache file."""
    with jobs(PLAIN, folder) as image:
        image.prepare()
        image.fill([0])
        with no_fd_left(os.getpid()), pytest.raises(OSError, match="Too many open files"):
            image.fill([0], verify=[0])


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


@pytest.mark.parametrize("call", ["open", "stat", "fstat", "lseek", "pwrite"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.EUCLEAN, errno.ESTALE], ids=errno.errorcode.get)
def test_chunks_come_past_a_cache_file_whose_disk_fails_whatever_is_asked_of_it(
    call: str, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only EIO, and not only of a write: a file system that is shut down fails stat(2), too."""
    with jobs(UNPADDED, folder) as image:
        last = image.prepare()["count"] - 1  # after that one it is looked for holes
        image.fill([last - 1])
        image.open.let_go()
        asked = getattr(os, call)

        def fails(what: object, *more: object, **how: object) -> object:
            if what == image.data or (
                isinstance(what, int) and os.readlink(f"/proc/self/fd/{what}") == str(image.data)
            ):
                raise OSError(code, os.strerror(code))
            return asked(what, *more, **how)

        monkeypatch.setattr(os, call, fails)
        done = image.fill([last])
        monkeypatch.undo()
        assert done["unstored"] == [last] and done["why_unstored"] == os.strerror(code) and done["failed"] == []
        assert image.states()[last] == EMPTY


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
