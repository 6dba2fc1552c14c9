"""A front end's line to the supervisor, made where file descriptors may be used up: it is not made then, and can be later.

Runs in the front ends. ZeroMQ opens a dozen file descriptors for its first socket, and ends the process where it gets some and
then no more. So it is seen to before that there are enough. Nothing here outlives the process.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from nydusd.errors import cache_error, is_scarce

if TYPE_CHECKING:
    from nydusd.ipc.client import ChunkClient

_ROOM = 16
"""File descriptors that must be free: ZeroMQ takes 8, loading it one at a time."""


def open_line(endpoint: str, identity: bytes) -> ChunkClient:
    """The line of the front end `identity`. Raises ScarceError while there are too few file descriptors for it."""
    try:
        with contextlib.ExitStack() as taken:
            for _ in range(_ROOM):
                taken.callback(os.close, os.dup(0))
        from nydusd.ipc.client import ChunkClient  # loads ZeroMQ

        return ChunkClient(endpoint, identity)
    except OSError as e:
        if is_scarce(e):
            raise cache_error("the line to the supervisor", e) from e
        raise
