"""`nydus-image merge`: layers become one image with all marks of removed files applied."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from nydusd.image.reader import load_metadata
from tests.image.build import create, image, refused, rows, run_image
from tests.image.test_create_tar import Entry, file, folder, link, tar_of
from tests.support import manifest
from tests.support.daemon import Daemon

LAYERS: list[tuple[Entry, ...]] = [
    (
        folder("etc", mode=0o700),
        file("etc/passwd", b"root"),
        file("etc/shadow", b"secret"),
        file("opt/old/file", b"old"),
        file("opt/kept", b"kept in the lower layer"),
        file("bin/tool", b"tool"),
        link("bin/hard", "bin/tool", tarfile.LNKTYPE),
        file("replaced/by a file", b"x"),
        file("same", b"same content in two layers"),
        file(".wh.nothing", b""),
    ),
    (
        file("etc/.wh.shadow", b""),
        folder("etc", mode=0o755, uid=5),
        file("opt/.wh..wh..opq", b""),
        file("opt/new", b"new"),
        file("bin/tool", b"a newer tool"),
        file("replaced", b"now a file"),
        file("other", b"same content in two layers"),
        folder("fresh"),
        file("fresh/.wh.gone", b""),
        file("fresh/there", b"1"),
    ),
    (file(".wh.other", b""), file("other", b"removed below and added here"), file("last", b"last")),
]


def layers(tmp_path: Path, *options: str) -> list[Path]:
    """The bootstraps of all layers; the blobs are in one folder."""
    (tmp_path / "blobs").mkdir()
    made = []
    for number, entries in enumerate(LAYERS):
        tar = tmp_path / f"{number}.tar"
        tar.write_bytes(tar_of(*entries))
        made.append(tmp_path / f"{number}.boot")
        image(
            "create",
            "-t",
            "tar-rafs",
            "--whiteout-spec",
            "none",
            "-B",
            made[-1],
            "-D",
            tmp_path / "blobs",
            *options,
            tar,
        )
    return made


@pytest.mark.parametrize("options", [("-v", "5"), ("--features", "blob-toc"), ("--encrypt",)])
def test_marks_act_on_the_layers_below(tmp_path: Path, options: tuple[str, ...]) -> None:
    made = layers(tmp_path, *options)
    image("merge", "-B", tmp_path / "merged", "-J", tmp_path / "out.json", *made)
    found = rows(tmp_path / "merged", tmp_path / "blobs")
    assert set(found) == {
        *(".", "etc", "etc/passwd", "opt", "opt/new", "bin", "bin/tool", "bin/hard", "replaced", "same"),
        *("other", "fresh", "fresh/there", "last"),
    }
    assert (found["etc"]["mode"], found["etc"]["uid"]) == ("0o40755", 5)
    assert found["bin/hard"]["nlink"] == 1
    contents = {"bin/tool": b"a newer tool", "bin/hard": b"tool", "other": b"removed below and added here"}
    for path, content in contents.items():
        assert found[path]["sha256"] == hashlib.sha256(content).hexdigest()
    _, merged = load_metadata(tmp_path / "merged")
    assert json.loads((tmp_path / "out.json").read_text())["blobs"] == [blob.blob_id for blob in merged.blobs]
    if "--encrypt" not in options:
        with Daemon(tmp_path / "merged", tmp_path / "blobs") as daemon:
            assert manifest.differences(found, manifest.walk(daemon.mountpoint)) == []


def test_merging_gives_the_same_tree_as_building_layer_over_layer(tmp_path: Path) -> None:
    made = layers(tmp_path)
    image("merge", "-B", tmp_path / "merged", *made)
    parent = made[0]
    for number in (1, 2):
        target = tmp_path / f"over-{number}"
        where = ("-B", target, "-D", tmp_path / "blobs", "--parent-bootstrap", parent)
        image("create", "-t", "tar-rafs", *where, tmp_path / f"{number}.tar")
        parent = target
    wanted, found = rows(parent, tmp_path / "blobs"), rows(tmp_path / "merged", tmp_path / "blobs")
    wanted.pop(".wh.nothing", None)  # a mark of the lowest layer, which is nobody's parent
    assert manifest.differences(wanted, found) == []


def test_layers_that_hold_their_metadata_are_known_by_their_file_names(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    made: list[Path] = []
    for number, entries in enumerate(LAYERS):
        tar = tmp_path / f"{number}.tar"
        tar.write_bytes(tar_of(*entries))
        before = set(blobs.iterdir())
        options = ("--blob-inline-meta", "--features", "blob-toc", "--whiteout-spec", "none")
        image("create", "-t", "tar-rafs", "-D", blobs, *options, tar)
        made += set(blobs.iterdir()) - before
    image("merge", "-B", tmp_path / "merged", "-D", blobs, *made)
    _, merged = load_metadata(tmp_path / "merged")
    for blob in merged.blobs:
        assert blob.compressed_size == (blobs / blob.blob_id).stat().st_size
        assert blob.toc_size and any(blob.toc_digest)
    found = rows(tmp_path / "merged", blobs)
    assert found["last"]["size"] == 4
    ids = ",".join(f"{number}" * 64 for number in range(1, 4))
    sizes = ("--blob-sizes", "11,12,13", "--blob-toc-sizes", "1024,1024,1152", "--blob-toc-digests", ids)
    image("merge", "-B", tmp_path / "named", "--blob-digests", ids, *sizes, *made)
    _, named = load_metadata(tmp_path / "named")
    assert sorted((blob.blob_id, blob.compressed_size, blob.toc_size) for blob in named.blobs) == [
        ("1" * 64, 11, 1024),
        ("2" * 64, 12, 1024),
        ("3" * 64, 13, 1152),
    ]


def test_prefetch_list_and_dictionary(tmp_path: Path) -> None:
    made = layers(tmp_path)
    image("merge", "-B", tmp_path / "merged", "--prefetch-policy", "fs", *made, stdin=b"/bin/tool\n/opt\n")
    _, merged = load_metadata(tmp_path / "merged")
    folder_ino = merged.lookup(merged.root_ino, b"bin") or 0
    assert merged.prefetch_inodes() == [merged.lookup(folder_ino, b"tool"), merged.lookup(merged.root_ino, b"opt")]
    source = tmp_path / "tree"
    source.mkdir()
    (source / "copy").write_bytes(b"tool")
    (source / "own").write_bytes(b"of its own")
    layer = tmp_path / "layer.boot"
    image("create", "-B", layer, "-D", tmp_path / "blobs", "--chunk-dict", made[0], source)
    image("merge", "-B", tmp_path / "two", "--chunk-dict", f"bootstrap={made[0]}", layer)
    assert rows(tmp_path / "two", tmp_path / "blobs")["copy"]["size"] == 4


def test_layers_that_do_not_fit_end_with_status_2(tmp_path: Path) -> None:
    tar = tmp_path / "layer.tar"
    tar.write_bytes(tar_of(file("a")))
    (tmp_path / "blobs").mkdir()
    made = []
    for number, options in enumerate(([], ["--chunk-size", "4096"], ["-v", "5"], ["--repeatable"])):
        made.append(tmp_path / f"{number}")
        image("create", "-t", "tar-rafs", "-B", made[-1], "-D", tmp_path / "blobs", *options, tar)
    done = run_image("merge", "-B", tmp_path / "merged", *made[:2])
    assert done.returncode == 2 and b"chunk size 4096, but the layers before it have 1048576" in done.stderr
    assert "version 5" in refused("merge", "-B", tmp_path / "merged", made[0], made[2])
    assert "owners False" in refused("merge", "-B", tmp_path / "merged", made[0], made[3])
    assert "2 entries for 1 layers" in refused("merge", "-B", tmp_path / "merged", "--blob-sizes", "1,2", made[0])
    assert "--blob-sizes: must be numbers of bytes with commas between, but has 'x'" in refused(
        "merge", "-B", tmp_path / "merged", "--blob-sizes", "1,x", *made[:2]
    )
    assert not (tmp_path / "merged").exists()


def test_overlayfs_marks_act_on_a_parent(tmp_path: Path) -> None:
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    for name in ("a/one", "a/two", "b/three"):
        (lower / name).parent.mkdir(parents=True, exist_ok=True)
        (lower / name).write_bytes(name.encode())
    (upper / "b").mkdir(parents=True)
    (upper / "a").mkdir()
    os.mknod(upper / "a/one", 0o020000, 0)
    os.setxattr(upper / "b", "trusted.overlay.opaque", b"y")
    (upper / "b/four").write_bytes(b"four")
    parent = create(lower, tmp_path / "out")
    target = tmp_path / "out" / "over"
    where = ("-B", target, "-D", tmp_path / "out/blobs", "--parent-bootstrap", parent)
    image("create", *where, "--whiteout-spec", "overlayfs", upper)
    found = rows(target, tmp_path / "out/blobs")
    assert set(found) == {".", "a", "a/two", "b", "b/four"} and "xattrs" not in found["b"]
    shutil.rmtree(lower)
