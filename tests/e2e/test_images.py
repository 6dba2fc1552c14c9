"""Packed images through the real mount: what the manifest says, cold, and warm without the blobs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support import manifest
from tests.support.daemon import Daemon
from tests.support.oracle import Image, fewer_images


@pytest.mark.parametrize("image", fewer_images(), ids=lambda image: image.name)
def test_image_shows_its_manifest_cold_and_warm_without_blobs(image: Image, tmp_path: Path) -> None:
    expected = manifest.load(image.manifest)
    blobs = tmp_path / "blobs"
    cache = tmp_path / "cache"
    shutil.copytree(image.blobs, blobs)

    with Daemon(image.bootstrap, blobs, cache=cache) as daemon:
        assert manifest.differences(expected, manifest.walk(daemon.mountpoint)) == []
        assert daemon.backend_reads() > 0

    for blob in blobs.iterdir():
        blob.rename(tmp_path / f"away-{blob.name}")
    with Daemon(image.bootstrap, blobs, cache=cache) as daemon:
        assert manifest.differences(expected, manifest.walk(daemon.mountpoint)) == []
        assert daemon.backend_reads() == 0
