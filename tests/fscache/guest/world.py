"""What the checks of fscache in the guest have in common: the daemon, a store and readers around it, mounts, the truth.

Runs as root in the guest that `run.sh` boots, on the real /dev/cachefiles. Nothing outlives the guest.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nydusd.ipc.borrow import borrow
from tests.support import manifest
from tests.support.blob_entry import blob_entry
from tests.support.oracle import Image

WORK = Path("/tmp/fscache-checks")
RUNTIME = WORK / "run"
CACHE = Path(os.environ.get("FSCACHE_DIR", "/nonexistent"))
PATIENCE = 150.0
DOMAIN = "shared"
TAG = "checks"
_libc = ctypes.CDLL(None, use_errno=True)


def wait(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE:g} s"
        time.sleep(0.05)


class Connection(http.client.HTTPConnection):
    """To the API behind a socket."""

    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__("nydusd")
        self._path, self._seconds = path, seconds

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self._seconds)
        self.sock.connect(str(self._path))


class Daemon:
    """`nydusd singleton --fscache`, started again as often as wanted. One that `tests.support.keeper` can keep."""

    def __init__(self) -> None:
        self.log = WORK / "log"
        self.apisock = WORK / "api.sock"
        self.command = [sys.executable, "-m", "nydusd", "singleton", "--fscache", str(CACHE), "-A", str(self.apisock)]
        self.command += ["--fscache-threads", "2", "--fscache-tag", TAG]
        self._process: subprocess.Popen[bytes] | None = None
        self._environment = os.environ | {"NYDUSD_RUNTIME_DIR": str(RUNTIME)}

    def start(self, store: Store | None = None) -> None:
        with self.log.open("ab") as log:
            command, environment = self.command, self._environment
            fds: tuple[int, ...] = ()
            if store is not None:
                command, fds = store.giving(command)
                environment = environment | {"NOTIFY_SOCKET": store.path}
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, pass_fds=fds
            )
        wait("RUNNING", self._is_running)

    def be_there(self) -> None:
        """Started, if it is not running."""
        if self._process is None or self._process.poll() is not None:
            self.start()

    def request(
        self, method: str, path: str, body: bytes | None = None, seconds: float = PATIENCE
    ) -> tuple[int, bytes]:
        with contextlib.closing(Connection(self.apisock, seconds)) as connection:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()

    def _is_running(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the daemon ended:\n{self.log.read_text()[-3000:]}"
        try:
            return b'"RUNNING"' in self.request("GET", "/api/v2/daemon")[1]
        except OSError:
            return False

    def pids(self, title: str) -> list[int]:
        """Processes by the title that they give themselves."""
        return [pid for pid, name in processes() if name.startswith(f"nydusd: {title}")]

    def end(self, number: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(PATIENCE)


class Store:
    """The receiving end of systemd's fd store, for one descriptor."""

    def __init__(self) -> None:
        self.path = str(WORK / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(PATIENCE)
        self._fd, self._name = -1, ""

    def take(self) -> None:
        """Wait for the device."""
        while self._fd < 0:
            data, fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
            if fds:
                self._fd = fds[0]
                self._name = data.decode().split("FDNAME=")[1].split("\n")[0]

    def giving(self, command: list[str]) -> tuple[list[str], tuple[int, ...]]:
        """A command that gives it to another, and what that must inherit."""
        if self._fd < 0:
            return command, ()
        program = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.closerange(4, 64); "
        program += "os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1', 'LISTEN_FDNAMES': sys.argv[2]}; "
        program += "os.execv(sys.argv[3], sys.argv[3:])"
        return [sys.executable, "-c", program, str(self._fd), self._name, *command], (self._fd,)

    def close(self) -> None:
        """Give it up: whoever is killed from now on leaves nothing."""
        os.close(self._fd)
        self._socket.close()


daemon = Daemon()
"""The one that there is at a time: the device has one owner."""


def request(method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
    status, answer = daemon.request(method, path, body)
    return status, answer.decode()


def processes() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                yield (
                    int(name),
                    Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"),
                )


def copies_of_open_files() -> list[int]:
    """The kernel's files that processes have open, opened by us, too."""
    copies = []
    for pid, _ in processes():
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{number}") == "anon_inode:[cachefiles]":
                    copies.append(borrow(pid, int(number), lambda: True))
    return copies


def entry(name: str, what: Image, domain: str = DOMAIN) -> bytes:
    return json.dumps(blob_entry(name, what.bootstrap, what.blobs, WORK, domain, "fscache")).encode()


def bind(name: str, what: Image, domain: str = DOMAIN) -> None:
    assert request("PUT", "/api/v2/blobs", entry(name, what, domain)) == (204, "")


def mount(name: str, domain: str | None = DOMAIN) -> Path:
    place = WORK / name
    place.mkdir(exist_ok=True)
    options = f"fsid={name}" if domain is None else f"domain_id={domain},fsid={name}"
    if _libc.mount(b"none", os.fsencode(place), b"erofs", ctypes.c_ulong(1), options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return place


def unmount(place: Path) -> None:
    assert _libc.umount2(os.fsencode(place), 0) == 0, os.strerror(ctypes.get_errno())


def drop_page_cache() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3")


def same(what: Image, place: Path) -> None:
    found = manifest.differences(manifest.load(what.manifest), manifest.walk(place))
    assert found == [], found[:5]


class Reader(threading.Thread):
    """Reads a whole image while something happens; `finish` says what it saw."""

    def __init__(self, what: Image, place: Path) -> None:
        super().__init__(daemon=True)
        self._what, self._place = what, place
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            same(self._what, self._place)
        except BaseException as e:
            self._error = e

    def waits(self) -> bool:
        """Whether the kernel has it wait, and not for a moment only."""
        for _ in range(10):
            if Path(f"/proc/self/task/{self.native_id}/stat").read_text().rsplit(") ", 1)[1][0] != "D":
                return False
            time.sleep(0.02)
        return True

    def finish(self) -> None:
        self.join(PATIENCE)
        assert not self.is_alive(), "a reader hangs"
        if self._error is not None:
            raise self._error


def kill_all() -> None:
    """SIGKILL of the daemon and of all that it has started, which are stopped first."""
    assert daemon._process is not None
    pids = [daemon._process.pid, *daemon.pids("")]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    daemon._process.wait(PATIENCE)
    wait("their end", lambda: not daemon.pids(""))
