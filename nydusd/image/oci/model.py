"""The JSON of OCI images: manifests and descriptors, read from untrusted bytes. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Protocol

from nydusd.image.errors import ImageError

Json = dict[str, object]

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
NYDUS_BLOB = "application/vnd.oci.image.layer.nydus.blob.v1"
INDEXES, MANIFESTS = (OCI_INDEX, DOCKER_LIST), (OCI_MANIFEST, DOCKER_MANIFEST)

MAX_JSON = 4 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Store(Protocol):
    """Where an image is, or goes. All methods raise `ImageError`."""

    def manifest(self) -> tuple[bytes, str]:
        """The manifest or index that the reference names, and its media type."""

    def manifest_of(self, descriptor: Mapping[str, object]) -> bytes:
        """A manifest that an index names."""

    def fetch(self, descriptor: Mapping[str, object], path: str) -> None:
        """Write a blob to a file; its digest is checked."""

    def has(self, digest: str) -> bool:
        """Whether a blob is there already."""

    def put(self, path: str, digest: str, size: int) -> None:
        """Store the content of a file as a blob."""

    def tag(self, manifest: bytes, media_type: str) -> None:
        """Store a manifest and let the reference name it."""

    def close(self) -> None:
        """End all connections. The next use opens others, also in another process (a fork)."""


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def parse(data: bytes, what: str) -> Json:
    """A JSON object of at most 4 MiB. Raises `ImageError`."""
    if len(data) > MAX_JSON:
        raise ImageError(f"{what}: {len(data)} bytes; at most {MAX_JSON} are read")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{what}: no valid JSON") from error
    if not isinstance(value, dict):
        raise ImageError(f"{what}: no JSON object")
    return value


def descriptors(value: object, what: str) -> list[Json]:
    """A list of descriptors, each with a sha256 digest, a size and a media type."""
    if not isinstance(value, list) or len(value) > 1024:
        raise ImageError(f"{what}: a list of at most 1024 descriptors is expected")
    for one in value:
        descriptor(one, what)
    return value


def descriptor(value: object, what: str) -> Json:
    """One descriptor, checked."""
    if (
        not isinstance(value, dict)
        or not isinstance(value.get("digest"), str)
        or not isinstance(value.get("size"), int)
    ):
        raise ImageError(f"{what}: a descriptor with digest and size is expected, but it is {str(value)[:120]}")
    if isinstance(value["size"], bool) or not 0 <= value["size"] < 1 << 63:
        raise ImageError(f"{what}: a size of {value['size']!r:.40} bytes; 0 to 2^63 are possible")
    if not _DIGEST.fullmatch(value["digest"]):
        raise ImageError(f"{what}: digest {value['digest'][:100]!r}; sha256: and 64 hexadecimal digits are expected")
    return value


def packed(value: Json) -> bytes:
    """The bytes of a manifest or config that we make: the same for the same content."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
