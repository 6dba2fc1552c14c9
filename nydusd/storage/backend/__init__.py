"""Where stored blobs come from. `make_backend` is the only door: it imports the kind that is asked for and no other."""

from __future__ import annotations

from collections.abc import Mapping

from nydusd.errors import UnsupportedError
from nydusd.storage.backend.base import BlobBackend

SUPPORTED = ("localfs", "registry")


def make_backend(kind: str, config: Mapping[str, object], shared_fd: int = -1) -> BlobBackend:
    """The backend that `config` (the object beside the type in the configuration) describes.

    `shared_fd` is the memfd by which the workers of a daemon share what they learn about servers (`http/store.py`); -1
    keeps that to this process. Raises `UnsupportedError` for a kind this version does not have, `ConfigError` for a
    wrong key.
    """
    if kind == "localfs":
        from nydusd.storage.backend.localfs import LocalFs

        return LocalFs.from_config(config)
    if kind == "registry":
        from nydusd.storage.backend.registry.backend import RegistryBackend

        return RegistryBackend.from_config(config, shared_fd)
    raise UnsupportedError(f"backend type {kind!r} is not supported; use one of: {', '.join(SUPPORTED)}")
