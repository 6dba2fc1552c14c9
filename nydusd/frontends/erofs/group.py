"""The fanotify group as the loop of the front end has it: events are read from it, readers pass or are refused by it.

Nothing here outlives the process: see `loop.py` for what holds after SIGKILL.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from nydusd.errors import is_scarce
from nydusd.frontends.fuse.complaints import Complaints

from . import fanotify
from .device import Blob


class Group:
    """The group `fd`, which is non-blocking. What goes wrong with it goes to `complaints`."""

    def __init__(self, fd: int, complaints: Complaints) -> None:
        self.fd = fd
        self._complaints = complaints

    def read(self, buffer: list[memoryview]) -> int:
        """Read events; gives the bytes that there are. Raises OSError when the group cannot be read.

        For one that it has no file descriptor for the kernel fails this, and has refused its reader already.
        """
        try:
            return os.readv(self.fd, buffer)
        except BlockingIOError:
            return 0
        except OSError as e:
            if not is_scarce(e):
                raise
            self._complaints.log("a read failed: an event cannot be taken: %s", e.strerror)
            return 0

    def answer(self, number: int, code: int) -> None:
        """Have the reader of an event pass (0), or fail by this errno."""
        try:
            fanotify.answer(self.fd, number, code)
        except OSError as e:
            if e.errno != errno.ENOENT:  # a predecessor had answered it
                self._complaints.log("the kernel refused an answer: %s", e.strerror)

    def refuse(self, number: int, code: int, why: str, blobs: Sequence[Blob] = ()) -> None:
        """Have the reader of an event fail, whose blob is among these, and say why."""
        for blob in blobs:
            blob.count_error()
        name = blobs[0].blob_id if len(blobs) == 1 else ""
        self._complaints.log("a read failed: %s%s", f"blob {name}: " if name and name not in why else "", why)
        self.answer(number, code)
