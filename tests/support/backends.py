"""Backends over HTTP for tests: quick to give up, and blobs to read."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
from collections.abc import Iterator
from typing import Any

from nydusd.storage.backend import make_backend
from nydusd.storage.backend.http.base import HttpBackend
from nydusd.storage.backend.http.breaker import Policy
from nydusd.storage.backend.http.fetch import Timing
from nydusd.storage.backend.registry.backend import RegistryBackend

QUICK = Timing(
    retries=3,
    backoff=0.001,
    longest_backoff=0.01,
    user=20.0,
    longest_wait=0.2,
    throttled=0.05,
    breaker=Policy(limit=100, pause=60.0, longest=60.0),
)
"""Retries without much waiting, and no breaker to come between."""

REPO = "shop/frontend"


class Blob:
    """Bytes that look like nothing else, under their digest."""

    def __init__(self, size: int = 300_000, seed: int = 1) -> None:
        self.data = random.Random(seed).randbytes(size)
        self.id = hashlib.sha256(self.data).hexdigest()
        self.path = f"/v2/{REPO}/blobs/sha256:{self.id}"


@contextlib.contextmanager
def registry_backend(
    host: str, shared_fd: int = -1, timing: Timing | None = None, **config: Any
) -> Iterator[RegistryBackend]:
    """A registry backend for a `with` block, quick unless `timing` says otherwise."""
    table = {"scheme": "http", "host": host, "repo": REPO, "timeout": 1, "connect_timeout": 2, **config}
    backend = make_backend("registry", table, shared_fd)
    assert isinstance(backend, RegistryBackend)
    try:
        set_timing(backend, timing or QUICK)
        yield backend
    finally:
        backend.close()


def set_timing(backend: HttpBackend, timing: Timing) -> None:
    """Before the first request."""
    backend.timing = dataclasses.replace(timing)
