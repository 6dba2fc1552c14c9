"""Packing a nydus image as an OCI image, as its clients look for one, and pushing it to a registry.

Two layers: the data blob as it is, which a snapshotter with nydus support never downloads, and a gzipped tar with the
bootstrap. Media types and annotations tell which is which.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping

from tests.containerd.images import Image
from tests.support.registry import DockerRegistry

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
DATA_LAYER = "application/vnd.oci.image.layer.nydus.blob.v1"
META_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_ANNOTATION = "containerd.io/snapshot/nydus-"


def push_image(registry: DockerRegistry, repo: str, image: Image, headers: Mapping[str, str] | None = None) -> str:
    """Push `image`, `headers` with each request, and give the reference to pull it by."""
    blob = image.blob.read_bytes()
    layer_tar = _bootstrap_tar(image.bootstrap.read_bytes())
    layer = gzip.compress(layer_tar, compresslevel=1, mtime=0)
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["/bin/sh"]},
        # The plain form of the data blob is the blob itself: nothing unpacks it.
        "rootfs": {"type": "layers", "diff_ids": [_digest(blob), _digest(layer_tar)]},
    }
    config_text = json.dumps(config).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _descriptor(CONFIG, config_text, {}),
        "layers": [
            _descriptor(DATA_LAYER, blob, {f"{_ANNOTATION}blob": "true"}),
            _descriptor(META_LAYER, layer, {f"{_ANNOTATION}bootstrap": "true", f"{_ANNOTATION}fs-version": "6"}),
        ],
    }
    for data in (blob, layer, config_text):
        registry.push(repo, data, hashlib.sha256(data).hexdigest(), headers)
    registry.push_manifest(repo, image.name, MANIFEST, json.dumps(manifest).encode(), headers)
    return f"{registry.host}/{repo}:{image.name}"


def _bootstrap_tar(bootstrap: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        folder = tarfile.TarInfo("image")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(folder)
        file = tarfile.TarInfo("image/image.boot")
        file.size, file.mode = len(bootstrap), 0o444
        tar.addfile(file, io.BytesIO(bootstrap))
    return out.getvalue()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _descriptor(media_type: str, data: bytes, annotations: dict[str, str]) -> dict[str, object]:
    found: dict[str, object] = {"mediaType": media_type, "digest": _digest(data), "size": len(data)}
    return {**found, "annotations": annotations} if annotations else found
