"""`python -m nydusd.frontends.erofs.guard --spec-fd N`: a process that does nothing, and holds what must not be closed.

When the last fd of a fanotify group is closed, readers that wait pass, and a hole reads as zeros. Supervisor and front end
may both be killed; while the guard lives, readers wait for the next daemon, which takes the fds from here.

If none comes: a daemon that is gone must not keep readers for ever. Once neither supervisor nor front end have been there
for `patience` seconds, a copy of the guard becomes a front end: what is cached is served, the rest refused. The guard holds
on, whatever becomes of that one, and starts another when it ends. It ends when no file system is left, and clears away what
the daemon has left (`ending.py`).

What holds after SIGKILL: the copy serves on and holds the same, and soon has a guard again, a copy of itself; whoever is last
clears away. The next daemon finds them by what they hold (`left.take`). Whoever ends one so as to take its place ends what it
has started with it: who starts another is the first of a process group (`left.end`).

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
from nydusd.proctitle import set_title

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
    spec = begin_guard(argv)
    _hold_on(_Guard(spec, _Successor(spec, os.getpid())))
    return 0


def _hold_on(guard: _Guard) -> None:
    complaints = Complaints("guard")
    while True:
        try:
            if guard.is_over():
                return
        except Exception as e:  # whatever it is: who reads would read holes if this were the last one to hold the group
            complaints.log("it holds on, after an unexpected error", error=e)
            time.sleep(_LOOK)


class _Guard:
    """What the guard knows from one look around to the next."""

    def __init__(self, spec: Json, successor: _Successor) -> None:
        self._spec = spec
        self._table = int(spec["table"])
        self._successor = successor
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
            clear_away(known, Path(self._spec["left"]), self._successor.named)
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
    """The copy of the guard that serves when nobody else does. `spec`: the guard's; `named`: the pid of the one that was noted.

    A copy, and no other program: it needs nothing but memory, and is of the release that has made what it serves, whatever
    is on the disk by now.
    """

    def __init__(self, spec: Json, named: int, *, has_begun: bool = False) -> None:
        self._guards = spec
        self._spec = spec["successor"] | {"alone": True}
        self.named = named
        self._pid = 0
        self._pause = 0.0
        self._next = 0.0
        self.has_begun = has_begun

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
        _lead()
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
            serve(self._spec, _Spare(self._guards, guard, self.named).look)
            if os.getppid() != guard:
                clear_away(table.read(int(self._spec["table"])), Path(self._guards["left"]), self.named)
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


class _Spare:
    """The guard of a copy that serves, where `guard` (its pid), which has started that, was killed: a copy of the copy."""

    def __init__(self, spec: Json, guard: int, named: int) -> None:
        self._spec = spec
        self._guard = guard
        self._named = named
        self._pid = 0

    def look(self) -> None:
        """Called now and then: see to it that there is a guard."""
        if os.getppid() == self._guard or (self._pid and not os.waitpid(self._pid, os.WNOHANG)[0]):
            return
        self._pid = 0
        try:
            _lead()
            pid = os.fork()
        except OSError as e:
            log.warning("the guard was killed, and there is no room for another: %s", e.strerror)
            return
        if not pid:
            self._hold_on()
        self._pid = pid

    def _hold_on(self) -> None:
        """Be the guard. Nobody takes events here: numbers of those that the other one has taken may be occupied or not."""
        status = 1
        try:
            logs.setup_child(self._spec["successor"]["log"], "guard")
            set_title("guard")
            log.warning("the guard was killed: this is another one")
            _hold_on(_Guard(self._spec, _Successor(self._spec, self._named, has_begun=True)))
            status = 0
        except BaseException:
            log.exception("it holds on no more")
        finally:
            os._exit(status)


def _lead() -> None:
    """Be the first of a process group, before another is started, which then is ended with us."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)


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
