"""`nydus-image export`: the kernel's EROFS mounts the disk image without any other file."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.erofs import erofs_mount
from tests.image.build import create, image, refused
from tests.support import manifest, oracle
from tests.support.manifest import Row


@pytest.mark.parametrize("options", [(), ("--encrypt", "--batch-size", "0x10000", "--chunk-size", "0x10000")])
def test_kernel_mounts_the_disk_image(
    tree: Path, expected: dict[str, Row], tmp_path: Path, options: tuple[str, ...]
) -> None:
    bootstrap = create(tree, tmp_path, *options)
    image("export", "--block", "-B", bootstrap, "-D", tmp_path / "blobs", "-O", tmp_path / "disk")
    point = tmp_path / "mnt"
    point.mkdir()
    with erofs_mount(tmp_path / "disk", [], point):
        assert manifest.differences(expected, manifest.walk(point)) == []


@pytest.mark.parametrize("name", ["v6-targz-ref", "v6-tarfs"])
def test_images_that_refer_to_a_layer_are_exported(tmp_path: Path, name: str) -> None:
    packed = oracle.image(name)
    image("export", "--block", "-B", packed.bootstrap, "-D", packed.blobs, "-O", tmp_path / "disk")
    point = tmp_path / "mnt"
    point.mkdir()
    with erofs_mount(tmp_path / "disk", [], point):
        found = manifest.walk(point)
    wrong = manifest.differences(manifest.load(packed.manifest), found)
    assert [line for line in wrong if not line.startswith("long-symlink")] == []


def test_what_cannot_be_exported_is_refused(tree: Path, tmp_path: Path) -> None:
    bootstrap = create(tree, tmp_path, "-v", "5")
    where = ("-D", tmp_path / "blobs", "-O", tmp_path / "disk")
    assert "only v6 images" in refused("export", "--block", "-B", bootstrap, *where)
    assert "--output is needed" in refused("export", "--block", "-B", bootstrap)
    assert not (tmp_path / "disk").exists()
