"""`nydus-image compact`: fewer blobs, the same tree."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bench.erofs import erofs_mount
from nydusd.cli.image.blobs import FolderFirst
from nydusd.image.compact import CompactOptions, compact
from nydusd.image.reader import ImageReader, load_metadata
from nydusd.storage.backend import make_backend
from tests.image.build import create, image, refused, rows
from tests.support import manifest, oracle

KINDS = [
    (),
    ("-v", "5", "--compressor", "lz4_block", "--digester", "sha256"),
    ("--encrypt", "--chunk-size", "0x10000", "--batch-size", "0x10000"),
    ("--features", "blob-toc", "--compressor", "none"),
]


def layer(tmp_path: Path, number: int, options: tuple[str, ...]) -> Path:
    """One of three layers: files of its own, and one that hides what is in the layer below."""
    source = random.Random(number)
    top = tmp_path / f"tree{number}"
    for name, size in (("common", 70_000), (f"own{number}", 200_000), (f"shared/{number}", 5), ("shared/last", 100)):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(source.randbytes(size))
    (top / "same").write_bytes(b"the same in all layers" * 500)
    if number:
        (top / f".wh.own{number - 1}").touch()
    out = tmp_path / "image"
    out.mkdir(exist_ok=True)
    made = create(top, out, *options, "--whiteout-spec", "none")
    return made.rename(out / f"layer{number}")


def merged(tmp_path: Path, options: tuple[str, ...], count: int = 3) -> tuple[Path, Path]:
    """An image of several layers, and the folder with its blobs."""
    layers = [layer(tmp_path, number, options) for number in range(count)]
    bootstrap = tmp_path / "image" / "bootstrap"
    image("merge", "-B", bootstrap, *layers)
    return bootstrap, tmp_path / "image" / "blobs"


def ids(bootstrap: Path) -> list[str]:
    return [blob.blob_id for blob in load_metadata(bootstrap)[1].blobs]


@pytest.mark.parametrize("options", KINDS, ids=lambda options: " ".join(options) or "default")
def test_small_blobs_become_one(tmp_path: Path, options: tuple[str, ...]) -> None:
    bootstrap, blobs = merged(tmp_path, options)
    before, old = rows(bootstrap, blobs), ids(bootstrap)
    assert len(old) == 3
    said = image("compact", bootstrap, "-D", blobs, "-J", tmp_path / "summary")
    target = bootstrap.with_name("bootstrap.compact")
    _, found = load_metadata(target)
    (blob,) = found.blobs
    assert json.loads((tmp_path / "summary").read_bytes())["blobs"] == [blob.blob_id]
    for gone in old:
        assert f"not needed any more: {gone}" in said
        (blobs / gone).unlink()
    assert manifest.differences(before, rows(target, blobs)) == []
    image("check", target, "-D", blobs)
    # The three of `own2`, and `common`, `same`, and the small ones, each once: what upper layers hide is not there.
    size = found.chunk_size
    assert blob.chunk_count == -(-200_000 // size) + -(-70_000 // size) + 1 + 3 + 1
    assert bool(blob.cipher) == ("--encrypt" in options)


def test_kernel_mounts_a_compacted_image(tmp_path: Path) -> None:
    bootstrap, blobs = merged(tmp_path, ())
    before = rows(bootstrap, blobs)
    image("compact", "-B", bootstrap, "-D", blobs, "-O", tmp_path / "compacted")
    image("export", "--block", "-B", tmp_path / "compacted", "-D", blobs, "-O", tmp_path / "disk")
    point = tmp_path / "mnt"
    point.mkdir()
    with erofs_mount(tmp_path / "disk", [], point):
        assert manifest.differences(before, manifest.walk(point)) == []


def test_blobs_are_written_anew_by_how_much_of_them_is_used(tmp_path: Path) -> None:
    """Layer 0 keeps 5 of 280,000 bytes, layer 1 also little, layer 2 all."""
    bootstrap, blobs = merged(tmp_path, ())
    old, before = ids(bootstrap), rows(bootstrap, blobs)
    sizes = {blob.blob_id: blob.compressed_size for blob in load_metadata(bootstrap)[1].blobs}
    used = [0, 0, 0]
    for chunk in load_metadata(bootstrap)[1].raw_chunks():
        used[chunk.blob_index] += chunk.csize
    full = old[used.index(max(used))]
    where = ("compact", bootstrap, "-D", blobs, "--compact-blob-size", "0")
    image(*where, "-O", tmp_path / "kept")
    assert ids(tmp_path / "kept") == old
    image(*where, "--min-used-ratio", "50", "-O", tmp_path / "anew")
    made = ids(tmp_path / "anew")
    assert len(made) == 3 and set(made) & set(old) == {full}
    assert all((blobs / name).stat().st_size < sizes[full] / 2 for name in made if name != full)
    assert manifest.differences(before, rows(tmp_path / "anew", blobs)) == []


def test_blobs_are_put_together_up_to_a_size(tmp_path: Path) -> None:
    bootstrap, blobs = merged(tmp_path, ("--compressor", "none"), count=4)
    before = rows(bootstrap, blobs)
    image("compact", bootstrap, "-D", blobs, "--max-compact-size", "250000", "-O", tmp_path / "out")
    assert len(ids(tmp_path / "out")) == 2
    assert manifest.differences(before, rows(tmp_path / "out", blobs)) == []
    assert "fewer than 5" in image("compact", bootstrap, "-D", blobs, "--layers-to-compact", "5", "-O", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_chunks_of_a_dictionary_are_referred_to_and_its_blobs_stay(tmp_path: Path) -> None:
    bootstrap, blobs = merged(tmp_path, ())
    before = rows(bootstrap, blobs)
    top = tmp_path / "dictionary"
    top.mkdir()
    (top / "x").write_bytes(b"the same in all layers" * 500)
    dictionary = create(top, tmp_path / "dict").rename(tmp_path / "dict" / "boot")
    (blob,) = (tmp_path / "dict" / "blobs").iterdir()
    blob.rename(blobs / blob.name)
    target = tmp_path / "out"
    image("compact", bootstrap, "-D", blobs, "--chunk-dict", f"bootstrap={dictionary}", "-O", target)
    made = ids(target)
    assert len(made) == 2 and blob.name in made
    assert manifest.differences(before, rows(target, blobs)) == []


def test_layers_that_an_image_refers_to_stay(tmp_path: Path) -> None:
    packed = oracle.image("v6-targz-ref")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in packed.blobs.iterdir():
        (blobs / path.name).symlink_to(path)
    image("compact", packed.bootstrap, "-D", blobs, "--min-used-ratio", "99", "-O", tmp_path / "out")
    assert ids(tmp_path / "out") == ids(packed.bootstrap)
    assert manifest.differences(manifest.load(packed.manifest), rows(tmp_path / "out", blobs)) == []
    packed = oracle.image("v6-tarfs")
    assert "a tar that the kernel mounts" in refused("compact", packed.bootstrap, "-D", blobs, "-O", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_blobs_that_are_not_in_the_folder_come_from_the_backend(tmp_path: Path) -> None:
    bootstrap, blobs = merged(tmp_path, ())
    before, folder = rows(bootstrap, blobs), tmp_path / "folder"
    folder.mkdir()
    first, *others = ids(bootstrap)
    (blobs / first).rename(folder / first)
    where = ("compact", bootstrap, "-D", folder, "-O", tmp_path / "out")
    assert f"{others[0]}" in refused(*where)
    assert not (tmp_path / "out").exists() and [path.name for path in folder.iterdir()] == [first]
    both = FolderFirst(folder, make_backend("localfs", {"dir": str(blobs)}))
    with ImageReader(bootstrap, both) as reader:
        compact(reader, "image", CompactOptions(tmp_path / "out", folder, quiet=True))
    assert manifest.differences(before, rows(tmp_path / "out", folder)) == []


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--min-used-ratio", "100"), "must be from 0 to 99"),
        (("--layers-to-compact", "-1"), "must be a number"),
        (("--compact-blob-size", "x"), "must be a number of bytes"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, option: tuple[str, str], words: str) -> None:
    assert words in refused("compact", tmp_path / "boot", "-D", tmp_path, *option)
