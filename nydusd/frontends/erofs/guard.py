"""`python -m nydusd.frontends.erofs.guard --spec-fd N`: a process that does nothing, and holds what must not be closed.

When the last fd of a fanotify group is closed, readers that wait pass, and a hole reads as zeros. Supervisor and front end
may both be killed; while the guard lives, readers wait for the next daemon, which takes the fds from here.

If none comes: a daemon that is gone must not keep readers for ever. Once neither supervisor nor front end have been there
for `patience` seconds, a copy of the guard becomes a front end: what is cached is served, the rest refused. The guard holds
on, whatever becomes of that one, and starts another when it ends. It ends when no file system is left, and clears away what
the daemon has left (`ending.py`).

What holds after SIGKILL: the copy serves on and holds the same; it clears away then. The next daemon finds it by what it holds
(`left.take`). Whoever ends a guard so as to take its place ends its copy with it: they are a process group (`left.end`).

The spec: `group`, `journal`, `table` (fds), `left` (path of the file that names us), `patience` (seconds), `supervisor` (its
pid), and `successor`: the spec of the front end that its copy may become.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import sys
import time
from pathlib import Path

from nydusd import logs
from nydusd.errors import NydusError
from nydusd.frontends.fuse.complaints import Complaints
from nydusd.frontends.guard import begin_guard
from nydusd.ipc.messages import Json

from . import table
from .ending import clear_away
from .main import serve

log = logging.getLogger(__name__)

_LOOK = 1.0
"""Seconds between looks around."""
_PAUSE_MOST = 32.0
"""Seconds between two front ends that end at once, at most."""


def main(argv: list[str]) -> int:
    """Hold on until nobody can read any more. Raises InternalError when the spec cannot be read."""
    guard = _Guard(begin_guard(argv))
    complaints = Complaints("guard")
    while True:
        try:
            if guard.is_over():
                return 0
        except Exception as e:  # whatever it is: who reads would read holes if this were the last one to hold the group
            complaints.log("it holds on, after an unexpected error", error=e)
            time.sleep(_LOOK)


class _Guard:
    """What the guard knows from one look around to the next."""

    def __init__(self, spec: Json) -> None:
        self._spec = spec
        self._table = int(spec["table"])
        self._successor = _Successor(spec["successor"], Path(spec["left"]))
        self._files: dict[str, int] = {}
        self._alone_since: float | None = None

    def is_over(self) -> bool:
        """Look around, and do what is to be done: whether no file system is left."""
        known = table.read(self._table)
        self._keep_open({file.data for mounted in known.mounts for file in mounted.files})
        time.sleep(_LOOK)
        known = table.read(self._table)
        orphaned = os.getppid() != int(self._spec["supervisor"])
        if orphaned and not known.alive():
            self._successor.end()
            clear_away(known, Path(self._spec["left"]), os.getpid())
            return True
        if self._successor.lives() or not orphaned or not _is_idle(int(self._spec["journal"])):
            self._alone_since = None
            return False
        now = time.monotonic()
        if self._alone_since is None:
            self._alone_since = now
        waited = now - self._alone_since >= float(self._spec["patience"])
        if waited or known.ended or self._successor.has_begun:
            self._successor.begin(now)
        return False

    def _keep_open(self, wanted: set[str]) -> None:
        """Have these files open, so that who looks for their users, before anything is taken out of them, finds us."""
        files = self._files
        for path in wanted - files.keys():
            with contextlib.suppress(OSError):
                files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        for path in files.keys() - wanted:
            os.close(files.pop(path))


class _Successor:
    """The copy of the guard that serves when nobody else does. `spec`: of the front end that it becomes.

    A copy, and no other program: it needs nothing but memory, and is of the release that has made what it serves, whatever
    is on the disk by now.
    """

    def __init__(self, spec: Json, note: Path) -> None:
        self._spec = spec | {"alone": True}
        self._note = note
        self._pid = 0
        self._pause = 0.0
        self._next = 0.0
        self.has_begun = False

    def lives(self) -> bool:
        """Whether there is one; of one that has ended it is noted how."""
        if not self._pid:
            return False
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if not pid:
            return True
        self._pid = 0
        code = os.waitstatus_to_exitcode(status)
        self._spec["crashed"] = code not in (0, -signal.SIGKILL, -signal.SIGTERM)
        if code:
            log.warning("the front end ended with status %d; the guard holds what is mounted, and starts another", code)
        return False

    def begin(self, now: float) -> None:
        """Start one, unless the last one ended just now. Raises OSError when there is no room for it."""
        if now < self._next:
            return
        self._pause = min(_PAUSE_MOST, self._pause * 2 or _LOOK)
        self._next = now + self._pause
        guard = os.getpid()
        pid = os.fork()
        if not pid:
            self._serve(guard)
        self.has_begun = True
        self._pid = pid

    def _serve(self, guard: int) -> None:
        """Be one. What the guard has open stays so: nobody else may say any more that the cache files are used."""
        status = 1
        try:
            # First, and by this: its fd must not be closed once numbers of events are occupied.
            logs.setup_child(self._spec["log"], "erofs 0")
            serve(self._spec)
            if os.getppid() != guard:
                clear_away(table.read(int(self._spec["table"])), self._note, guard)
            status = 0
        except NydusError as e:
            log.error("it serves no more: %s", e)
        except BaseException:
            log.exception("it serves no more")
        finally:
            os._exit(status)

    def end(self) -> None:
        """Nobody reads any more: it has nothing to lose."""
        if self.lives():
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0


def _is_idle(journal: int) -> bool:
    """Whether no front end lives: it would have the journal locked."""
    try:
        fcntl.lockf(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.lockf(journal, fcntl.LOCK_UN)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
