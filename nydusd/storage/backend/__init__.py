"""Where stored blobs come from. `make_backend` is the only door: it imports the kind that is asked for and no other."""

from __future__ import annotations

from collections.abc import Mapping

from nydusd.errors import UnsupportedError
from nydusd.storage.backend.base import BlobBackend

MODULES = {
    "localfs": f"{__name__}.localfs",
    "localdisk": f"{__name__}.localdisk",
    "registry": f"{__name__}.registry.backend",
    "oss": f"{__name__}.oss",
    "s3": f"{__name__}.s3",
    "http-proxy": f"{__name__}.http_proxy",
}
"""What `make_backend` imports for each kind: whoever knows which kind is needed may have it imported before."""
SUPPORTED = tuple(MODULES)


def make_backend(kind: str, config: Mapping[str, object], shared_fd: int = -1) -> BlobBackend:
    """The backend that `config` (the object beside the type in the configuration) describes.

    `shared_fd` is the memfd by which the workers of a daemon share what they learn about servers (`http/store.py`); -1
    keeps that to this process. Raises `UnsupportedError` for a kind this version does not have, `ConfigError` for a
    wrong key.
    """
    if kind == "localfs":
        from nydusd.storage.backend.localfs import LocalFs

        return LocalFs.from_config(config)
    if kind == "localdisk":
        from nydusd.storage.backend.localdisk import LocalDisk

        return LocalDisk.from_config(config)
    if kind == "oss":
        from nydusd.storage.backend.oss import OssBackend

        return OssBackend.from_config(config, shared_fd)
    if kind == "s3":
        from nydusd.storage.backend.s3 import S3Backend

        return S3Backend.from_config(config, shared_fd)
    if kind == "http-proxy":
        from nydusd.storage.backend.http_proxy import HttpProxyBackend

        return HttpProxyBackend.from_config(config, shared_fd)
    if kind == "registry":
        from nydusd.storage.backend.registry.backend import RegistryBackend

        return RegistryBackend.from_config(config, shared_fd)
    raise UnsupportedError(f"backend type {kind!r} is not supported; use one of: {', '.join(SUPPORTED)}")
