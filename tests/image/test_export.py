"""`nydus-image export`: the kernel's EROFS mounts the disk image without any other file."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.erofs import erofs_mount
from nydusd.image.output import Output
from nydusd.image.verity import add_verity
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


def veritysetup(disk: Path, options: list[str]) -> bool:
    """Whether Debian's tool finds every block of the disk to be what its digests say."""
    *options, root = options
    command = ["veritysetup", "verify", *options, str(disk), str(disk), root]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("name", ["v6-none-sha256", "v6-tarfs"])
def test_verity_data_is_that_of_the_kernel(tmp_path: Path, name: str) -> None:
    packed, disk = oracle.image(name), tmp_path / "disk"
    where = ("-B", packed.bootstrap, "-D", packed.blobs, "-O", disk)
    image("export", "--block", *where)
    plain = disk.read_bytes()
    said = image("export", "--block", *where, "--verity", "--threads", "2").splitlines()
    (line,) = (line for line in said if line.startswith("dm-verity options: "))
    options = [word if word != '""' else "-" for word in line.split(": ", 1)[1].split()]
    made = disk.read_bytes()
    assert made.startswith(plain) and said[0] == f"{disk}: {len(made)} bytes"
    assert veritysetup(disk, options)
    for at in (1500, len(plain) - 1, len(made) - 1):
        disk.write_bytes(made[:at] + bytes([made[at] ^ 1]) + made[at + 1 :])
        assert not veritysetup(disk, options)


@pytest.mark.parametrize("blocks", [1, 2, 128, 129, 16_385])
@pytest.mark.parametrize("unit", [512, 4096])
def test_levels_of_digests_are_those_of_veritysetup(tmp_path: Path, blocks: int, unit: int) -> None:
    size = blocks * unit
    with Output(tmp_path) as out:
        out.put(0, b"begin" * 100)
        out.put(size // 2, b"middle")
        out.extend(size)
        found = add_verity(out, size, unit)
        out.publish(tmp_path / "disk")
    assert found.size == (tmp_path / "disk").stat().st_size or blocks == 1
    assert veritysetup(tmp_path / "disk", [word if word != '""' else "-" for word in found.options().split()])


def test_what_cannot_be_exported_is_refused(tree: Path, tmp_path: Path) -> None:
    bootstrap = create(tree, tmp_path, "-v", "5")
    where = ("-D", tmp_path / "blobs", "-O", tmp_path / "disk")
    assert "only v6 images" in refused("export", "--block", "-B", bootstrap, *where)
    assert "--output is needed" in refused("export", "--block", "-B", bootstrap)
    assert not (tmp_path / "disk").exists()
