"""`Daemon`: a real daemon on a real mount, for tests, with its logs checked and its end enforced."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlencode

from tests.support.discipline import (
    becomes_true,
    cmdline,
    descendants,
    detach_mount,
    discipline,
    is_running,
    mounts_under,
    wait_until,
)
from tests.support.haste import not_in_haste

START_SECONDS = 60.0
STOP_SECONDS = 15.0
_numbers = itertools.count()


def image_config(blobs: Path, cache: Path) -> dict[str, object]:
    """A version 1 configuration: blobs in a local folder, a file cache, extended attributes, no prefetch, two front ends."""
    return {
        "device": {
            "backend": {"type": "localfs", "config": {"dir": str(blobs)}},
            "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}},
        },
        "mode": "direct",
        "digest_validate": False,
        "enable_xattr": True,
        "nydusd": {"front_ends": 2},
    }


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class Daemon:
    """`with Daemon(bootstrap, blobs) as daemon:` mounts an image and unmounts it again.

    Entering waits until the mount is there and the API says RUNNING. Leaving stops the daemon by SIGTERM and demands exit
    status 0, no mount and no process within a deadline; a daemon that hangs writes its stacks into the log, is killed, and
    the test fails. `cache` names a cache folder to keep over several daemons (default: a fresh one); `config` replaces
    the whole configuration; without a bootstrap there is no image and no configuration; `args` are appended to the command
    line; `environment` is added to ours; `verb` is the subcommand.
    """

    def __init__(
        self,
        bootstrap: Path | None,
        blobs: Path,
        *,
        cache: Path | None = None,
        config: dict[str, object] | None = None,
        args: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        verb: str = "fuse",
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="d", dir=discipline.folder))
        self.mountpoint = self.folder / "mnt"
        self.place = str(self.mountpoint)
        """What the daemon calls that for which there can be one daemon."""
        self.apisock = self.folder / "api.sock"
        self.cache = cache or self.folder / "cache"
        self.log = discipline.log_folder / f"{next(_numbers)}-{self.folder.name}.log"
        self.mountpoint.mkdir()
        config_file = self.folder / "config.json"
        config_file.write_text(json.dumps(config or image_config(blobs, self.cache)))
        image = () if bootstrap is None else ("-B", str(bootstrap), "-C", str(config_file))
        self.command = [
            *(sys.executable, "-m", "nydusd", verb),
            *image,
            *("-M", str(self.mountpoint), "-A", str(self.apisock)),
            *args,
        ]
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The pid that was started: the supervisor."""
        assert self._process is not None, "the daemon was not started"
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._process is not None:
                self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start the process and wait until reads can be served; AssertionError with the log's end if that fails."""
        self.launch()
        if becomes_true(lambda: self.has_ended() or self.serves(), START_SECONDS) and not self.has_ended():
            return
        ended = self.has_ended()
        assert self._process is not None
        status = f"exit status {self._process.wait()}" if ended else f"not RUNNING after {START_SECONDS:g} s"
        self._end_by_force()
        raise AssertionError(f"the daemon did not start: {status}\n{self.log_tail()}")

    def launch(self) -> None:
        """Start the process, and do not wait for anything."""
        with open(self.log, "ab") as log:
            discipline.logs.watch(self.log)
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd=Path(__file__).resolve().parents[2],
            )
        not_in_haste(self._process.pid)

    def has_ended(self) -> bool:
        """Whether the process that was started is no more."""
        assert self._process is not None
        return self._process.poll() is not None

    def serves(self) -> bool:
        """Whether the mount is there and the API says RUNNING."""
        return str(self.mountpoint) in mounts_under(self.folder) and self.says_running()

    def says_running(self) -> bool:
        """Whether the API says RUNNING: all there is to see of a daemon at whose mount point nothing is mounted."""
        if not self.apisock.exists():
            return False
        try:
            answer = self.get("/api/v1/daemon", seconds=2.0)
        except (OSError, AssertionError):  # 503: its supervisor has no time for the API yet
            return False
        return isinstance(answer, dict) and answer.get("state") == "RUNNING"

    def pids(self, role: str) -> list[int]:
        """The running processes of this daemon whose title begins with "nydusd: `role`", in the order of their start."""
        title = f"nydusd: {role}"

        def matches(pid: int) -> bool:
            return cmdline(pid).startswith(title) or _comm(pid).startswith(title[:15])  # a comm has 15 bytes at most

        return [pid for pid in self.family() if is_running(pid) and matches(pid)]

    def family(self) -> list[int]:
        """All processes of this daemon but its supervisor: those that it started, and the front ends that it took over."""
        found = descendants(self.pid)
        for state in Path(self._environment["NYDUSD_RUNTIME_DIR"]).glob("*/state.json"):
            record = json.loads(state.read_bytes())
            if record["mountpoint"] == self.place:
                found += [row["pid"] for row in record.get("holders", ()) if row["pid"] not in found]
        return found

    def get(self, path: str, seconds: float = 30.0) -> object:
        """The JSON of `GET path`; None for a 204. AssertionError for any other status."""
        status, body = self.request("GET", path, seconds=seconds)
        assert status in (200, 204), f"GET {path}: {status} {body!r}"
        return json.loads(body) if body else None

    def request(self, method: str, path: str, body: bytes | None = None, seconds: float = 30.0) -> tuple[int, bytes]:
        """One request to the API over a connection of its own: status and body."""
        connection = _UnixConnection(self.apisock, seconds)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def mount(self, place: str, bootstrap: Path, blobs: Path, method: str = "POST", **more: object) -> tuple[int, str]:
        """Mount (PUT: remount) an image by the API: status and the message of an error. `more` are keys of the command."""
        config = json.dumps(image_config(blobs, self.cache) | {"id": place})
        command = {"fs_type": "rafs", "source": str(bootstrap), "config": config} | more
        return self._change(method, place, json.dumps(command).encode())

    def umount(self, place: str) -> tuple[int, str]:
        """Unmount an image by the API: status and the message of an error."""
        return self._change("DELETE", place, None)

    def _change(self, method: str, place: str, body: bytes | None) -> tuple[int, str]:
        status, answer = self.request(method, f"/api/v1/mount?{urlencode({'mountpoint': place})}", body)
        return status, json.loads(answer)["message"] if answer else ""

    def backend_reads(self) -> int:
        """How many requests the backend has had (`read_count` of `metrics/backend`)."""
        metrics = self.get("/api/v1/metrics/backend")
        assert isinstance(metrics, dict)
        count = metrics["read_count"]
        assert isinstance(count, int)
        return count

    def ctl(self, *args: str) -> str:
        """What `nydusctl` prints with these arguments; AssertionError with its stderr if it fails."""
        command = [sys.executable, "-m", "nydusd.cli.nydusctl", "-S", str(self.apisock), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=self._environment, check=False)
        assert done.returncode == 0, f"nydusctl {' '.join(args)}: exit status {done.returncode}\n{done.stderr}"
        return done.stdout

    def ask_for_stacks(self, pid: int) -> None:
        """SIGUSR1 to a process of this daemon, and wait until its stacks are in the log."""
        before = self.log.stat().st_size
        os.kill(pid, signal.SIGUSR1)
        wait_until(lambda: b"most recent call first" in self.log.read_bytes()[before:], f"the stacks of {cmdline(pid)}")

    def kill(self, pid: int) -> None:
        """SIGKILL one process of this daemon."""
        assert pid == self.pid or pid in self.family(), f"{pid} is not a process of this daemon"
        os.kill(pid, signal.SIGKILL)

    def kill_supervisor(self) -> None:
        """SIGKILL the process that was started. `start` starts the same command again."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def kill_all(self) -> None:
        """SIGKILL all processes of this daemon, stopped before, so that none of them starts another. The mount stays."""
        found: list[int] = []
        while new := [pid for pid in (self.pid, *self.family()) if pid not in found and is_running(pid)]:
            for pid in new:
                with contextlib.suppress(ProcessLookupError):  # one that is there for a moment only
                    os.kill(pid, signal.SIGSTOP)
            found += new
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kill_supervisor()
        wait_until(lambda: not any(map(is_running, found)), f"the end of {list(map(cmdline, found))}", START_SECONDS)

    def forget(self) -> None:
        """What was started has ended, killed, and what came after it has, too."""
        assert self._process is not None
        self._process.wait()
        self._process = None
        discipline.logs.end(self.log)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask the daemon to end with a signal; AssertionError unless it ends with 0 in time and leaves no mount."""
        family = [self.pid, *self.family()]
        if not self.has_ended():
            os.kill(self.pid, number)
        self.wait_for_end()
        left = [f"{pid} ({cmdline(pid)})" for pid in family if is_running(pid)]
        assert not left, f"processes outlived their supervisor: {', '.join(left)}"

    def wait_for_end(self) -> None:
        """Wait for a daemon that was told to end; AssertionError unless it ends with 0 in time and leaves no mount."""
        assert self._process is not None
        process = self._process
        if not _exits(process, STOP_SECONDS):
            stacks = self._dump_stacks()
            self._end_by_force()
            raise AssertionError(f"the daemon did not end within {STOP_SECONDS:g} s\n{stacks}")
        self._process = None
        status = process.wait()
        discipline.logs.end(self.log)
        mounted = str(self.mountpoint) in mounts_under(self.folder)
        if mounted:
            detach_mount(str(self.mountpoint))
        assert status == 0, f"the daemon ended with {status}\n{self.log_tail()}"
        assert not mounted, "the daemon ended and left its mount"

    def log_tail(self, lines: int = 80) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _dump_stacks(self) -> str:
        """Have every process write its stacks to the log (SIGUSR1), and return what came."""
        before = self.log.stat().st_size
        for pid in [self.pid, *self.family()]:
            if is_running(pid):
                os.kill(pid, signal.SIGUSR1)
        becomes_true(lambda: self.log.stat().st_size > before, 2.0)
        return self.log_tail()

    def _end_by_force(self) -> None:
        assert self._process is not None
        for pid in [self.pid, *self.family()]:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        detach_mount(str(self.mountpoint))
        discipline.logs.end(self.log)


def _exits(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for the end of a child by its pidfd, without reaping it."""
    if process.poll() is not None:
        return True
    descriptor = os.pidfd_open(process.pid)
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(seconds * 1000))
    finally:
        os.close(descriptor)


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    except OSError:
        return ""


def wait_for_role(daemon: Daemon, role: str, count: int, without: int = 0, seconds: float = 30.0) -> None:
    """Wait until `count` processes of `role` run and none of them is the pid `without`."""

    def complete() -> bool:
        pids = daemon.pids(role)
        return len(pids) == count and without not in pids

    if not becomes_true(complete, seconds):
        now = ", ".join(f"{pid} ({cmdline(pid)})" for pid in daemon.family())
        wanted = f"{count} processes of role {role}" + (f" without {without}" if without else "")
        raise AssertionError(f"waited {seconds:g} s in vain for {wanted}; there are: {now}")
