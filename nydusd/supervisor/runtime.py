"""The run-time folder of a daemon, and what an earlier daemon of the same mount point may have left.

`/run/nydusd/<instance>` (or under $NYDUSD_RUNTIME_DIR), mode 0700: the ZeroMQ sockets and `state.json`, which names the
supervisor and its children by pid and start time. Beside it `<instance>.lock`, locked as long as the supervisor lives.
The instance is derived from the mount point and that place, so the same command line finds its own leftovers after a
SIGKILL: processes are ended, sockets removed, shared memory kept for `prepare` to inherit.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import shutil
import signal
import stat
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from nydusd.errors import MountError
from nydusd.storage.state.lock import start_time
from nydusd.storage.state.segment import names, remove

log = logging.getLogger(__name__)

_DEFAULT = "/run/nydusd"
_END_SECONDS = 5.0
"""How long a killed process may take to vanish."""


class Runtime:
    """Paths of one daemon's run-time folder."""

    def __init__(self, mountpoint: str) -> None:
        root = Path(os.environ.get("NYDUSD_RUNTIME_DIR") or _DEFAULT).absolute()
        # Both: shared memory is named by this, and a daemon that sees other records must not clear away what is ours.
        self.instance = sha256(os.fsencode(f"{root}\0{mountpoint}")).hexdigest()[:12]
        self.folder = root / self.instance
        self.front = f"ipc://{self.folder}/front"
        self.work = f"ipc://{self.folder}/work"
        self.arena = f"/nydusd.{self.instance}.arena"
        self.stage = f"/nydusd.{self.instance}.stage"
        self.prefix = f"/nydusd.{self.instance}."
        """What the names of this instance's shared memory begin with."""
        self._state = self.folder / "state.json"
        self._lock_path = self.folder.with_suffix(".lock")
        self._lock = -1
        self._mountpoint = mountpoint

    def claim(self) -> None:
        """Make the folder ours. Raises MountError when a live daemon has it; ends what a dead one left running."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._make_folder()
            for process in self._read()[1:]:
                if _alive(process):
                    log.warning("ending pid %d, left by a nydusd that was killed", process[0])
                    _end(process)
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            remove(self.arena)
            remove(self.stage)
            for name in ("mounts", "inflight", "count", "files"):
                for left in names(f"{self.prefix[1:]}{name}"):
                    remove(left)
        except OSError as e:
            raise MountError(f"run-time folder {e.filename or self.folder}: {e.strerror}") from e
        self.record([])

    def _take_lock(self) -> None:
        """One daemon a mount point. The kernel ends the lock with its holder, whatever ends that; children don't get it."""
        while True:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                pid = next(iter(self._read()), (0, 0))[0]
                who = f"nydusd with pid {pid}" if pid else "another nydusd"
                raise MountError(f"{self._mountpoint}: {who} serves this mount point already") from None
            # Its holder may have removed it between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(self._lock_path)):
                    self._lock = fd
                    return
            os.close(fd)

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        st = self.folder.lstat()
        if not stat.S_ISDIR(st.st_mode) or st.st_uid != os.geteuid():
            raise MountError(f"run-time folder {self.folder}: must be a folder of user {os.geteuid()}")
        self.folder.chmod(0o700)

    def _read(self) -> list[tuple[int, int]]:
        """The processes of the recorded daemon, its supervisor first; [] if there is no record that can be read."""
        try:
            raw = json.loads(self._state.read_bytes())
            return [(int(pid), int(start)) for pid, start in raw["processes"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return []

    def record(self, children: Iterable[int]) -> None:
        """Write down who we are and which children we have (pids). A folder that is full costs the record, no more."""
        pids = [os.getpid(), *children]
        text = json.dumps(
            {"version": 1, "mountpoint": self._mountpoint, "processes": [[p, start_time(p)] for p in pids]}
        )
        temporary = self._state.with_suffix(".tmp")
        try:
            temporary.write_text(text)
            os.replace(temporary, self._state)
        except OSError as e:
            log.warning("%s: %s; a successor will not find our processes", self._state, e.strerror)

    def remove(self) -> None:
        """Remove the folder and all shared memory of this instance, if it is ours: the end of a stop."""
        if self._lock < 0:
            return
        for name in names(f"nydusd.{self.instance}."):
            remove(name)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = -1


def _alive(process: tuple[int, int]) -> bool:
    pid, start = process
    return start != 0 and start_time(pid) == start


def _end(process: tuple[int, int]) -> None:
    """SIGKILL this very process and wait until it is gone, with all its file descriptors."""
    try:
        fd = os.pidfd_open(process[0])
    except ProcessLookupError:
        return
    try:
        if _alive(process):  # still the same: now the number cannot become another's
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(_END_SECONDS * 1000)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)
