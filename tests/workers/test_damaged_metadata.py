"""Worker jobs when the metadata of a blob is damaged or gone: it is fetched again, or is an error, and never guessed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from nydusd.errors import BackendError, FormatError, NoSuchBlobError, StaleCacheError
from nydusd.formats.model import BlobFeature
from tests.workers.harness import PLAIN, jobs


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
