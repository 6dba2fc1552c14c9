"""The job `resolve`: files of a prefetch list to runs of chunks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from nydusd.errors import FormatError
from nydusd.ipc.messages import Json
from tests.workers.harness import Jobs, jobs
from workers.resolve import resolve


def _resolve(image: Jobs, paths: list[bytes] | None) -> Json:
    job = {
        "bootstrap": str(image.bootstrap_file),
        "path_id": image.path_id,
        "extracted": image.extracted,
        "paths": None if paths is None else [path.hex() for path in paths],
    }
    return resolve(image.open, job)


def _chunks(answer: Json) -> list[tuple[int, int]]:
    return [(blob, chunk) for blob, first, count in answer["runs"] for chunk in range(first, first + count)]


def _chunks_of(image: Jobs, prefix: bytes) -> set[tuple[int, int]]:
    found = set()
    for path, ino in image.files().items():
        if path == prefix or path.startswith(prefix + b"/"):
            size = image.bootstrap.inode(ino).size
            found |= {(extent.blob, extent.chunk) for extent in image.bootstrap.extents(ino, 0, size)}
    return found


@pytest.mark.parametrize("name", ["v6-prefetch", "v5-zstd-blake3", "v6-inline", "v6-targz-ref"])
def test_folders_stand_for_their_files_and_nothing_is_named_twice_by_one_file(name: str, folder: Path) -> None:
    with jobs(name, folder) as image:
        everything = list(image.files())
        for path in (b"sizes", b"dup", everything[0]):
            answer = _resolve(image, [b"/" + path, path + b"/", b"//" + path])
            assert not answer["whole"]
            assert set(_chunks(answer)) == _chunks_of(image, path)
        assert _chunks_of(image, b"sizes")


def test_table_of_the_image_is_taken_when_there_is_no_list(folder: Path) -> None:
    with jobs("v6-prefetch", folder) as image:
        answer = _resolve(image, None)
        assert set(_chunks(answer)) == _chunks_of(image, b"sizes") | _chunks_of(image, b"dup/a")


@pytest.mark.parametrize("path", [b"/", b"", b"//"])
def test_root_means_everything(path: bytes, folder: Path) -> None:
    with jobs("v6-prefetch", folder) as image:
        assert _resolve(image, [b"/sizes", path]) == {"whole": True, "runs": []}


def test_paths_that_are_not_there_are_named_and_passed_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("v6-prefetch", "v5-zstd-blake3"):
        (folder / name).mkdir()
        with jobs(name, folder / name) as image:
            file = next(path for path in image.files() if b"/" not in path)
            answer = _resolve(image, [b"/nowhere", b"/sizes/nowhere", file + b"/below", b"\xff" * 300, b"/sizes"])
            assert set(_chunks(answer)) == _chunks_of(image, b"sizes")
            assert caplog.text.count("is not in the image") == 4
            caplog.clear()


def test_list_that_takes_too_long_is_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.resolve._PATIENCE", -1.0)
    with jobs("v6-prefetch", folder) as image:
        assert _resolve(image, [b"/sizes"]) == {"whole": False, "runs": []}


def test_list_that_takes_too_long_is_cut_in_the_middle_of_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    times = iter([0.0, 0.0, 1.0, 2.0, 61.0])
    monkeypatch.setattr("workers.resolve.time", SimpleNamespace(monotonic=lambda: next(times)))
    with jobs("v6-prefetch", folder) as image:
        _resolve(image, [b"/sizes", b"/dup"])
    assert "cut off after 2 files" in caplog.text


@pytest.mark.parametrize("name", ["v6-prefetch", "v5-zstd-blake3"])
def test_list_of_more_runs_than_any_image_has_is_cut(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They go to the supervisor, whom hostile metadata must not keep busy."""
    with jobs(name, folder) as image:
        paths = [b"/" + path for path in image.files()]
        paths = [*paths[::2], *paths[1::2]]  # so that few are neighbours
        runs = _resolve(image, paths)["runs"]
        assert len(runs) > 10 and not caplog.text
        for most in (len(runs), len(runs) - 1, 3):
            caplog.clear()
            monkeypatch.setattr("workers.resolve._RUNS", most)
            cut = _resolve(image, paths)["runs"]
            assert [run[:2] for run in cut] == [run[:2] for run in runs[:most]]
            assert caplog.text.count("cut off") == (most < len(runs))


@pytest.mark.parametrize("size", [0, 5, 1200, 5000])
def test_broken_bootstrap_is_a_format_error(size: int, folder: Path) -> None:
    with jobs("v6-prefetch", folder) as image:
        image.bootstrap_file.write_bytes(image.bootstrap_file.read_bytes()[:size])
        with pytest.raises(FormatError):
            _resolve(image, [b"/sizes"])
        image.bootstrap_file.unlink()
        with pytest.raises(FormatError, match="cannot be mapped"):
            _resolve(image, None)


def test_broken_folder_does_not_hide_the_rest_of_the_list(folder: Path) -> None:
    with jobs("v6-zstd-blake3", folder) as image:
        ino = image.bootstrap.lookup(image.bootstrap.root_ino, b"dup")
        assert ino is not None
        raw = bytearray(image.bootstrap_file.read_bytes())
        at = int.from_bytes(raw[1024 + 40 : 1024 + 44], "little") * 4096 + ino * 32
        raw[at + 8 : at + 16] = (1 << 40).to_bytes(8, "little")  # the folder's size
        image.bootstrap_file.write_bytes(raw)
        answer = _resolve(image, [b"/dup", b"/sizes"])
        assert set(_chunks(answer)) == _chunks_of(image, b"sizes")
