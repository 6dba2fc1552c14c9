"""Leak and log discipline: what a test may not leave behind, and what its processes may not say unannounced.

`conftest.py` asks this module before and after each test. What it looks at: processes, mounts, shared memory, file
descriptors of the test process, files in the run-time folder, and the logs that `Daemon` registers here. The pytest
process is made a child subreaper, so that an orphan of a killed daemon is still a descendant of ours and cannot get away.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import shutil
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

RUN_ID_VARIABLE = "NYDUSD_TEST_ID"
SHM_PREFIXES = ("nydusd.", "sem.nydusd.")
GRACE_SECONDS = 5.0
"""How long something may take to go away by itself (a killed process, a lazy unmount) before it counts as left."""

SUSPICIOUS = re.compile(r"\b(ERROR|CRITICAL|FATAL)\b|Traceback|\b[Aa]ssert")

_PR_SET_CHILD_SUBREAPER = 36
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Return once `condition` holds; AssertionError naming `what` after `seconds`. For states that raise no event."""
    if not becomes_true(condition, seconds):
        raise AssertionError(f"waited {seconds:g} s in vain for {what}")


def becomes_true(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` holds now or within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def detach_mount(path: str) -> None:
    """Take a mount out of the tree even if it is busy or its server is dead. Not mounted is fine."""
    _libc.umount2(os.fsencode(path), _MNT_DETACH)


def mounts_under(folder: Path) -> set[str]:
    """Mount points inside `folder`, unescaped."""
    points = set()
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split(" ")[4])
            if point.startswith(f"{folder}/"):
                points.add(point)
    return points


def descendants(pid: int) -> list[int]:
    """Live and dead processes below `pid`, parents first. A process that vanishes meanwhile is left out."""
    found: list[int] = []
    todo = [pid]
    while todo:
        parent = todo.pop(0)
        for thread in _listdir(f"/proc/{parent}/task"):
            children = [int(child) for child in _read(f"/proc/{parent}/task/{thread}/children").split()]
            found += children
            todo += children
    return found


def cmdline(pid: int) -> str:
    """The command line of a process, or its title where it set one; "" when it is gone or a zombie."""
    return _read(f"/proc/{pid}/cmdline").rstrip("\0").replace("\0", " ")


def parent(pid: int) -> int:
    """The parent's pid; 0 when the process is gone."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    state = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return bool(state) and state[0] not in ("Z", "X")


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


@dataclass(frozen=True)
class Snapshot:
    """What existed at one moment, in the kinds that a test could leave behind."""

    pids: frozenset[int]
    mounts: frozenset[str]
    shm: frozenset[str]
    fds: frozenset[tuple[int, str]]
    files: frozenset[str]


@dataclass
class LogBook:
    """The logs of the daemons that tests started, read on from where the last check stopped."""

    grace: float = GRACE_SECONDS
    offsets: dict[Path, int] = field(default_factory=dict)
    expected: list[re.Pattern[str]] = field(default_factory=list)
    allowed: list[re.Pattern[str]] = field(default_factory=list)
    _ended: set[Path] = field(default_factory=set)
    _unread: list[str] = field(default_factory=list)

    def watch(self, path: Path) -> None:
        """Check what is appended to `path` from now on."""
        self.offsets.setdefault(path, 0)

    def end(self, path: Path) -> None:
        """Nobody writes to `path` any more: check the rest of it once, then forget it."""
        self._ended.add(path)

    def expect(self, *patterns: str) -> None:
        """Announce lines: each pattern excuses what it matches, and must match at least once in this test."""
        self.expected += [re.compile(pattern) for pattern in patterns]

    def allow(self, *patterns: str) -> None:
        """Excuse lines that may come in this test or not, as the kernel likes."""
        self.allowed += [re.compile(pattern) for pattern in patterns]

    def _collect(self) -> list[str]:
        for path, offset in list(self.offsets.items()):
            try:
                with open(path, "rb") as file:
                    file.seek(offset)
                    new = file.read()
            except FileNotFoundError:
                del self.offsets[path]
                continue
            if path not in self._ended:
                new = new[: new.rfind(b"\n") + 1]  # the rest of a line that is being written comes next time
            self.offsets[path] = offset + len(new)
            self._unread += new.decode("utf-8", "replace").splitlines()
        return self._unread

    def _all_came(self) -> bool:
        return all(any(pattern.search(line) for line in self._collect()) for pattern in self.expected)

    def problems(self) -> list[str]:
        """Sentences about unannounced bad lines and announced lines that never came; forgets both."""
        becomes_true(self._all_came, self.grace)
        lines = self._collect()
        found = [
            "\n  ".join([f"unannounced in a log: {line}", *(_after(lines, number) if "Traceback" in line else ())])
            for number, line in enumerate(lines)
            if SUSPICIOUS.search(line) and not any(pattern.search(line) for pattern in (*self.expected, *self.allowed))
        ]
        found += [
            f"announced with expect_log, but never logged: {pattern.pattern}"
            for pattern in self.expected
            if not any(pattern.search(line) for line in lines)
        ]
        self.expected.clear()
        self.allowed.clear()
        self._unread.clear()
        for path in self._ended:
            self.offsets.pop(path, None)
        self._ended.clear()
        return found

    def tails(self, lines: int = 60) -> list[tuple[str, str]]:
        """The last lines of each log that is being watched, for the report of a failed test."""
        return [(str(path), "\n".join(_read(str(path)).splitlines()[-lines:])) for path in self.offsets]


def _after(lines: list[str], number: int) -> list[str]:
    """The lines of a traceback that begins at this one."""
    end = number + 1
    while end < len(lines) and lines[end].startswith((" ", "\t")):
        end += 1
    return lines[number + 1 : end + 1]


class Discipline:
    """One of these per test run: the run's private folder, its mark on processes, its logs."""

    def __init__(self, grace: float = GRACE_SECONDS) -> None:
        self.grace = grace
        self.run_id = uuid.uuid4().hex[:12]
        self.folder = Path(f"/tmp/nydusd-test-{self.run_id}")
        """Everything temporary of this run. Short: the path of a unix socket may have 107 bytes only."""
        self.runtime = self.folder / "run"
        self.log_folder = self.folder / "logs"
        self.logs = LogBook(grace)
        self._ignored_fds = re.compile(r"^/dev/(null|u?random|tty)$|^anon_inode:\[eventfd\]$")

    def start(self) -> None:
        """Make the folder, mark this process and so all its children, and adopt orphans."""
        self.runtime.mkdir(parents=True)
        self.log_folder.mkdir()
        os.environ[RUN_ID_VARIABLE] = self.run_id
        os.environ["NYDUSD_RUNTIME_DIR"] = str(self.runtime)
        # It would outlive a test beside a daemon of several tests. tests/nursery has it on.
        os.environ["NYDUSD_NURSERY"] = "off"
        if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")

    def finish(self) -> None:
        """Remove the run's folder."""
        for point in sorted(mounts_under(self.folder), reverse=True):
            detach_mount(point)
        shutil.rmtree(self.folder, ignore_errors=True)

    def snapshot(self) -> Snapshot:
        return Snapshot(
            pids=frozenset(int(name) for name in os.listdir("/proc") if name.isdecimal()),
            mounts=frozenset(mounts_under(self.folder)),
            shm=frozenset(name for name in _listdir("/dev/shm") if name.startswith(SHM_PREFIXES)),
            fds=frozenset(self._fds()),
            files=frozenset(str(path) for path in self.runtime.rglob("*")),
        )

    def _fds(self) -> list[tuple[int, str]]:
        found = []
        for name in _listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the descriptor of this very listing
                target = os.readlink(f"/proc/self/fd/{name}")
                if not self._ignored_fds.match(target):
                    found.append((int(name), target))
        return found

    def leftovers(self, before: Snapshot) -> list[str]:
        """Sentences about what was not there at `before`; what can be cleaned up is, so that later tests do not suffer."""
        left: list[str] = []

        def clean() -> bool:
            left[:] = self._compare(before)
            return not left

        if clean():
            return []
        gc.collect()  # objects in reference cycles hold descriptors a little longer
        if not becomes_true(clean, self.grace):
            self._clean_up(before)
        return left

    def _compare(self, before: Snapshot) -> list[str]:
        now = self.snapshot()
        left = [f"process {pid} ({cmdline(pid)})" for pid in self._new(now, before)]
        left += [f"mount {point}" for point in sorted(now.mounts - before.mounts)]
        left += [f"shared memory /dev/shm/{name}" for name in sorted(now.shm - before.shm) if not _used_by_others(name)]
        left += [f"file descriptor {number} ({target})" for number, target in sorted(now.fds - before.fds)]
        left += [f"file {path}" for path in sorted(now.files - before.files)]
        return left

    def _new(self, now: Snapshot, before: Snapshot) -> list[int]:
        """Ours that were not there before. What a longer-lived daemon starts (workers, fork servers) ends with that."""
        new = self._ours(now.pids - before.pids)
        if not new:
            return []
        daemons = {pid for pid in self._ours(before.pids) if cmdline(pid) != "nydusd: nursery"}
        return [pid for pid in new if parent(pid) not in daemons]

    def _ours(self, pids: frozenset[int]) -> list[int]:
        """Those of `pids` that run and are descendants of this process or carry this run's mark; reaps our orphans."""
        if not pids:
            return []
        below = set(descendants(os.getpid()))
        mark = f"{RUN_ID_VARIABLE}={self.run_id}\0"
        ours = []
        for pid in sorted(pids):
            if pid not in below and mark not in _read(f"/proc/{pid}/environ"):
                continue
            if is_running(pid):
                if "multiprocessing.resource_tracker" not in cmdline(pid):  # the interpreter's own, ends with it
                    ours.append(pid)
            else:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        return ours

    def _clean_up(self, before: Snapshot) -> None:
        now = self.snapshot()
        for pid in self._new(now, before):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        becomes_true(lambda: not self._ours(self.snapshot().pids - before.pids), self.grace)
        for point in sorted(now.mounts - before.mounts, reverse=True):
            detach_mount(point)
        for name in now.shm - before.shm:
            if not _used_by_others(name):
                Path("/dev/shm", name).unlink(missing_ok=True)
        for path in sorted(now.files - before.files, reverse=True):
            with contextlib.suppress(OSError):
                os.rmdir(path) if os.path.isdir(path) else os.unlink(path)


def _used_by_others(shm_name: str) -> bool:
    """Whether another run on this machine made the object: it has its daemon's folder, or a process that maps or holds it."""
    instance = shm_name.removeprefix("sem.").split(".")[1]
    for folder in Path("/tmp").glob(f"nydusd-test-*/run/{instance}*"):
        if discipline.runtime not in folder.parents:
            return True
    own = {os.getpid(), *descendants(os.getpid())}
    target = f"/dev/shm/{shm_name}"
    try:
        # Who made a semaphore maps it under the temporary name that it had at first: only the inode number tells.
        mapped = re.compile(rf" {os.stat(target).st_ino} +/dev/shm/")
    except FileNotFoundError:
        return True  # gone meanwhile: not ours to report
    for name in _listdir("/proc"):
        if not name.isdecimal() or int(name) in own:
            continue
        if mapped.search(_read(f"/proc/{name}/maps")):
            return True
        for fd in _listdir(f"/proc/{name}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{name}/fd/{fd}") == target:
                    return True
    return False


discipline = Discipline()
