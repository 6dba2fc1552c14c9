"""A fork server for a test. The test's process is the parent of orphans, as a supervisor is (`discipline.start` sees to it)."""

from __future__ import annotations

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
