"""What front ends tell the supervisor of the images that they show: counters, counts by file, first reads, and reads that wait.

Runs in the supervisor, which makes all of it: shared memory with a row a front end, and a file for an image's trace of first
reads. Each image has names of its own, which are given out once.

What holds after SIGKILL: names and what was counted stay. The next supervisor goes on with those that the table of images has,
and removes the others (`strays.py`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from nydusd.errors import CacheError
from nydusd.ipc.file_counters import make_tables
from nydusd.ipc.inflight import make_board
from nydusd.ipc.mount_counters import make_counters
from nydusd.ipc.shared_block import map_block
from nydusd.storage.state.names import remove

if TYPE_CHECKING:
    from nydusd.supervisor.images import Image


class ImageMemory:
    """`prefix` begins the names, `first` is the first number in them; traces are files in `folder`; `rows` front ends count.

    `anew`: whether there is no former supervisor's board to go on with. Raises CacheError when there can be none.
    """

    def __init__(self, folder: Path, prefix: str, rows: int, first: int, *, anew: bool) -> None:
        self._folder = folder
        self._prefix = prefix
        self._rows = rows
        self._serial = count(first)
        self.board_name = f"{prefix}inflight"
        self.board = self._board(anew=anew)

    def _board(self, *, anew: bool) -> mmap.mmap:
        """Where front ends show reads that wait: what is there, if that can be had."""
        if not anew:
            with contextlib.suppress(CacheError):
                return map_block(self.board_name)
        return make_board(self.board_name, self._rows)

    def give(self, image: Image) -> None:
        """Make what an image is to have. Raises CacheError: what there is then, `take` removes."""
        serial = next(self._serial)
        name = f"{self._prefix}count.{serial}"
        image.block = make_counters(name, self._rows)
        image.counters, image.files = name, f"{self._prefix}files.{serial}"
        self._have_tables(image)
        image.trace = self._trace()

    def pass_on(self, old: Image, new: Image) -> None:
        """Have an image count on where the one counts whose place it is to take; its trace begins anew. Raises CacheError."""
        new.counters, new.block, new.files = old.counters, old.block, old.files
        self._have_tables(new)
        new.trace = self._trace()

    def _have_tables(self, image: Image) -> None:
        if image.files is not None and image.counts_files:
            make_tables(image.files, self._rows)

    def _trace(self) -> str:
        """An empty file for an image's trace of first reads, of its own: the next image there begins anew.

        Made here: a front end that is asked still when the image is unmounted must not make another after it was removed.
        """
        path = str(self._folder / f"trace.{next(self._serial)}")
        make_trace(path)
        return path

    def take(self, image: Image) -> None:
        """Remove what an image has; what was passed on and is another's now stays."""
        if image.trace is not None:
            with contextlib.suppress(OSError):
                os.unlink(image.trace)
        if image.counters is not None:
            remove(image.counters)
            image.block = None
        if image.files is not None:
            for row in range(self._rows):
                remove(f"{image.files}.{row}")


def make_trace(path: str) -> None:
    """The file, empty if it is not there."""
    with contextlib.suppress(OSError):  # a full /run costs the trace
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
