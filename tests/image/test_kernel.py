"""Images, however they were made: the kernel mounts the disk image that `export` writes, and Debian's tools read them."""

from __future__ import annotations

import gzip
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.erofs import erofs_mount
from nydusd.formats.model import Bootstrap
from nydusd.formats.rafs_v6_super import SLOT_SIZE, SLOTS_OFFSET
from nydusd.image.reader import load_metadata
from tests.image.build import create, image, rows
from tests.image.test_convert import layers as oci_layers
from tests.image.test_convert import source_layout, unpacked
from tests.image.test_create_reference import GZIP_LAYER, refer
from tests.image.test_create_tar import file, folder, tar_of
from tests.image.test_merge import layers
from tests.support import manifest

MAPPED_AT = 68
Made = tuple[Path, Path]
"""A bootstrap, and the folder of its blobs."""


def merged(_: Path, work: Path) -> Made:
    image("merge", "-B", work / "merged", *layers(work))
    return work / "merged", work / "blobs"


def over_parent(tree: Path, work: Path) -> Made:
    parent = create(tree, work / "out")
    (work / "upper.tar").write_bytes(tar_of(file("many/.wh.0000-", b""), file("many/new", bytes(9000)), folder("d0")))
    where = ("-B", work / "over", "-D", work / "out/blobs", "--parent-bootstrap", parent)
    image("create", "-t", "tar-rafs", *where, work / "upper.tar")
    return work / "over", work / "out/blobs"


def with_dictionary(tree: Path, work: Path) -> Made:
    dictionary = create(tree / "many", work / "out")
    image("create", "-B", work / "image", "-D", work / "out/blobs", "--chunk-dict", f"bootstrap={dictionary}", tree)
    return work / "image", work / "out/blobs"


def inline(tree: Path, work: Path) -> Made:
    blob = create(tree, work, "--blob-inline-meta")
    return blob, work / "blobs"


def gzip_layer(_: Path, work: Path) -> Made:
    return refer(GZIP_LAYER, work, "targz-ref"), work / "blobs"


def estargz_layer(_: Path, work: Path) -> Made:
    entries = (file("stargz.index.json", b"{}"), file("folder/data", b"d" * 70_000), file("other", b"o" * 5000))
    (work / "layer.tgz").write_bytes(gzip.compress(tar_of(*entries)))
    return refer(work / "layer.tgz", work, "estargz-ref"), work / "blobs"


def merged_tarfs(_: Path, work: Path) -> Made:
    made = []
    (work / "blobs").mkdir()
    for number, entries in enumerate(((file("a/lower", b"l" * 5000),), (file("a/upper", b"u" * 700), file("b")))):
        (work / f"{number}.tar").write_bytes(tar_of(*entries))
        made.append(refer(work / f"{number}.tar", work / str(number), "tar-tarfs"))
        (tar,) = (work / str(number) / "blobs").iterdir()
        tar.rename(work / "blobs" / tar.name)
    image("merge", "-B", work / "merged", *made)
    return work / "merged", work / "blobs"


def converted(_: Path, work: Path) -> Made:
    source = source_layout(work, oci_layers())
    image("convert", source, work / "out", "--platform", "linux/amd64")
    unpacked(work / "out", "", work)
    return work / "image/image.boot", work / "out/blobs/sha256"


Way = Callable[[Path, Path], Made]
SEPARATE: tuple[Way, ...] = (merged, over_parent, with_dictionary, inline, gzip_layer, estargz_layer, converted)


@pytest.mark.parametrize("way", [*SEPARATE, merged_tarfs])
def test_kernel_and_debian_s_tools_read_images_however_they_were_made(tree: Path, tmp_path: Path, way: Way) -> None:
    bootstrap, blobs = way(tree, tmp_path)
    disk, point = tmp_path / "disk", tmp_path / "mnt"
    image("export", "--block", "-B", bootstrap, "-D", blobs, "-O", disk)
    point.mkdir()
    with erofs_mount(disk, [], point):
        assert manifest.differences(rows(bootstrap, blobs), manifest.walk(point)) == []
    if way in SEPARATE:  # erofs-utils do not know blocks of 512 bytes
        metadata, parsed = load_metadata(bootstrap)
        (tmp_path / "metadata").write_bytes(metadata)
        command: list[str | Path] = ["fsck.erofs", *devices(parsed, disk), tmp_path / "metadata"]
        checked = subprocess.run(command, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def devices(bootstrap: Bootstrap, disk: Path) -> list[str]:
    """The plain blobs of an image, cut out of its disk image, as options of erofs-utils."""
    data, found = disk.read_bytes(), []
    for blob in bootstrap.blobs:
        at = SLOTS_OFFSET + SLOT_SIZE * blob.index + MAPPED_AT
        begin = int.from_bytes(data[at : at + 4], "little") * 4096
        plain = disk.with_name(f"plain-{blob.index}")
        plain.write_bytes(data[begin : begin + -(-blob.uncompressed_size // 4096) * 4096])
        found.append(f"--device={plain}")
    return found
