"""Layers that have a file without the folder it is in: the folder of the layers below keeps its attributes."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.image.build import create, image, rows
from tests.image.test_convert import source_layout, unpacked
from tests.image.test_create_tar import file, folder, tar_of
from tests.support.manifest import Row

FOLDERS = (".", "tmp", "home")
LOWER = tar_of(
    folder(".", mode=0o711, uid=3, mtime=5),
    folder("tmp", mode=0o1777, gid=7, mtime=9, pax_headers={"SCHILY.xattr.user.note": "kept"}),
    folder("home", mode=0o700, uid=1000),
)
FILES = (file("tmp/x"), file("home/y"), file("new/folder/z"))
IMPLIED = tar_of(*FILES)
EXPLICIT = tar_of(*(folder(name) for name in FOLDERS), *FILES)
LATER = tar_of(*FILES, *(folder(name, mtime=1) for name in FOLDERS))
REMOVED = tar_of(file(".wh.home", b""), *FILES)


def over_parent(lower: bytes, upper: bytes, work: Path) -> dict[str, Row]:
    for name, data in (("lower", lower), ("upper", upper)):
        (work / f"{name}.tar").write_bytes(data)
    parent = create(work / "lower.tar", work / "lower", "-t", "tar-rafs")
    return rows(create(work / "upper.tar", work / "upper", "-t", "tar-rafs", "--parent-bootstrap", str(parent)))


def merged(lower: bytes, upper: bytes, work: Path) -> dict[str, Row]:
    made: list[Path] = []
    for data in (lower, upper):
        (work / "layer.tar").write_bytes(data)
        where = ("-t", "tar-rafs", "--whiteout-spec", "none", "-D", work / "blobs", "-B")
        (work / "blobs").mkdir(exist_ok=True)
        made.append(work / f"{len(made)}.boot")
        image("create", *where, made[-1], work / "layer.tar")
    image("merge", "-B", work / "merged", *made)
    return rows(work / "merged", work / "blobs")


def converted(lower: bytes, upper: bytes, work: Path, *options: str) -> dict[str, Row]:
    source = source_layout(work, [gzip.compress(data, mtime=0) for data in (lower, upper)])
    there = ("--platform", "linux/amd64", "--cache", work / "cache")
    image("convert", source, work / "once", *there, *options)
    image("convert", source, work / "out", *there, *options)  # of what the cache has
    unpacked(work / "out", "", work)
    return rows(work / "image/image.boot", work / "out/blobs/sha256")


def converted_v5(lower: bytes, upper: bytes, work: Path) -> dict[str, Row]:
    return converted(lower, upper, work, "-v", "5")


def referred(lower: bytes, upper: bytes, work: Path) -> dict[str, Row]:
    return converted(lower, upper, work, "--oci-ref")


Way = Callable[[bytes, bytes, Path], dict[str, Row]]
KNOWING: tuple[Way, ...] = (over_parent, converted, converted_v5, referred)


def attributes(found: dict[str, Row]) -> list[tuple[object, ...]]:
    keys = ("mode", "uid", "gid", "mtime_ns", "xattrs")
    return [tuple(found[name].get(key) for key in keys) for name in FOLDERS]


KEPT: list[tuple[object, ...]] = [
    ("0o40711", 3, 0, 5 * 10**9, None),
    ("0o41777", 0, 7, 9 * 10**9, {"user.note": b"kept".hex()}),
    ("0o40700", 1000, 0, 0, None),
]
PLAIN = ("0o40755", 0, 0, 0, None)


@pytest.mark.parametrize("way", [*KNOWING, merged])
def test_folder_without_a_member_keeps_what_it_was_below(tmp_path: Path, way: Way) -> None:
    found = way(LOWER, IMPLIED, tmp_path)
    assert attributes(found) == KEPT and {"tmp/x", "home/y", "new/folder/z"} < found.keys()
    assert [found[name]["mode"] for name in ("new", "new/folder")] == ["0o40755"] * 2


@pytest.mark.parametrize("way", KNOWING)
def test_folder_with_a_member_of_the_same_attributes_replaces_those_below(tmp_path: Path, way: Way) -> None:
    assert attributes(way(LOWER, EXPLICIT, tmp_path)) == [PLAIN] * 3


@pytest.mark.parametrize("way", [over_parent, merged, converted])
def test_member_behind_its_content_counts(tmp_path: Path, way: Way) -> None:
    assert attributes(way(LOWER, LATER, tmp_path)) == [(*PLAIN[:3], 10**9, None)] * 3


@pytest.mark.parametrize("way", [over_parent, merged, converted])
def test_folder_that_was_removed_below_is_made_anew(tmp_path: Path, way: Way) -> None:
    assert attributes(way(LOWER, REMOVED, tmp_path)) == [*KEPT[:2], PLAIN]
