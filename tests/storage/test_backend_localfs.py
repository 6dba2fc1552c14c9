"""Blobs in local files: where they are looked for, exact reads, and files that change under a reader."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.errors import BackendError, ConfigError, FormatError, NoSuchBlobError, UnsupportedError
from nydusd.storage.backend import localfs, make_backend
from nydusd.storage.backend.base import BlobBackend, BlobReader, validate_blob_id

BLOB = bytes(range(256)) * 16


def backend(**config: object) -> BlobBackend:
    return make_backend("localfs", {key: str(v) if isinstance(v, Path) else v for key, v in config.items()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "blob").write_bytes(BLOB)
    return tmp_path


def read_whole(reader: BlobReader) -> bytes:
    return bytes(reader.read(0, reader.blob_size()))


def test_reads_are_exact_and_counted(folder: Path) -> None:
    store = backend(dir=folder)
    reader = store.get_reader("blob")
    assert reader is store.get_reader("blob")
    assert reader.blob_size() == len(BLOB)
    assert reader.read(10, 20) == BLOB[10:30]
    buf = bytearray(30)
    reader.read_into(memoryview(buf)[5:25], 300)
    assert buf == bytes(5) + BLOB[300:320] + bytes(5)
    assert reader.read(4096, 0) == b""
    metrics = store.metrics
    assert (metrics.read_count, metrics.read_errors, metrics.read_amount) == (2, 0, 40)
    store.close()


@pytest.mark.parametrize(("offset", "size"), [(4095, 2), (4096, 1), (1 << 40, 1), (0, 4097)])
def test_reads_past_the_end_are_errors_that_name_the_file(folder: Path, offset: int, size: int) -> None:
    store = backend(dir=folder)
    with pytest.raises(BackendError, match=r"blob blob: .*/blob is shorter than the image says"):
        store.get_reader("blob").read(offset, size)
    assert (store.metrics.read_errors, store.metrics.read_amount) == (1, 0)
    store.close()


@pytest.mark.parametrize("offset", [-1, 1 << 63, 1 << 70])
def test_offsets_that_no_file_has_are_errors(folder: Path, offset: int) -> None:
    with pytest.raises(BackendError, match="outside of any blob"):
        backend(dir=folder).get_reader("blob").read(offset, 1)


def test_getting_a_reader_opens_nothing_and_a_missing_blob_is_named_when_read(tmp_path: Path) -> None:
    reader = backend(dir=tmp_path, alt_dirs=[str(tmp_path / "other")]).get_reader("missing")
    for attempt in (lambda: reader.read(0, 1), reader.blob_size):
        with pytest.raises(NoSuchBlobError, match=r"missing: No such file.*other/missing: No such file"):
            attempt()
    reader.will_need(0, 10)
    (tmp_path / "missing").write_bytes(b"now it is here")
    assert read_whole(reader) == b"now it is here"
    reader.close()


def test_the_folder_comes_before_its_alternatives_unless_its_file_is_empty(tmp_path: Path) -> None:
    for name in ("dir", "alt1", "alt2"):
        (tmp_path / name).mkdir()
    contents = {"dir/a": b"dir", "alt1/a": b"alt1", "dir/b": b"", "alt1/b": b"", "alt2/b": b"alt2", "alt1/c": b"alt1"}
    contents |= {"alt2/c": b"alt2", "alt1/d": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    store = backend(dir=tmp_path / "dir", alt_dirs=[str(tmp_path / "alt1"), str(tmp_path / "alt2")])
    found = {blob_id: read_whole(store.get_reader(blob_id)) for blob_id in "abcd"}
    assert found == {"a": b"dir", "b": b"alt2", "c": b"alt1", "d": b""}
    store.close()


def test_blob_file_serves_every_blob(folder: Path) -> None:
    store = backend(blob_file=folder / "blob", dir=folder / "not there")
    assert read_whole(store.get_reader("any")) == read_whole(store.get_reader("other")) == BLOB
    store.close()


def test_symlinks_are_followed(folder: Path) -> None:
    (folder / "link").symlink_to("blob")
    store = backend(dir=folder)
    assert read_whole(store.get_reader("link")) == BLOB
    store.close()


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    store = backend(dir=tmp_path)
    for name in ("folder", "pipe", "device", "socket"):
        with pytest.raises(NoSuchBlobError, match=rf"{name}: (not a regular file|No such device)"):
            store.get_reader(name).read(0, 1)
    store.close()


def test_a_file_replaced_by_a_longer_one_is_opened_anew(folder: Path) -> None:
    reader = backend(dir=folder).get_reader("blob")
    assert reader.read(0, 10) == BLOB[:10]
    (folder / "new").write_bytes(BLOB * 2)
    os.replace(folder / "new", folder / "blob")
    assert reader.read(len(BLOB), 10) == BLOB[:10]
    reader.close()


def test_a_truncated_file_is_an_error_and_works_again_when_it_is_whole(folder: Path) -> None:
    reader = backend(dir=folder).get_reader("blob")
    assert reader.read(4000, 96) == BLOB[4000:]
    os.truncate(folder / "blob", 4050)
    with pytest.raises(BackendError, match="96 bytes at 4000 are needed, 50 are there"):
        reader.read(4000, 96)
    assert reader.read(4000, 50) == BLOB[4000:4050]
    (folder / "blob").write_bytes(BLOB)
    assert reader.read(4000, 96) == BLOB[4000:]
    reader.close()


def test_an_unlinked_file_that_is_open_goes_on_working(folder: Path) -> None:
    reader = backend(dir=folder).get_reader("blob")
    reader.will_need(0, len(BLOB))
    (folder / "blob").unlink()
    assert read_whole(reader) == BLOB
    reader.close()


def test_a_failing_read_is_tried_once_more_with_the_file_opened_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = backend(dir=folder).get_reader("blob")
    real, failures = os.preadv, [OSError(116, "Stale file handle")]

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if failures:
            raise failures.pop()
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert read_whole(reader) == BLOB
    failures += [OSError(5, "Input/output error")] * 2
    with pytest.raises(BackendError, match="Input/output error"):
        reader.read(0, 1)
    reader.close()


def test_short_reads_of_the_kernel_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = backend(dir=folder).get_reader("blob")
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:100]], offset))
    assert read_whole(reader) == BLOB
    reader.close()


def test_a_closed_reader_can_be_used_again(folder: Path) -> None:
    store = backend(dir=folder)
    reader = store.get_reader("blob")
    assert read_whole(reader) == BLOB
    store.close()
    assert read_whole(reader) == BLOB
    reader.close()


def test_more_blobs_than_descriptors_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localfs, "MAX_OPEN", 3)
    for number in range(10):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 10)
    store = backend(dir=tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(10), *range(10)]:
        assert store.get_reader(str(number)).read(2, 3) == bytes([number]) * 3
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


# --- ids and configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blob_id",
    [
        "",
        ".",
        "..",
        ".a",
        "-a",
        "a/b",
        "../a",
        "/etc/passwd",
        "a\0b",
        "a\n",
        "ä",
        "a b",
        "sha256:a",
        "x" * 129,
        "a%2fb",
    ],
)
def test_ids_that_could_lead_elsewhere_are_refused(folder: Path, blob_id: str) -> None:
    with pytest.raises(FormatError, match="blob id"):
        backend(dir=folder).get_reader(blob_id)


@given(st.text(max_size=20))
def test_accepted_ids_are_plain_file_names(blob_id: str) -> None:
    try:
        validate_blob_id(blob_id)
    except FormatError:
        return
    assert os.path.basename(blob_id) == blob_id and blob_id not in ("", ".", "..") and blob_id.isascii()


@pytest.mark.parametrize("blob_id", ["a" * 64, "A-b_c.d", "0", "x" * 128])
def test_usual_ids_are_accepted(blob_id: str) -> None:
    assert validate_blob_id(blob_id) == blob_id


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({}, "neither 'blob_file' nor 'dir'"),
        ({"dir": ""}, "neither"),
        ({"dir": 5}, "'dir' is 5"),
        ({"blob_file": ["x"]}, "'blob_file' is"),
        ({"dir": "a\0b"}, "must be a path"),
        ({"dir": "a", "alt_dirs": ["a\0b"]}, "must be a list of folder names"),
        ({"dir": "/x", "alt_dirs": "/y"}, "'alt_dirs' is '/y'"),
        ({"dir": "/x", "alt_dirs": [""]}, "list of folder names"),
        ({"dir": "/x", "alt_dirs": [1]}, "list of folder names"),
    ],
)
def test_wrong_configuration_is_named(config: dict[str, object], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        make_backend("localfs", config)


def test_keys_of_old_configurations_are_ignored(folder: Path) -> None:
    store = make_backend("localfs", {"dir": str(folder), "readahead": True, "readahead_sec": 20, "alt_dirs": None})
    assert read_whole(store.get_reader("blob")) == BLOB
    store.close()


def test_unknown_backends_are_unsupported() -> None:
    with pytest.raises(UnsupportedError, match="'floppy' is not supported; use one of: localfs"):
        make_backend("floppy", {})
