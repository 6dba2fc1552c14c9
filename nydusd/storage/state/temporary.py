"""A file in a cache folder that takes the place of another when it is whole, so that readers see one or the other.

Used by workers, and by the supervisor before it has any. What is not whole yet has always the same name, so what a killed
writer has left is taken by the next one: a kill leaves one file at most, however many there are. Its lock has writers take
turns, of other daemons too.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nydusd.storage.state import map_file

_TRIES = 5


@contextmanager
def temporary_of(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """An empty file beside `path`, ours alone while the block runs, and its name, by which the block puts it in that place.

    The folder is made. Raises OSError; if the block does, the file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    for _ in range(_TRIES):
        with open(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644), "r+b") as file:
            map_file.lock(file.fileno())
            if is_still(temporary, file.fileno()):
                try:
                    file.truncate(0)
                    yield file, temporary
                except OSError:
                    temporary.unlink(missing_ok=True)
                    raise
                return
    raise OSError(errno.EBUSY, "others keep replacing it")


def is_still(path: Path, fd: int) -> bool:
    """Whether the open file is the one of this name: whoever had its lock before us may have renamed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False
