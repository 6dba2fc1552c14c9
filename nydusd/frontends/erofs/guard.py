"""`python -m nydusd.frontends.erofs.guard --spec-fd N`: a process that does nothing, and holds what must not be closed.

When the last fd of a fanotify group is closed, readers that wait pass, and a hole reads as zeros. Supervisor and front end
may both be killed; while the guard lives, readers wait for the next daemon, which takes the fds from here.

If none comes: a daemon that is gone must not keep readers for ever. Once neither supervisor nor front end have been there
for `patience` seconds, the guard becomes a front end by itself: what is cached is served, the rest refused. It ends when no
file system is left, and clears away what the daemon has left (`ending.py`).

The spec: `group`, `journal`, `table` (fds), `left` (path of the file that names us), `patience` (seconds), `supervisor` (its
pid), and `successor`: the spec of the front end that it may become.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from nydusd.frontends.guard import begin_guard
from nydusd.ipc.messages import Json
from nydusd.ipc.spec import write_spec

from . import table
from .ending import clear_away

_LOOK = 1.0
"""Seconds between looks around."""


def main(argv: list[str]) -> int:
    """Hold on until nobody can read any more. Raises InternalError when the spec cannot be read."""
    spec = begin_guard(argv)
    supervisor, memory = int(spec["supervisor"]), int(spec["table"])
    files: dict[str, int] = {}
    alone_since: float | None = None
    while True:
        known = table.read(memory)
        _keep_open(files, {file.data for mounted in known.mounts for file in mounted.files})
        time.sleep(_LOOK)
        known = table.read(memory)
        orphaned = os.getppid() != supervisor
        if orphaned and not known.alive():
            clear_away(known, Path(spec["left"]))
            return 0
        if not orphaned or not _is_idle(int(spec["journal"])):
            alone_since = None
            continue
        now = time.monotonic()
        if alone_since is None:
            alone_since = now
        if now - alone_since >= float(spec["patience"]) or known.ended:
            _become_front_end(spec, files.values())


def _keep_open(files: dict[str, int], wanted: set[str]) -> None:
    """Have these files open, so that who looks for their users, before anything is taken out of them, finds us."""
    for path in wanted - files.keys():
        with contextlib.suppress(OSError):
            files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    for path in files.keys() - wanted:
        os.close(files.pop(path))


def _is_idle(journal: int) -> bool:
    """Whether no front end lives: it would have the journal locked."""
    try:
        fcntl.lockf(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.lockf(journal, fcntl.LOCK_UN)
    return True


def _become_front_end(spec: Json, files: Iterable[int]) -> None:
    """`files` stay open as well: nobody else says any more that the cache files are used."""
    for fd in (*(int(spec[name]) for name in ("group", "journal", "table")), *files):
        os.set_inheritable(fd, True)
    successor = write_spec(spec["successor"] | {"alone": True})
    os.set_inheritable(successor, True)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "nydusd.frontends.erofs", "--spec-fd", str(successor)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
