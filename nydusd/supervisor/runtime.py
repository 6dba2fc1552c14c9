"""The run-time folder of a daemon, and what an earlier daemon of the same mount point may have left.

`/run/nydusd/<instance>` (or under $NYDUSD_RUNTIME_DIR), mode 0700: the ZeroMQ sockets and `state.json`, which names the
supervisor and its children by pid and start time. Beside it `<instance>.lock`, locked as long as the supervisor lives.
The instance is derived from the mount point and that place, so the same command line finds its own leftovers after a
SIGKILL. Front ends that go on serving are taken over (`adoption.py`); if that cannot be, they are ended like all others, the
sockets removed, and shared memory is kept for `prepare` to inherit.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from hashlib import sha256
from pathlib import Path

from nydusd import points
from nydusd.errors import CacheError, MountError
from nydusd.ipc.killed import is_killed
from nydusd.ipc.messages import Json
from nydusd.nursery import place
from nydusd.storage.state.lock import start_time
from nydusd.storage.state.names import names, remove
from nydusd.supervisor.checked import read_checked, write_checked
from nydusd.supervisor.ends import end_together
from nydusd.waits import DEAF, Told

log = logging.getLogger(__name__)

_PROCESSES = re.compile(rb'"processes": *(\[\[[0-9, \[\]]*\]\])')
"""In a record that is damaged elsewhere."""
TRIAL = "trial"
"""What folder and shared memory of a trial of new workers are called (`trial.py`)."""
_LOOKS, _LOOK_SECONDS = 50, 0.01
"""How often a lock is tried that no living daemon seems to have, and the pause between."""


class Runtime:
    """Paths of one daemon's run-time folder."""

    def __init__(self, mountpoint: str) -> None:
        root = Path(place.root())
        # Both: shared memory is named by this, and a daemon that sees other records must not clear away what is ours.
        self.instance = sha256(os.fsencode(f"{root}\0{mountpoint}")).hexdigest()[:12]
        self.folder = root / self.instance
        self.front = f"ipc://{self.folder}/front"
        self.work = f"ipc://{self.folder}/work"
        self.prefix = f"/nydusd.{self.instance}."
        """What the names of this instance's shared memory begin with."""
        self.term = 0
        """How many supervisors these front ends have had before this one."""
        self._state = self.folder / "state.json"
        self._lock_path = self.folder.with_suffix(".lock")
        self._lock = -1
        self.waiting = self.folder.with_suffix(".next")
        """Where the sockets are of a daemon that waits for another's end."""
        self._line_path = self.folder.with_suffix(".next.lock")
        self._line = -1
        self._mountpoint = mountpoint

    @property
    def arena(self) -> str:
        """Each supervisor has its own: front ends may still copy from a former one's."""
        return f"{self.prefix}{self.term}.arena"

    @property
    def stage(self) -> str:
        return f"{self.prefix}{self.term}.stage"

    @property
    def first(self) -> int:
        """The first number of leases, handles and shared memory that no former supervisor has given out."""
        return (self.term << 32) + 1

    def claim(
        self,
        take: Callable[[Json], Collection[int] | None] = lambda _record: None,
        ours: Callable[[], Sequence[int]] = tuple,
        told: Told = DEAF,
    ) -> None:
        """Make the folder ours; end what a dead daemon, or one that was killed, left. Raises MountError when a live one has it.

        `take` is given the dead one's record, {} if there is none, and gives the pids of processes that are taken over, None if
        nothing is: they and what they need stay, and so does the record, until `record` replaces it. `ours` gives the pids of
        children that we have, asked when `take` is over, which may be long, and one may be new by then: from now on the record
        names them, so that they are ended before they hold anything if we are killed.

        Raises EndedError when `told` to end while it waits for the end of a process: the record is the dead one's still, and
        what is to be taken is as it was, so the next one does, and waits for, the same.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if self._lock < 0:
                self._take_lock(told)
                points.reach("start: lock taken")
            _make_folder(self.folder)
            points.reach("start: folder made")
            record = self._read()
            processes = _processes(record)[1:]
            # Those that hold what is to be taken come last: nobody may do a job while we look what there is.
            spared = {row["pid"] for row in record.get("holders", ())}
            _end_all((process for process in processes if process[0] not in spared), told)
            points.reach("start: workers of the former ended")
            kept = take(record)
            points.reach("start: taken what is left")
            _end_all((process for process in processes if process[0] not in (kept or ())), told)
            points.reach("start: processes of the former ended")
            self._clear(keep=kept is not None)
            self.leave_line()
            points.reach("start: cleared")
        except OSError as e:
            raise _unusable(e, self.folder) from e
        if kept is None or "processes" not in record:
            self.record(ours())
        else:
            self._write(record | {"processes": [*record["processes"], *([pid, start_time(pid)] for pid in ours())]})

    def _clear(self, keep: bool) -> None:
        """Remove what nobody uses any more; unless `keep`, all but the state of blobs."""
        for left in names(self.prefix[1:]):
            kind = left.removeprefix(self.prefix)
            if (
                left.endswith((".arena", ".stage"))
                or kind.startswith(TRIAL)  # in the middle of which the former was killed
                or (not keep and kind.startswith(("mounts", "inflight", "count", "files")))
            ):
                remove(left)
        shutil.rmtree(self.folder / TRIAL, ignore_errors=True)
        if not keep:
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def wait_in_line(self) -> None:
        """Make the folder `waiting`, for a daemon that waits for its predecessor's end. Raises MountError."""
        try:
            self.waiting.parent.mkdir(parents=True, exist_ok=True)
            self._line = self._place_in_line()
            _make_folder(self.waiting)
        except BlockingIOError:
            raise MountError(
                f"{self._mountpoint}: another nydusd waits already to take over this mount point"
            ) from None
        except OSError as e:
            raise _unusable(e, self.waiting) from e

    def _place_in_line(self) -> int:
        """The lock of who waits. Who looks whether somebody does, or removes what one has left, holds it for a moment.

        Raises BlockingIOError when another waits.
        """
        for _ in range(_LOOKS):
            with contextlib.suppress(BlockingIOError):
                return _locked(self._line_path)
            time.sleep(_LOOK_SECONDS)
        return _locked(self._line_path)

    def is_free(self) -> bool:
        """Whether no daemon has this mount point; it is ours then. Raises MountError."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except MountError:
            return False
        except OSError as e:
            raise _unusable(e, self.folder) from e
        return True

    def has_successor(self) -> bool | None:
        """Whether a daemon waits for our end; None if one was killed while it waited, or that cannot be told."""
        try:
            fd = os.open(self._line_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return None

    def leave_line(self) -> None:
        """Remove what was made for waiting, by us or by one that was killed; not while another waits.

        The lock goes last: whoever is killed here leaves it to be found, with what it is for.
        """
        if self._line < 0:
            if not self._line_path.exists():
                return
            try:
                self._line = _locked(self._line_path)
            except OSError:  # above all: it is taken
                return
        shutil.rmtree(self.waiting, ignore_errors=True)
        self._line_path.unlink(missing_ok=True)
        os.close(self._line)
        self._line = -1

    def let_go(self) -> None:
        """The mount point is another's; what is in the folder stays."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _take_lock(self, told: Told | None = None) -> None:
        """One daemon a mount point. The kernel ends the lock with its holder, whatever ends that; children don't get it.

        A worker of another daemon, which looks whether there is one here, holds it for a moment (`storage/state/gone.py`).
        `told`: if there is one, wait for the end of a holder that was killed, however long that takes: it may get no turn on a
        processor, or a disk may hold it. A nursery's daemon is killed when who started it may have seen its stub end already.
        """
        holder: tuple[int, int] | None = None
        looks = 0
        while looks < _LOOKS:
            try:
                self._lock = _locked(self._lock_path)
                return
            except BlockingIOError:
                holder = holder or next(iter(_processes(self._read())), (0, 0))
            if not alive(holder):
                looks += 1
                time.sleep(_LOOK_SECONDS)
            elif told is not None and is_killed(holder[0]):
                end(holder, told)
                if alive(holder):
                    log.warning("waiting for the end of pid %d: it was killed, and has this mount point", holder[0])
            else:
                break
        pid = holder[0] if holder else 0
        who, how = (f"nydusd with pid {pid}", f"stop it (kill -TERM {pid})") if pid else ("another nydusd", "stop it")
        raise MountError(
            f"{self._mountpoint}: {who} serves this mount point already: {how}, or take another mount point"
        )

    def _read(self) -> Json:
        """The record of the last daemon here; of one that was damaged or is of another release, its processes at most."""
        try:
            return read_checked(self._state)
        except CacheError as e:
            if e.cause_errno == errno.ENOENT:
                return {}
            log.warning("%s", e)
        try:
            found = _PROCESSES.search(self._state.read_bytes())
            return {} if found is None else {"processes": json.loads(found[1])}
        except (OSError, ValueError):
            return {}

    def record(
        self, children: Iterable[int], more: Json | None = None, adopted: Iterable[tuple[int, int]] = ()
    ) -> None:
        """Write down who we are, which children we have (pids), and what a successor must know `more` to take them over.

        `adopted`: pids and start times of who is not our child. A folder that is full costs the record, no more.
        """
        pids = [os.getpid(), *children]
        record: Json = {"version": 0, "mountpoint": self._mountpoint, "term": self.term}
        record["processes"] = [*([pid, start_time(pid)] for pid in pids), *map(list, adopted)]
        self._write(record | (more or {}))

    def _write(self, record: Json) -> None:
        try:
            write_checked(self._state, record)
        except CacheError as e:
            log.warning("%s; a successor will not find our processes", e)

    def remove(self, spared: Collection[str] = ()) -> None:
        """Remove the folder and all shared memory of this instance but what is `spared`, if it is ours: the end of a stop."""
        if self._lock < 0:
            return
        for name in names(f"nydusd.{self.instance}."):
            if name in spared:
                continue
            remove(name)
            points.reach("stop: one name removed")
        self.leave_line()
        shutil.rmtree(self.folder, ignore_errors=True)
        points.reach("stop: folder removed")
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = -1


def _locked(path: Path) -> int:
    """A lock on a file, which is made. Raises BlockingIOError when another process has it, OSError when it cannot be made."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder may have removed it between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
        except OSError:
            os.close(fd)
            raise
        os.close(fd)


def _unusable(error: OSError, folder: Path) -> MountError:
    """What is said when the run-time folder cannot be had."""
    how = ": run nydusd as root" if isinstance(error, PermissionError) and os.geteuid() else ""
    return MountError(f"run-time folder {error.filename or folder}: {error.strerror}{how}")


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    st = folder.lstat()
    if not stat.S_ISDIR(st.st_mode) or st.st_uid != os.geteuid():
        raise MountError(f"run-time folder {folder}: must be a folder of user {os.geteuid()}")
    folder.chmod(0o700)


def _processes(record: Json) -> list[tuple[int, int]]:
    """The processes of a recorded daemon, its supervisor first."""
    try:
        return [(int(pid), int(start)) for pid, start in record["processes"]]
    except (KeyError, TypeError, ValueError):
        return []


def _end_all(processes: Iterable[tuple[int, int]], told: Told) -> None:
    """End those that are there still of what a daemon was that was killed."""
    left = [process for process in processes if process[1] > 0 and start_time(process[0]) in (process[1], -1)]
    for pid, _ in left:
        log.info("ending pid %d, left by a nydusd that was killed", pid)
    end_together(left, told)


def alive(process: tuple[int, int]) -> bool:
    """Whether this very process is there: pid and start time."""
    pid, start = process
    return start > 0 and start_time(pid) == start


def end(process: tuple[int, int], told: Told = DEAF) -> None:
    """`end_together` for one process."""
    end_together([process], told)
