"""Images that refer to chunks of others: over a parent image, and with a chunk dictionary."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from nydusd.image.reader import load_metadata
from tests.image.build import create, image, refused, rows
from tests.support import manifest
from tests.support.daemon import Daemon


def copy(tree: Path, to: Path) -> Path:
    shutil.copytree(tree, to, symlinks=True)
    return to


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small tree whose files have contents of their own."""
    top = tmp_path / "base"
    for name in ("a/one", "a/two", "b/three", "b/c/four", "five"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(name.encode() * 3000)
    os.link(top / "a/one", top / "b/link to one")
    os.symlink("a", top / "to-a")
    return top


@pytest.mark.parametrize("version", ["5", "6"])
def test_chunks_of_the_dictionary_are_not_stored_again(base: Path, tmp_path: Path, version: str) -> None:
    dictionary = create(base, tmp_path / "out", "-v", version, "--chunk-size", "4096")
    _, first = load_metadata(dictionary)
    more = copy(base, tmp_path / "more")
    (more / "new").write_bytes(b"new content" * 1000)
    (more / "a/one").unlink()
    made = tmp_path / "out" / "second"
    made.mkdir()
    bootstrap = made / "bootstrap"
    where = ("-B", bootstrap, "-D", tmp_path / "out/blobs")
    image("create", *where, "-v", version, "--chunk-size", "4096", "--chunk-dict", f"bootstrap={dictionary}", more)
    _, second = load_metadata(bootstrap)
    assert sorted(blob.blob_id for blob in second.blobs) == sorted(
        path.name for path in (tmp_path / "out/blobs").iterdir()
    )
    own = next(blob for blob in second.blobs if blob.blob_id != first.blobs[0].blob_id)
    assert own.chunk_count == 3
    assert manifest.differences(manifest.walk(more), rows(bootstrap, tmp_path / "out/blobs")) == []


@pytest.mark.parametrize("version", ["5", "6"])
def test_image_over_a_parent_applies_the_marks_of_removed_files(base: Path, tmp_path: Path, version: str) -> None:
    parent = create(base, tmp_path / "out", "-v", version, "--blob-inline-meta", "--chunk-size", "4096")
    upper = tmp_path / "upper"
    for name, content in (
        ("a/.wh.one", b""),
        ("b/.wh..wh..opq", b""),
        ("b/new", b"in an opaque folder"),
        ("five", b"a/two" * 3000),  # a chunk that the parent has
        ("to-a/now a folder", b"x"),
        (".wh.missing", b""),
    ):
        (upper / name).parent.mkdir(parents=True, exist_ok=True)
        (upper / name).write_bytes(content)
    os.chmod(upper / "a", 0o711)
    bootstrap = tmp_path / "out" / "bootstrap"
    where = ("-B", bootstrap, "-D", tmp_path / "out/blobs")
    image("create", *where, "-v", version, "--chunk-size", "4096", "--parent-bootstrap", parent, upper)
    found = rows(bootstrap, tmp_path / "out/blobs")
    assert found.keys() == {".", "a", "a/two", "b", "b/new", "five", "to-a", "to-a/now a folder"}
    assert found["a"]["mode"] == "0o40711" and found["five"]["sha256"] == found["a/two"]["sha256"]
    _, parsed = load_metadata(bootstrap)
    assert len(parsed.blobs) == 2 and parsed.blobs[1].chunk_count == 2
    if version == "6":
        with Daemon(bootstrap, tmp_path / "out/blobs") as daemon:
            assert manifest.walk(daemon.mountpoint).keys() == found.keys()


def test_images_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    other = create(base, tmp_path / "out", "-v", "5")
    where = ("-D", tmp_path / "out/blobs", "-B", tmp_path / "bootstrap")
    assert "an image of version 5; the new one has 6" in refused("create", *where, "--chunk-dict", str(other), base)
    assert "an image of version 5" in refused("create", *where, "--parent-bootstrap", str(other), base)
    assert "chunks of 0x100000 bytes" in refused(
        "create", *where, "-v", "5", "--chunk-size", "4096", "--chunk-dict", str(other), base
    )
    assert "give bootstrap=PATH" in refused("create", *where, "--chunk-dict", f"boltdb={other}", base)
    assert "(--repeatable)" in refused(
        "create", *where, "-v", "5", "--repeatable", "--parent-bootstrap", str(other), base
    )
    assert "/etc/passwd: tail: no tar header" in refused("create", *where, "--chunk-dict", "/etc/passwd", base)
