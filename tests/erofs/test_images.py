"""Every packed v6 image through the kernel's EROFS: what the manifest says, cold, and warm without the blobs."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest

from tests.support import manifest
from tests.support.daemon import Daemon
from tests.support.oracle import Image, fewer_images, image

V6 = [image for image in fewer_images() if "v6" in image.name]
KERNEL_DIFFERS = {"v6-tarfs": "long-symlink", "large:v6-tarfs": "long-symlink"}
"""Where the reference's builder stored a target in a way that the kernel reads as a shorter one."""


def differences(image: Image, mountpoint: Path) -> list[str]:
    found = manifest.differences(manifest.load(image.manifest), manifest.walk(mountpoint))
    known = KERNEL_DIFFERS.get(image.name)
    return [line for line in found if known is None or known not in line]


@pytest.mark.parametrize("image", V6, ids=lambda image: image.name)
def test_the_kernel_shows_the_manifest_cold_and_warm_without_blobs(image: Image, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    cache = tmp_path / "cache"
    shutil.copytree(image.blobs, blobs)
    bootstrap = blobs / image.bootstrap.name if image.bootstrap.parent == image.blobs else image.bootstrap

    with Daemon(bootstrap, blobs, cache=cache, verb="erofs", args=("--driver", "fanotify")) as daemon:
        assert differences(image, daemon.mountpoint) == []
        assert daemon.backend_reads() > 0

    if bootstrap.parent == blobs:
        return  # the metadata is in the blob
    for blob in blobs.iterdir():
        blob.rename(tmp_path / f"away-{blob.name}")
    with Daemon(bootstrap, blobs, cache=cache, verb="erofs", args=("--driver", "fanotify")) as daemon:
        assert differences(image, daemon.mountpoint) == []
        assert daemon.backend_reads() == 0


def test_an_image_of_v5_is_refused_with_the_way_that_reads_it(tmp_path: Path, expect_log: object) -> None:
    old = image("v5-zstd-blake3")
    daemon = Daemon(old.bootstrap, old.blobs, verb="erofs", args=("--driver", "fanotify"))
    with pytest.raises(AssertionError, match="use `nydusd fuse`"):
        daemon.start()
    shutil.rmtree(daemon.folder)


@pytest.mark.parametrize(
    ("name", "driver"),
    [
        ("v6-zstd-blake3", "fanotify"),
        ("v6-zstd-blake3", "blobfs"),
        ("v6-tarfs", "fanotify"),
        ("v6-tarfs", "tarfs"),
    ],
)
def test_an_image_whose_folders_the_kernel_would_read_from_a_blob_is_refused(
    name: str, driver: str, tmp_path: Path
) -> None:
    what = image(name)
    damaged = bytearray(what.bootstrap.read_bytes())
    struct.pack_into("<I", damaged, 1408 + 68, 1)
    bootstrap = tmp_path / "bootstrap"
    bootstrap.write_bytes(damaged)
    daemon = Daemon(bootstrap, what.blobs, verb="erofs", args=("--driver", driver))
    with pytest.raises(AssertionError, match="use `nydusd fuse`") as e:
        daemon.start()
    assert f"{bootstrap}: devices[0].mapped_blkaddr: " in str(e.value)
    assert "is mounted at" not in str(e.value)
    shutil.rmtree(daemon.folder)
