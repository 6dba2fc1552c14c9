"""A fork server for a test. The test's process is the parent of orphans meanwhile, as a supervisor is."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from nydusd.forkserver import client


@contextmanager
def fork_server() -> Iterator[client.ForkServer]:
    server = client.ForkServer()
    try:
        yield server
    finally:
        server.close()
        ctypes.CDLL(None).prctl(client._SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        client._take_in_orphans.cache_clear()
