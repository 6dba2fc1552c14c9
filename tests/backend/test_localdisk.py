"""Blobs on disks: images of disks, block devices with both sector sizes, ids in names and GUIDs, disks that change."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.errors import BackendError, ConfigError, FormatError, NoSuchBlobError
from nydusd.storage.backend import make_backend
from nydusd.storage.backend.base import BlobBackend
from tests.support.gpt_disk import BASIC_DATA, LINUX, Part, blob_part, loop_device, old_blob_part, write_disk

ONE, TWO = "0123456789abcdef" * 4, "fedcba9876543210" * 4
CONTENT = {ONE: bytes(range(256)) * 20, TWO: b"second" * 1000}
PARTS = [blob_part(ONE, CONTENT[ONE]), old_blob_part(TWO, CONTENT[TWO])]


@contextlib.contextmanager
def localdisk(path: Path | str, **config: object) -> Iterator[BlobBackend]:
    backend = make_backend("localdisk", {"device_path": str(path), **config})
    try:
        yield backend
    finally:
        backend.close()


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("device", ["image", "loop device"])
@pytest.mark.parametrize("table", ["primary", "backup"])
def test_blobs_of_a_disk(tmp_path: Path, sector: int, device: str, table: str) -> None:
    image = write_disk(tmp_path / "disk", PARTS, sector)
    if table == "backup":
        with image.open("r+b") as file:
            file.seek(sector)
            file.write(bytes(sector))
    with contextlib.ExitStack() as stack:
        path = str(image) if device == "image" else stack.enter_context(loop_device(image, sector))
        backend = stack.enter_context(localdisk(path))
        for blob_id, content in CONTENT.items():
            reader = backend.get_reader(blob_id)
            assert reader.read(0, len(content)) == content
            assert reader.read(777, 1234) == content[777 : 777 + 1234]
            assert reader.blob_size() == -(-len(content) // sector) * sector


def test_an_image_made_for_other_sectors_than_the_device_has(tmp_path: Path) -> None:
    image = write_disk(tmp_path / "disk", [blob_part(ONE, CONTENT[ONE]), Part("fill", bytes(8192))], 512)
    os.truncate(image, -(-image.stat().st_size // 4096) * 4096)
    with loop_device(image, 4096) as device, localdisk(device) as backend:
        assert backend.get_reader(ONE).read(0, 5120) == CONTENT[ONE]


@pytest.mark.parametrize("device", ["image", "loop device"])
def test_without_a_table_the_disk_is_the_blob(tmp_path: Path, device: str) -> None:
    image = tmp_path / "disk"
    image.write_bytes(CONTENT[ONE] * 4)
    with contextlib.ExitStack() as stack:
        path = str(image) if device == "image" else stack.enter_context(loop_device(image))
        backend = stack.enter_context(localdisk(path, disable_gpt=True))
        assert backend.get_reader(ONE).read(100, 1000) == (CONTENT[ONE] * 4)[100:1100]
        assert backend.get_reader(TWO).blob_size() == 4 * 5120


def test_a_read_ends_where_its_partition_ends(tmp_path: Path) -> None:
    """Bytes of the next partition are not given out as the blob's, although the disk has them."""
    with localdisk(write_disk(tmp_path / "disk", PARTS)) as backend:
        reader = backend.get_reader(ONE)
        assert reader.read(5119, 1) == b"\xff"
        with pytest.raises(
            BackendError, match=r"its partition of .*/disk is shorter .* 2 bytes at 5119 .* 1 are there"
        ):
            reader.read(5119, 2)
        with pytest.raises(BackendError, match="0 are there"):
            reader.read(1 << 62, 1)
        assert (backend.metrics.read_errors, backend.metrics.read_amount) == (2, 1)


def test_blobs_that_are_not_there(tmp_path: Path) -> None:
    with localdisk(write_disk(tmp_path / "disk", PARTS)) as backend:
        for blob_id in ("ab" * 32, ONE[:32], TWO[:31], ONE[:32] + "0" * 32):
            with pytest.raises(NoSuchBlobError, match=rf"blob {blob_id}: none of the 2 partitions"):
                backend.get_reader(blob_id).read(0, 1)
        with pytest.raises(FormatError, match="blob id"):
            backend.get_reader("../" + ONE)


def test_an_old_id_is_found_by_its_first_32_characters_alone(tmp_path: Path) -> None:
    parts = [Part("short-name", b"1", BASIC_DATA), Part(TWO[:32] + "more", b"2", BASIC_DATA)]
    with localdisk(write_disk(tmp_path / "disk", parts)) as backend:
        assert backend.get_reader("short-name").read(0, 1) == b"1"
        assert backend.get_reader(TWO).read(0, 1) == b"2"
        assert backend.get_reader(TWO[:32]).read(0, 1) == b"2"


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([Part("", b"x", LINUX)], "partition 1: has no name"),
        ([*PARTS, Part("", b"x", BASIC_DATA)], "partition 3: has no name"),
        ([*PARTS, blob_part(ONE, b"other")], f"partition 3: has the blob id {ONE}"),
        ([*PARTS, old_blob_part(TWO[:32] + "0" * 32, b"other")], f"partition 3: has the blob id {TWO[:32]}"),
    ],
)
def test_partitions_without_a_name_of_their_own_are_refused(tmp_path: Path, parts: list[Part], says: str) -> None:
    with localdisk(write_disk(tmp_path / "disk", parts)) as backend, pytest.raises(BackendError, match=says):
        backend.get_reader(ONE).read(0, 1)


def test_partitions_of_others_do_no_harm(tmp_path: Path) -> None:
    others = [Part("EFI System Partition"), Part("../../etc/passwd"), Part("grüße", kind=BASIC_DATA)]
    with localdisk(write_disk(tmp_path / "disk", [*others, *PARTS])) as backend:
        assert backend.get_reader(ONE).read(0, 5120) == CONTENT[ONE]


def test_the_same_guid_with_another_name_is_another_blob(tmp_path: Path) -> None:
    guid = uuid.UUID(ONE[32:])
    with localdisk(
        write_disk(tmp_path / "disk", [Part("x", b"1", LINUX, guid), Part("y", b"2", LINUX, guid)])
    ) as backend:
        assert backend.get_reader("x" + ONE[32:]).read(0, 1) == b"1"
        assert backend.get_reader("y" + ONE[32:]).read(0, 1) == b"2"


def test_a_disk_that_comes_later_or_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with localdisk(path) as backend:
        reader = backend.get_reader(ONE)
        with pytest.raises(BackendError, match="No such file"):
            reader.read(0, 1)
        write_disk(path, [blob_part(ONE, b"short")])
        assert reader.read(0, 5) == b"short"
        write_disk(tmp_path / "new", [Part("fill", bytes(3000)), *PARTS])
        os.rename(tmp_path / "new", path)
        assert reader.read(2000, 1000) == CONTENT[ONE][2000:3000]


def test_a_disk_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    image = write_disk(tmp_path / "disk", PARTS)
    with localdisk(image) as backend:
        reader = backend.get_reader(ONE)
        assert reader.read(0, 5120) == CONTENT[ONE]
        os.truncate(image, 40 * 512)
        with pytest.raises(BackendError, match="no intact GPT"):
            reader.read(0, 5120)
    assert CONTENT[ONE][:512] in image.read_bytes()


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/null")):
        with localdisk(path) as backend, pytest.raises(BackendError, match="neither a disk nor a regular file"):
            backend.get_reader(ONE).read(0, 1)


@pytest.mark.parametrize("config", [{}, {"device_path": ""}, {"device_path": "a\0b"}, {"device_path": 1}])
def test_a_configuration_that_names_no_disk_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"localdisk.*device_path"):
        make_backend("localdisk", config)
    with pytest.raises(ConfigError, match="disable_gpt"):
        make_backend("localdisk", {"device_path": "/x", "disable_gpt": "yes"})


def test_closing_gives_the_disk_back_and_reading_opens_it_again(tmp_path: Path) -> None:
    with localdisk(write_disk(tmp_path / "disk", PARTS)) as backend:
        for _ in range(2):
            before = set(os.listdir("/proc/self/fd"))
            assert backend.get_reader(ONE).read(0, 5) == CONTENT[ONE][:5]
            backend.close()
            assert set(os.listdir("/proc/self/fd")) == before
