"""Packed images on real mounts over real backends: all of them over a registry, some over each of the others.

(`tests/e2e/test_images.py` mounts all of them over local files; `test_image_matrix.py` decodes all of them over all others.)
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support import manifest
from tests.support.backends import REPO
from tests.support.daemon import Daemon
from tests.support.forward_proxy import forward_proxy
from tests.support.object_server import ObjectServer, object_server
from tests.support.oracle import image
from tests.support.places import IMAGES, place, stored
from tests.support.registry import DockerRegistry, docker_registry
from tests.support.s3_server import S3Server

SOME = [
    ("s3", "v6-targz-ref"),
    ("oss", "v5-zstd-blake3"),
    ("http-proxy unix", "v6-batch"),
    ("localdisk image", "v6-encrypt"),
    ("localdisk image", "v5-aligned"),
]
"""The first image has two blobs, gzip streams as they came, and needs its metadata for its dictionaries."""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    """Debian's docker-registry with every blob that is named by its digest."""
    with docker_registry(tmp_path_factory.mktemp("registry")) as registry:
        for blob_id, data in stored().items():
            if sha256(data).hexdigest() == blob_id:
                registry.push(REPO, data, blob_id)
        yield registry


@pytest.fixture(scope="module")
def other_registry() -> Iterator[ObjectServer]:
    """Old builders named blobs with metadata inside by something else; no registry takes those any more."""
    others = {blob_id: data for blob_id, data in stored().items() if sha256(data).hexdigest() != blob_id}
    objects = {f"/v2/{REPO}/blobs/sha256:{blob_id}": data for blob_id, data in others.items()}
    with object_server(objects) as server:
        yield server


def check(name: str, tmp_path: Path, kind: str, table: dict[str, object]) -> None:
    """Mount an image over a backend and compare all of it with its manifest."""
    chosen = image(name)
    config: dict[str, object] = {
        "version": 2,
        "backend": {"type": kind, kind: table},
        "cache": {"type": "blobcache", "filecache": {"work_dir": str(tmp_path / "cache")}},
        "rafs": {"mode": "direct", "enable_xattr": True},
    }
    with Daemon(chosen.bootstrap, chosen.blobs, config=config) as daemon:
        assert manifest.differences(manifest.load(chosen.manifest), manifest.walk(daemon.mountpoint)) == []
        assert daemon.backend_reads() > 0


@pytest.mark.parametrize("name", IMAGES)
def test_every_image_over_a_registry(
    registry: DockerRegistry, other_registry: ObjectServer, tmp_path: Path, name: str
) -> None:
    by_digest = all(sha256(path.read_bytes()).hexdigest() == path.name for path in image(name).blobs.iterdir())
    host = registry.host if by_digest else other_registry.address
    check(name, tmp_path, "registry", {"scheme": "http", "host": host, "repo": REPO})


@pytest.mark.parametrize(("where", "name"), SOME)
def test_some_images_over_every_backend(s3: S3Server, tmp_path: Path, where: str, name: str) -> None:
    with place(where, tmp_path, s3) as (kind, table):
        if kind != "oss":
            check(name, tmp_path, kind, table)
            return
        # The bucket is a part of the host's name, which only the proxy can find.
        bucket = f"{table['bucket_name']}.{table['endpoint']}"
        port = urlsplit(f"http://{bucket}").port
        with forward_proxy({bucket: f"127.0.0.1:{port}"}) as proxy:
            check(name, tmp_path, kind, table | {"proxy": {"url": proxy.url, "fallback": False}})
