"""`nydus-image unpack`: the tar holds the tree that the image was made of, as GNU tar and Python's tarfile read it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from nydusd.image.create import create as make_image
from nydusd.image.options import BuildOptions, Source
from nydusd.image.whiteout import Whiteouts
from tests.image.build import create, image, refused, rows
from tests.support import manifest, oracle
from tests.support.manifest import Row


def extract(tar: Path, to: Path) -> dict[str, Row]:
    to.mkdir()
    command = ["tar", "-C", str(to), "--xattrs", "--xattrs-include=*", "--same-owner", "-xpf", str(tar)]
    subprocess.run(command, check=True)
    return manifest.walk(to)


@pytest.mark.parametrize("options", [(), ("-v", "5"), ("--blob-inline-meta", "--batch-size", "0x10000")])
def test_gnu_tar_extracts_the_source_tree(
    tree: Path, expected: dict[str, Row], tmp_path: Path, options: tuple[str, ...]
) -> None:
    bootstrap = create(tree, tmp_path, *options)
    image("unpack", bootstrap, "-D", tmp_path / "blobs", "--output", tmp_path / "out.tar")
    found = extract(tmp_path / "out.tar", tmp_path / "out")
    assert manifest.differences({path: row for path, row in expected.items() if path != "socket"}, found) == []


@pytest.mark.parametrize("name", [one.name for one in oracle.images() if ":" not in one.name])
def test_packed_images_of_the_reference_unpack_to_their_manifest(tmp_path: Path, name: str) -> None:
    packed = oracle.image(name)
    image("unpack", packed.bootstrap, "-D", packed.blobs, "--output", tmp_path / "out.tar")
    wanted = {path: row for path, row in manifest.load(packed.manifest).items() if row["mode"] not in ("0o140755",)}
    found = extract(tmp_path / "out.tar", tmp_path / "out")
    assert manifest.differences(wanted, found) == []


def test_blob_that_is_missing_or_damaged_leaves_no_tar(tree: Path, tmp_path: Path) -> None:
    bootstrap = create(tree, tmp_path)
    (blob,) = (tmp_path / "blobs").iterdir()
    content = bytearray(blob.read_bytes())
    content[1000] ^= 1
    blob.write_bytes(content)
    assert f"blob {blob.name} chunk" in refused("unpack", bootstrap, "-b", blob, "--output", tmp_path / "out.tar")
    blob.unlink()
    assert blob.name in refused("unpack", bootstrap, "-D", tmp_path / "blobs", "--output", tmp_path / "out.tar")
    assert "the data of the image is needed" in refused("unpack", bootstrap, "--output", tmp_path / "out.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blobs", "bootstrap"]


names = st.binary(min_size=1, max_size=40).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
entries = st.one_of(
    st.tuples(st.just("file"), st.binary(max_size=9000), st.integers(0, 0o7777)),
    st.tuples(st.just("hole"), st.integers(1, 50_000), st.integers(0, 0o777)),
    st.tuples(
        st.just("link"), st.binary(min_size=1, max_size=200).filter(lambda target: b"\0" not in target), st.just(0)
    ),
    st.tuples(st.just("fifo"), st.just(b""), st.integers(0, 0o777)),
    st.tuples(st.just("hard"), st.integers(0, 20), st.just(0)),
)
trees = st.recursive(entries, lambda inner: st.dictionaries(names, inner, max_size=6), max_leaves=25)


def plant(path: bytes, entry: object, files: list[bytes]) -> None:
    if isinstance(entry, dict):
        os.mkdir(path)
        for name, inner in entry.items():
            plant(os.path.join(path, name), inner, files)
        return
    assert isinstance(entry, tuple)
    kind, content, mode = entry
    if kind == "hard" and files:
        os.link(files[content % len(files)], path, follow_symlinks=False)
        return
    if kind == "link":
        os.symlink(content, path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        with open(path, "wb") as file:
            if kind == "hole":
                file.truncate(content)
            elif kind == "file":
                file.write(content)
    files.append(path)
    if kind != "link":
        os.chmod(path, stat.S_IMODE(mode))
        if kind == "file" and len(content) % 3 == 1:
            os.setxattr(path, "user.x", content[:300])


def with_links(found: dict[str, Row]) -> dict[str, Row]:
    """The rows with hard links named by the least of their names: which one a walk meets first is up to its order."""
    least: dict[object, str] = {}
    for path in sorted(found):
        if "same_inode_as" in found[path]:
            least.setdefault(found[path]["same_inode_as"], path)
    return {
        path: row | {"same_inode_as": least[row["same_inode_as"]]} if "same_inode_as" in row else row
        for path, row in found.items()
    }


@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])
@given(
    tree=st.dictionaries(names, trees, max_size=6), version=st.sampled_from([5, 6]), batch=st.sampled_from([0, 4096])
)
def test_unpacked_image_of_any_tree_is_that_tree(tree: dict[bytes, object], version: int, batch: int) -> None:
    work = Path(tempfile.mkdtemp())
    try:
        source = work / "tree"
        plant(os.fsencode(source), tree, [])
        wanted = with_links(manifest.walk(source))
        image_folder = work / "image"
        image_folder.mkdir()
        options = BuildOptions(
            source=source,
            blob_dir=image_folder,
            bootstrap=work / "bootstrap",
            version=version,
            chunk_size=4096,
            batch_size=batch if version == 6 else 0,
            whiteouts=Whiteouts.NONE,
            processes=1,
        )
        make_image(options)
        assert manifest.differences(wanted, with_links(rows(work / "bootstrap", image_folder))) == []
        image("unpack", work / "bootstrap", "-D", image_folder, "--output", work / "out.tar")
        again = BuildOptions(
            source=work / "out.tar",
            kind=Source.TAR_RAFS,
            blob_dir=image_folder,
            bootstrap=work / "second",
            processes=1,
        )
        make_image(again)
        assert manifest.differences(wanted, with_links(rows(work / "second", image_folder))) == []
    finally:
        shutil.rmtree(work)
