"""Faults while a daemon runs: blobs missing or corrupt, the cache folder changed, full or absent. Never a wrong byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nydusd.formats.model import ChunkRecord
from tests.supervisor.lives import (
    IMAGE,
    ONE_CHUNK,
    config_for,
    copy_blobs,
    failing,
    read_direct,
    with_cache,
    wrong,
)
from tests.support import oracle
from tests.support.blobs import OpenedBlob, open_image
from tests.support.daemon import Daemon
from tests.support.discipline import wait_until

ExpectLog = Callable[..., None]
ALL = [image.name for image in oracle.images() if not image.name.startswith("large:")]
TRUTH = oracle.truth(IMAGE.name)


def data_file(daemon: Daemon) -> Path:
    (path,) = daemon.cache.glob("*.blob.data")
    return path


class TestMissingBlob:
    def test_mounts_fails_reads_and_serves_them_once_the_blob_is_there(
        self, tmp_path: Path, expect_log: ExpectLog
    ) -> None:
        expect_log("blob .* cannot be opened: .*no file has it", "a read failed")
        blobs = copy_blobs(IMAGE, tmp_path / "blobs")
        (blob,) = blobs.iterdir()
        blob.rename(tmp_path / "away")
        with Daemon(IMAGE.bootstrap, blobs) as daemon:
            assert "dup" in os.listdir(daemon.mountpoint)
            with pytest.raises(OSError) as raised:
                read_direct(daemon.mountpoint / ONE_CHUNK)
            assert raised.value.errno == 5
            (tmp_path / "away").rename(blob)

            def readable() -> bool:
                try:
                    return read_direct(daemon.mountpoint / ONE_CHUNK) == TRUTH[ONE_CHUNK.encode()]
                except OSError:
                    return False

            wait_until(readable, "the blob to be found", 20)
            assert wrong(daemon) == []

    def test_that_comes_late_is_prefetched_without_any_reader(self, tmp_path: Path, expect_log: ExpectLog) -> None:
        expect_log("blob .* cannot be opened")
        blobs = copy_blobs(IMAGE, tmp_path / "blobs")
        (blob,) = blobs.iterdir()
        blob.rename(tmp_path / "away")
        config = config_for(IMAGE, tmp_path / "cache", fs_prefetch={"enable": True, "prefetch_all": True})
        config["device"]["backend"]["config"]["dir"] = str(blobs)  # type: ignore[index]
        with Daemon(IMAGE.bootstrap, blobs, config=config) as daemon:
            wait_until(lambda: "cannot be opened" in daemon.log.read_text(), "the first try to open the blob")
            (tmp_path / "away").rename(blob)
            wait_until(lambda: all_ready(daemon), "the prefetch of the blob", 20)

    def test_that_vanishes_leaves_readable_what_is_cached(self, tmp_path: Path, expect_log: ExpectLog) -> None:
        expect_log("a read failed")
        blobs = copy_blobs(IMAGE, tmp_path / "blobs")
        config = config_for(IMAGE, tmp_path / "cache", amplify_io=0)
        config["device"]["backend"]["config"]["dir"] = str(blobs)  # type: ignore[index]
        with Daemon(IMAGE.bootstrap, blobs, config=config) as daemon:
            read_direct(daemon.mountpoint / ONE_CHUNK)
            (blob,) = blobs.iterdir()
            os.truncate(blob, 0)
            expect_log("shorter than the image says|no file has it")
            with pytest.raises(OSError):
                read_direct(daemon.mountpoint / "sizes/300K-text")
            assert read_direct(daemon.mountpoint / ONE_CHUNK) == TRUTH[ONE_CHUNK.encode()]


def all_ready(daemon: Daemon) -> bool:
    metrics = daemon.get("/api/v1/metrics/blobcache")
    assert isinstance(metrics, dict)
    return bool(metrics["data_all_ready"])


class TestCorruptBlob:
    def test_fails_the_files_of_the_chunk_alone_and_is_never_cached(
        self, tmp_path: Path, expect_log: ExpectLog
    ) -> None:
        blobs = copy_blobs(IMAGE, tmp_path / "blobs")
        (blob,) = blobs.iterdir()
        whole = blob.read_bytes()
        _, (opened,) = open_image(IMAGE.name)
        number, record = chunk_of(opened, TRUTH[ONE_CHUNK.encode()])
        expect_log(f"blob {opened.info.blob_id} chunk {number}: ", "a read failed")
        damaged = bytearray(whole)
        damaged[record.coff + record.csize // 2] ^= 0x10
        blob.write_bytes(damaged)
        with Daemon(IMAGE.bootstrap, blobs) as daemon:
            assert failing(daemon) == {ONE_CHUNK}
            with open(data_file(daemon), "rb") as file:
                file.seek(record.uoff)
                assert file.read(record.usize) == bytes(record.usize)
            blob.write_bytes(whole)
            wait_until(lambda: not failing(daemon), "the end of the back-off")

    def test_is_found_by_every_kind_of_image(self, tmp_path: Path, expect_log: ExpectLog) -> None:
        """A flipped bit in the middle of the first chunk of each: an error or right bytes, nothing else."""
        expect_log("chunk", "a read failed")
        for name in ("v5-lz4-sha256", "v6-batch", "v6-encrypt", "v6-none-sha256"):
            image = oracle.image(name)
            blobs = copy_blobs(image, tmp_path / name)
            (blob,) = blobs.iterdir()
            data = bytearray(blob.read_bytes())
            _, (opened,) = open_image(name)
            _, record = chunk_of(opened, TRUTH[ONE_CHUNK.encode()])
            data[record.coff + min(record.csize, record.usize) // 2] ^= 0x10
            blob.write_bytes(data)
            with Daemon(image.bootstrap, blobs) as daemon:
                found = failing(daemon, name)
                assert ONE_CHUNK in found, name
                assert len(found) < len(oracle.truth(name)) // 2


def chunk_of(opened: OpenedBlob, content: bytes) -> tuple[int, ChunkRecord]:
    """The chunk that begins with this content, and its place."""
    for number, plain in opened.decode(0, len(opened.records) - 1):
        if len(plain) > 4096 and content.startswith(plain):
            return number, opened.records[number]
    raise AssertionError("no chunk begins with this")


class TestCacheFolder:
    @pytest.fixture
    def daemon(self) -> Iterator[Daemon]:
        """Has all files in its cache."""
        with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
            assert wrong(daemon) == []
            yield daemon
            assert wrong(daemon) == []

    @pytest.mark.parametrize("size", [0, 1, 4096, 100_000])
    def test_data_file_cut_off(self, daemon: Daemon, size: int, expect_log: ExpectLog) -> None:
        expect_log("fetching it again")
        os.truncate(data_file(daemon), size)
        assert wrong(daemon) == []

    def test_data_file_cut_off_in_a_chunk(self, daemon: Daemon, expect_log: ExpectLog) -> None:
        expect_log("fetching it again|opening it again")
        path = data_file(daemon)
        os.truncate(path, path.stat().st_size - 1)
        assert wrong(daemon) == []

    def test_everything_in_it_deleted(self, daemon: Daemon) -> None:
        for path in daemon.cache.iterdir():
            path.unlink()
        assert wrong(daemon) == []

    def test_itself_deleted(self, daemon: Daemon) -> None:
        shutil.rmtree(daemon.cache)
        assert wrong(daemon) == []

    def test_data_file_replaced_by_one_of_zeros(self, daemon: Daemon) -> None:
        path = data_file(daemon)
        size = path.stat().st_size
        path.unlink()
        path.write_bytes(bytes(size))
        assert wrong(daemon) == []


@pytest.mark.parametrize("how", ["cut off", "deleted", "folder deleted"])
def test_cache_that_is_lost_while_it_is_filled(tmp_path: Path, how: str, expect_log: ExpectLog) -> None:
    if how == "cut off":
        expect_log("fetching it again")
    config = config_for(IMAGE, tmp_path / "cache", amplify_io=0)
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=tmp_path / "cache", config=config) as daemon:
        for number, (path, content) in enumerate(TRUTH.items()):
            if number % 60 == 30:
                if how == "cut off":
                    os.truncate(data_file(daemon), 5000)
                elif how == "deleted":
                    data_file(daemon).unlink()
                else:
                    shutil.rmtree(daemon.cache)
            assert read_direct(daemon.mountpoint / os.fsdecode(path)) == content, path
        assert wrong(daemon) == []


class TestFullDisk:
    @pytest.fixture
    def small(self, tmp_path: Path) -> Iterator[Path]:
        """A cache folder on a file system of 256 KiB."""
        folder = tmp_path / "small"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], check=True)
        yield folder
        subprocess.run(["umount", str(folder)], check=True)

    def test_reads_go_on_uncached_with_one_warning(self, small: Path) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=small) as daemon:
            assert wrong(daemon) == []
            assert wrong(daemon) == []
            lines = [line for line in daemon.log.read_text().splitlines() if "go on uncached" in line]
            assert len(lines) == 1, lines
            assert str(small) in lines[0]

    def test_that_is_full_before_the_start_serves_all_the_same(self, small: Path) -> None:
        with open(small / "ballast", "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=small) as daemon:
            assert wrong(daemon) == []

    def test_workers_that_die_meanwhile_cost_nothing(self, small: Path) -> None:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, cache=small) as daemon:
            for number, (path, content) in enumerate(TRUTH.items()):
                if number % 100 == 50:
                    daemon.kill(daemon.pids("decompress")[0])
                    daemon.kill(daemon.pids("fuse")[0])
                assert read_direct(daemon.mountpoint / os.fsdecode(path)) == content, path


def test_dummy_cache_serves_every_image_and_stores_nothing(tmp_path: Path) -> None:
    """In one daemon, one after the other."""
    with Daemon(None, IMAGE.blobs) as daemon:
        for name in ALL:
            image = oracle.image(name)
            config = json.dumps(with_cache(config_for(image, tmp_path / "cache"), type=""))
            assert daemon.mount(f"/{name}", image.bootstrap, image.blobs, config=config) == (204, ""), name
            assert wrong(daemon, name, name) == [], name
            before = daemon.backend_reads()
            read_direct(daemon.mountpoint / name / ONE_CHUNK)
            assert daemon.backend_reads() <= before + 1, name
            assert daemon.umount(f"/{name}") == (204, "")
    assert not (tmp_path / "cache").exists()


def test_dummy_cache_with_the_smallest_arena(tmp_path: Path) -> None:
    """Chunks of up to 1 MiB pass one by one through 1 MiB of shared memory."""
    config = with_cache(config_for(IMAGE, tmp_path / "cache", nydusd={"arena_size": 1 << 20}), type="")
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
        small = {path: content for path, content in TRUTH.items() if len(content) < 1 << 20}
        for path, content in small.items():
            assert read_direct(daemon.mountpoint / os.fsdecode(path)) == content, path


@pytest.mark.parametrize("name", ["v6-zstd-blake3", "v5-lz4-sha256", "v6-none-sha256"])
def test_digest_validation_trusts_no_cache_of_an_earlier_daemon(name: str, tmp_path: Path) -> None:
    image = oracle.image(name)
    config = config_for(image, tmp_path / "cache", digest_validate=True)
    with Daemon(image.bootstrap, image.blobs, cache=tmp_path / "cache", config=config) as daemon:
        assert wrong(daemon, name) == []
    (path,) = (tmp_path / "cache").glob("*.blob.data")
    _, (opened,) = open_image(name)
    _, record = chunk_of(opened, TRUTH[ONE_CHUNK.encode()])
    with open(path, "r+b") as file:
        file.seek(record.uoff + 5)
        file.write(b"wrong")
    with Daemon(image.bootstrap, image.blobs, cache=tmp_path / "cache", config=config) as daemon:
        assert wrong(daemon, name) == []
        assert daemon.backend_reads() == 1
        assert "bytes in the cache file are not the chunk's" in daemon.log.read_text()
