"""The copy of an image's metadata that the kernel mounts (`workers/split.py`), as the supervisor has it made.

A worker makes it, writes it, and sends it: it is a file without a name on the cache's disk, which may stand still, and for no
disk the supervisor waits. Part of the supervisor.

What holds after SIGKILL of the worker: another one makes it anew. Of the supervisor: nothing stays.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from nydusd.ipc import passed
from nydusd.ipc.messages import Json
from nydusd.storage.cache.requests import Answer, Job, Priority

if TYPE_CHECKING:
    from nydusd.supervisor.images import Image
    from nydusd.supervisor.pool import WorkerPool

log = logging.getLogger(__name__)

_LEAST, _MOST = 4 << 20, 512
"""Bytes of a range of a blob, and ranges of an image."""
Cuts = list[list[int]] | None
"""Where the ranges of each blob begin."""


def make_copy(fetch: WorkerPool, image: Image, made: Callable[[str, Cuts, Sequence[bool]], None]) -> None:
    """Have it made. `made` gets the path of the copy, which is there until it returns, its cuts, and of each blob whether all
    its chunks are listed; without cuts the path of the image itself. Raises OSError when there is no room to ask.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)

    def answered(_job: Job, answer: Answer) -> None:
        with ours, theirs:
            file = _sent(ours)
        cuts, listed = answer.get("cuts"), answer.get("listed")
        why = answer.get("error")
        if cuts is not None and file is None:
            cuts, listed, why = None, None, "no file descriptor is left for the copy of its metadata"
        if why:
            log.warning("%s: its blobs are watched as a whole: %s", image.source, why)
        try:
            made(image.metadata.bootstrap if cuts is None else f"/proc/self/fd/{file}", cuts, listed or ())
        finally:
            if file is not None:
                os.close(file)

    payload: Json = {"image": image.metadata.to_json(), "folder": str(image.caches[0].spec.work_dir)}
    payload |= {"line": [os.getpid(), theirs.fileno()], "least": _LEAST, "most": _MOST}
    fetch.submit(Job("split_image", None, Priority.USER, payload, answered))


def _sent(line: socket.socket) -> int | None:
    """The file that came last, None if there is none: each worker that was killed after it had sent one has left one."""
    found: list[int] = []
    with suppress(BlockingIOError):
        while (packet := passed.receive(line, 1, 1))[0]:
            found += packet[1]
    for former in found[:-1]:
        os.close(former)
    return found[-1] if found else None
