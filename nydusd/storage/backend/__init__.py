"""Where stored blobs come from. `make_backend` is the only door: it imports the kind that is asked for and no other."""

from __future__ import annotations

from collections.abc import Mapping

from nydusd.errors import UnsupportedError
from nydusd.storage.backend.base import BlobBackend

SUPPORTED = ("localfs",)


def make_backend(kind: str, config: Mapping[str, object]) -> BlobBackend:
    """The backend that `config` (the object beside the type in the configuration) describes.

    Raises `UnsupportedError` for a kind this version does not have, `ConfigError` for a wrong key.
    """
    if kind == "localfs":
        from nydusd.storage.backend.localfs import LocalFs

        return LocalFs.from_config(config)
    raise UnsupportedError(f"backend type {kind!r} is not supported; use one of: {', '.join(SUPPORTED)}")
