"""What the last process of a daemon that is gone does when nobody uses its file systems any more, before it ends.

Run by the guard, or by the front end that was its copy where the guard was killed. What holds after SIGKILL: what was not
removed yet stays, until a daemon of the same mount point is stopped.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from nydusd.storage.state.names import inode_of, remove

from . import left
from .table import Table


def clear_away(known: Table, note: Path, guard: int) -> None:
    """Remove what was made to be mounted on, what a stop has spared, and the file that names the guard (its pid).

    If there is a successor already, it mounts nothing before it has ended us; or it has left us to our readers. Then it may
    have segments of the same names by now: they are told by their inodes.
    """
    for folder in sorted(known.folders, key=len, reverse=True):
        with contextlib.suppress(OSError):  # somebody has put something into it, or removed it
            os.rmdir(folder)
    for name, inode in known.segments:
        if inode_of(name) == inode:
            remove(name)
    left.forget(note, guard)
