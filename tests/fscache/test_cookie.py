"""How a worker fills a file of the kernel's cache, on a plain file: whole pages, and what is there found again by its holes."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

from nydusd.errors import CacheError, FormatError
from nydusd.formats.model import ChunkFlag
from nydusd.ipc.borrow import borrow
from nydusd.storage.cache.chunk_table import ChunkTable
from nydusd.storage.state.segment import EMPTY, READY, RECORD
from workers.blobs import OpenBlobs
from workers.cookie import PAGE, copy_bootstrap, cull, lent, survey, write_pages


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "cookie", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def table(*chunks: tuple[int, int], size: int, unlisted: Container[int] = ()) -> ChunkTable:
    flags = [int(ChunkFlag.UNLISTED) if number in unlisted else 0 for number in range(len(chunks))]
    records = b"".join(
        RECORD.pack(0, uoff, 0, usize, flag, 0, 0, 0) for (uoff, usize), flag in zip(chunks, flags, strict=True)
    )
    return ChunkTable(
        count=len(chunks),
        records=bytearray(records),
        digests=bytearray(32 * len(chunks)),
        contexts=b"",
        dict_offset=0,
        dict_size=0,
        uncompressed_size=size,
    )


def test_a_chunk_is_written_in_whole_pages_with_zeros_behind_it(file: int) -> None:
    os.ftruncate(file, 3 * PAGE)
    write_pages(file, memoryview(b"x" * 5000), PAGE)
    assert os.pread(file, 3 * PAGE, 0) == bytes(PAGE) + b"x" * 5000 + bytes(2 * PAGE - 5000)
    big = os.urandom((3 << 20) + 17)
    write_pages(file, memoryview(big), 4 * PAGE)
    assert os.pread(file, len(big), 4 * PAGE) == big
    with pytest.raises(OSError, match="not a page's"):
        write_pages(file, memoryview(b"x"), 512)


def test_what_is_in_the_file_is_ready_and_a_chunk_with_a_hole_is_not(file: int) -> None:
    os.ftruncate(file, 4 * PAGE)
    write_pages(file, memoryview(b"a" * 100), 0)
    write_pages(file, memoryview(b"b" * PAGE), PAGE)
    chunks = table((0, 100), (PAGE, 2 * PAGE), (3 * PAGE, 10), size=3 * PAGE + 10)
    assert list(survey(file, chunks, "blob x")) == [READY, EMPTY, EMPTY]
    write_pages(file, memoryview(b"c" * PAGE), 2 * PAGE)
    assert list(survey(file, chunks, "blob x")) == [READY, READY, EMPTY]


def test_pages_of_no_chunk_become_zeros(file: int) -> None:
    os.ftruncate(file, 5 * PAGE)
    survey(file, table((PAGE, 10), (3 * PAGE, PAGE), size=5 * PAGE), "blob x")
    for page, is_there in enumerate((True, False, True, False, True)):
        assert (os.lseek(file, page * PAGE, os.SEEK_HOLE) > page * PAGE) is is_there, page


def test_pages_of_chunks_that_no_image_describes_yet_stay_holes(file: int) -> None:
    """Zeros there would be believed when an image is bound that does."""
    os.ftruncate(file, 6 * PAGE)
    chunks = ((0, PAGE), (PAGE, 0), (2 * PAGE, PAGE), (4 * PAGE, PAGE), (5 * PAGE, 0))
    survey(file, table(*chunks, size=6 * PAGE), "blob x")
    assert [page for page in range(6) if os.lseek(file, page * PAGE, os.SEEK_HOLE) > page * PAGE] == [3]


def test_pages_beside_a_chunk_that_no_image_lists_stay_holes(file: int) -> None:
    """It may be longer than the blob itself says, for which nobody vouches."""
    os.ftruncate(file, 6 * PAGE)
    chunks = ((0, PAGE), (PAGE, 10), (3 * PAGE, PAGE), (5 * PAGE, PAGE))
    survey(file, table(*chunks, size=6 * PAGE, unlisted=[1]), "blob x")
    assert [page for page in range(6) if os.lseek(file, page * PAGE, os.SEEK_HOLE) > page * PAGE] == [4]


def test_a_table_that_would_cost_too_much_or_cannot_be_served_is_refused(file: int) -> None:
    with pytest.raises(FormatError, match="belong to no chunk"):
        survey(file, table((0, 10), (1 << 40, 10), size=(1 << 40) + 10), "blob x")
    with pytest.raises(FormatError, match="a chunk begins at 512"):
        survey(file, table((512, 10), size=522), "blob x")


@pytest.fixture
def _own_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is worker and supervisor."""
    monkeypatch.setattr(os, "getppid", os.getpid)


@pytest.mark.usefixtures("_own_supervisor")
def test_a_metadata_file_is_copied_piece_by_piece_and_not_when_its_size_is_another(file: int, tmp_path: Path) -> None:
    source = tmp_path / "bootstrap"
    source.write_bytes(os.urandom(3 * PAGE))
    job = {"path": str(source), "size": 3 * PAGE, "offset": PAGE, "length": 1 << 20, "cookie": [os.getpid(), file]}
    assert copy_bootstrap(OpenBlobs(), job) == {}
    assert os.pread(file, 3 * PAGE, 0) == bytes(PAGE) + source.read_bytes()[PAGE:]
    with pytest.raises(CacheError, match="its size is not the 1 bytes"):
        copy_bootstrap(OpenBlobs(), job | {"size": 1})
    with pytest.raises(CacheError, match="No such file"):
        copy_bootstrap(OpenBlobs(), job | {"path": str(tmp_path / "none")})


@pytest.mark.usefixtures("_own_supervisor")
def test_a_metadata_file_that_gives_too_little_is_an_error_and_no_zeros(
    file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "bootstrap"
    source.write_bytes(os.urandom(3 * PAGE))
    job = {"path": str(source), "size": 3 * PAGE, "offset": 0, "length": 2 * PAGE, "cookie": [os.getpid(), file]}
    pread = os.pread
    with monkeypatch.context() as short:
        short.setattr(os, "pread", lambda fd, length, offset: pread(fd, length - 100, offset))
        with pytest.raises(CacheError, match="gave 8092 of 8192 bytes at 0"):
            copy_bootstrap(OpenBlobs(), job)
    assert os.fstat(file).st_size == 0


@pytest.mark.usefixtures("_own_supervisor")
def test_a_descriptor_is_lent_for_a_while_and_an_unknown_one_is_an_error(file: int) -> None:
    with lent((os.getpid(), file)) as copy:
        assert os.path.samestat(os.fstat(copy), os.fstat(file))
        assert not os.get_inheritable(copy)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(copy)
    with pytest.raises(CacheError, match="cannot be had"), lent((os.getpid(), 9999)):
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        borrow(os.getpid(), 9999, lambda: True)


def test_nothing_is_borrowed_from_who_is_not_our_supervisor_any_more(file: int) -> None:
    with pytest.raises(CacheError, match="No such process"), lent((os.getpid(), file)):
        pass


@pytest.mark.usefixtures("_own_supervisor")
def test_files_to_be_culled_are_looked_for_in_every_volume_of_erofs(tmp_path: Path) -> None:
    for volume in ("Ierofs,a", "Ierofs,b", "Infs"):
        folder = tmp_path / "cache" / volume / "@0a"
        folder.mkdir(parents=True)
        (folder / "Dblob").touch()
    (tmp_path / "cache" / "Ierofs,b" / "@0a" / "Dother").touch()
    reader, writer = os.pipe()
    before = os.getcwd()
    try:
        job = {"folder": str(tmp_path), "name": "blob", "device": [os.getpid(), writer]}
        answer = cull(OpenBlobs(), job)
        assert [path.split("/")[-3] for path in answer["culled"]] == ["Ierofs,a", "Ierofs,b"]
        assert os.read(reader, 4096) == b"cull Dblobcull Dblob"
    finally:
        os.chdir(before)
        os.close(reader)
        os.close(writer)
