"""A container node in a folder: Debian's containerd, an unmodified nydus-snapshotter that starts our daemons, and nerdctl.

All of them are children of the test, ended by pid. Their files are below one folder, apart from what containerd's shim,
runc and nerdctl keep in /run/containerd and /sys/fs/cgroup: what they leave there is removed at the end. To know it for its
own, one node at a time lives on a machine, whatever test run it belongs to; the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.containerd.images import cache_folder
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

SNAPSHOTTER = "containerd-nydus-grpc-v0.15.0"
NERDCTL = "nerdctl-v2.1.2"
START_SECONDS = 60.0
STOP_SECONDS = 60.0
COMMAND_SECONDS = 120.0
FIFOS = "/run/containerd/fifo"
"""Where nerdctl makes a folder for each container's standard streams, and leaves it; there is no flag for it."""
_numbers = itertools.count()

CONF = Path(__file__).resolve().parents[2] / "conf"
ROOT, RUN = "/var/lib/containerd/io.containerd.snapshotter.v1.nydus", "/run/containerd-nydus/"
"""Folders of the snapshotter in the examples."""
GRPC_SOCK, SYSTEM_SOCK = "containerd-nydus-grpc.sock", "system.sock"

CONTAINERD_TOML = """\
version = 2
root = "{folder}/ctd/root"
state = "{folder}/ctd/state"
imports = ["{folder}/containerd-nydus.toml"]
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{folder}/ctd.sock"
[ttrpc]
  address = "{folder}/ctd.ttrpc"
"""
"""What is this node's own. The rest is in conf/."""


def example(name: str, changes: Mapping[str, str]) -> str:
    """A file of conf/ as it is there, but for what is said to stand in the place of what."""
    text = (CONF / name).read_text()
    for old, new in changes.items():
        assert old in text, f"{name} has no {old!r}"
        text = text.replace(old, new)
    return text


def write_examples(
    folder: Path, mode: str, *, nydusd: str | Path, recover_policy: str = "failover", clean_up: bool = True
) -> Path:
    """Write the files of conf/ for a snapshotter below this folder; gives the snapshotter's own.

    Changed are paths, what a test asks for, the port of the metrics, which another run may have, and https: the registry of the
    tests has no certificate.
    """
    here = {RUN: f"{folder}/"}
    (folder / "containerd-nydus.toml").write_text(example("containerd-nydus.toml", here))
    template = example("nydusd-registry-v1.json", {'"scheme": "https"': '"scheme": "http"'})
    (folder / "nydusd-registry-v1.json").write_text(template)
    changes = {
        ROOT: f"{folder}/sn",
        "/etc/nydus/": f"{folder}/",
        "/usr/local/bin/nydusd": str(nydusd),
        "/usr/local/bin/nydus-image": "/nonexistent/nydus-image",
        'daemon_mode = "dedicated"': f'daemon_mode = "{mode}"',
        'recover_policy = "failover"': f'recover_policy = "{recover_policy}"',
        "cleanup_on_close = false": f"cleanup_on_close = {str(clean_up).lower()}",
        "127.0.0.1:9110": "",
    }
    path = folder / "nydus-snapshotter.toml"
    path.write_text(example(path.name, here | changes))
    return path


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def http_get(sock: str, path: str) -> object:
    """The JSON behind a unix socket; AssertionError for anything but 200."""
    connection = _UnixConnection(sock)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, f"GET {path} of {sock}: {response.status} {body!r}"
        return json.loads(body)
    finally:
        connection.close()


def http_put(sock: str, path: str, body: object) -> None:
    """PUT a JSON; AssertionError for a status that is none of success."""
    connection = _UnixConnection(sock)
    try:
        connection.request("PUT", path, json.dumps(body))
        response = connection.getresponse()
        answer = response.read()
        assert response.status in (200, 204), f"PUT {path} of {sock}: {response.status} {answer!r}"
    finally:
        connection.close()


def _accepts(path: str) -> bool:
    """Whether somebody accepts connections to this unix socket; a file alone is there before its owner listens."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def _listdir(path: str) -> set[str]:
    try:
        return set(os.listdir(path))
    except FileNotFoundError:
        return set()


def _remove_fifos(folder: Path) -> None:
    """Remove a folder of named pipes that nobody has open any more; one in use belongs to somebody else's container."""
    pipes = list(folder.iterdir())
    for pipe in pipes:
        with contextlib.suppress(OSError):
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            return
    shutil.rmtree(folder, ignore_errors=True)


class Node:
    """`with Node("dedicated") as node:` pulls and runs containers by `node.nerdctl(...)`.

    Leaving stops the snapshotter, which is told to clean up, and containerd; what still runs or is mounted then is an
    AssertionError, and ended by force.
    """

    def __init__(self, mode: str, *, recover_policy: str = "failover", clean_up: bool = True) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="n", dir=discipline.folder))
        self.namespace = f"nydusd-test-{discipline.run_id}-{next(_numbers)}"
        self.mode = mode
        self.nydusd = os.environ.get("NYDUSD_TEST_DAEMON") or str(Path(sys.executable).with_name("nydusd"))
        self.cache = self.folder / "sn" / "cache"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._recover_policy = recover_policy
        self._clean_up = clean_up
        self._turn = (cache_folder() / "node.lock").open("wb")
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        self._fifos_before = _listdir(FIFOS)
        (self.folder / "containerd.toml").write_text(CONTAINERD_TOML.format(folder=self.folder))

    def __enter__(self) -> Self:
        try:
            # containerd connects at its start, and again a second after it failed: the snapshotter has to be there first.
            self._start_snapshotter()
            self._start("containerd", ["containerd", "-c", str(self.folder / "containerd.toml")], "ctd.sock")
        except BaseException:
            self._end_by_force()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._give_up(error)

    def start_snapshotter(self) -> None:
        """Start the snapshotter again after it was stopped; it finds the daemons that it knew by its database."""
        self._start_snapshotter()
        # After a restart containerd fails every call for a second before it connects again.
        wait_until(self._containerd_reaches_it, "containerd's connection to the snapshotter", START_SECONDS)

    def _start_snapshotter(self) -> None:
        config = write_examples(
            self.folder,
            self.mode,
            nydusd=self.nydusd,
            recover_policy=self._recover_policy,
            clean_up=self._clean_up,
        )
        program = cache_folder() / "bin" / SNAPSHOTTER
        assert program.exists(), f"there is no {program}: run scripts/need-containerd"
        self._start("snapshotter", [str(program), "--config", str(config)], GRPC_SOCK)

    def _containerd_reaches_it(self) -> bool:
        """Whether a listing succeeds; it asks the snapshotter only in a namespace that has snapshots."""
        command = ["ctr", "--address", str(self.folder / "ctd.sock"), "--namespace", self.namespace]
        listing = [*command, "snapshots", "--snapshotter", "nydus", "list"]
        return subprocess.run(listing, capture_output=True, env=self._environment(), check=False).returncode == 0

    def _start(self, name: str, command: list[str], sock: str) -> None:
        log = self.folder / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.folder, env=self._environment()
            )
        self._processes[name] = process
        path = str(self.folder / sock)
        becomes_true(lambda: process.poll() is not None or _accepts(path), START_SECONDS)
        assert process.poll() is None and _accepts(path), f"{name} did not start\n{self.logs()}"

    def _environment(self) -> dict[str, str]:
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return {**os.environ, "HOME": str(home), "DOCKER_CONFIG": str(home), "NERDCTL_TOML": str(home / "none.toml")}

    def log_in(self, host: str, auth: str) -> None:
        """Have the client and the snapshotter know a registry's credential: base64 of user, colon, password."""
        text = json.dumps({"auths": {host: {"auth": auth}}})
        Path(self._environment()["DOCKER_CONFIG"], "config.json").write_text(text)

    def nerdctl(self, *arguments: str) -> str:
        """What `nerdctl` prints on stdout; AssertionError with everybody's logs if it fails."""
        program = cache_folder() / "bin" / NERDCTL
        options = [
            *("--address", str(self.folder / "ctd.sock"), "--namespace", self.namespace, "--snapshotter", "nydus"),
            *("--data-root", str(self.folder / "nerdctl"), "--cgroup-manager", "cgroupfs", "--insecure-registry"),
            *("--cni-netconfpath", str(self.folder / "cni"), "--cni-path", str(self.folder / "cni")),
        ]
        done = subprocess.run(
            [str(program), *options, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            cwd=self.folder,
            env=self._environment(),
            check=False,
        )
        assert done.returncode == 0, f"nerdctl {arguments}: {done.returncode}\n{done.stderr}\n{self.logs()}"
        return done.stdout

    def daemons(self) -> list[Mapping[str, object]]:
        """What the snapshotter's own API tells of its daemons."""
        found = http_get(str(self.folder / SYSTEM_SOCK), "/api/v1/daemons")
        assert isinstance(found, list)
        return found

    def run_python(self, reference: str, code: str) -> str:
        """What a line of Python prints in a new container of the image, which is removed then."""
        return self._printed("run", "--rm", "--net", "host", *self._volume(), reference, code=code)

    def exec_python(self, container: str, code: str) -> str:
        """What a line of Python prints in a running container."""
        return self._printed("exec", container, code=code)

    def _printed(self, *arguments: str, code: str) -> str:
        """By way of a file: nerdctl loses the output of a command that ends soon, about once in a hundred (2.1.2)."""
        out = self.folder / "out" / f"{next(_numbers)}"
        self.nerdctl(*arguments, "sh", "-c", 'exec python3 -c "$1" >"/out/$0"', out.name, code)
        return out.read_text()

    def _volume(self) -> tuple[str, str]:
        folder = self.folder / "out"
        folder.mkdir(exist_ok=True)
        return "--volume", f"{folder}:/out"

    def start_container(self, reference: str) -> str:
        """A container that sleeps until it is removed: its id."""
        command = ["run", "--detach", "--net", "host", *self._volume(), reference, "sleep", "infinity"]
        return self.nerdctl(*command).strip()

    def daemon_pids(self) -> list[int]:
        """The pids that the snapshotter started and watches."""
        return [int(str(daemon["pid"])) for daemon in self.daemons()]

    def complaints(self) -> list[str]:
        """Warnings and errors in the snapshotter's log.

        In shared mode its own API asks for the counters of the only image, which any daemon refuses when there is not
        exactly one.
        """
        log = self.folder / "sn" / "logs" / "nydus-snapshotter.log"
        lines = log.read_text(errors="replace").splitlines()
        bad = [line for line in lines if re.search(r"level=(warning|error|fatal|panic)", line)]
        if self.mode == "shared":
            bad = [line for line in bad if "Failed to get file system metrics" not in line]
        return bad

    def watch_daemon_logs(self) -> list[Path]:
        """Have the discipline look at the logs of the daemons that there are now."""
        logs = sorted((self.folder / "sn" / "logs").glob("*/nydusd.log"))
        for log in logs:
            discipline.logs.watch(log)
        return logs

    def mounts(self) -> list[tuple[str, str, str]]:
        """Mount points below the node's folder, each with its type and source."""
        found = []
        with open("/proc/self/mountinfo", encoding="utf-8") as lines:
            for line in lines:
                left, _, right = line.partition(" - ")
                point = left.split(" ")[4]
                if point.startswith(f"{self.folder}/"):
                    kind, source = right.split(" ")[:2]
                    found.append((point, kind, source))
        return found

    def logs(self, lines: int = 40) -> str:
        """The ends of all logs of the node."""
        files = [*self.folder.glob("*.log"), *(self.folder / "sn" / "logs").glob("**/*.log")]
        parts = []
        for path in files:
            text = [line for line in path.read_text(errors="replace").splitlines() if "loading plugin" not in line]
            parts += [f"--- {path}", *text[-lines:]]
        return "\n".join(parts)

    def stop_snapshotter(self) -> None:
        """SIGTERM, and wait; AssertionError if it does not end."""
        self._stop("snapshotter")

    def _stop(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"{name} did not end within {STOP_SECONDS:g} s\n{self.logs()}") from None

    def close(self) -> None:
        """Stop everything; AssertionError for what is left, after it was cleaned up."""
        family = [pid for process in self._processes.values() for pid in descendants(process.pid)]
        try:
            self._stop("snapshotter")
            self._stop("containerd")
            # containerd's shims are not its children: the test process adopts them.
            becomes_true(lambda: not self._ours(family) and not mounts_under(self.folder), 10.0)
            left = [f"process {pid} ({cmdline(pid)})" for pid in self._ours(family)]
            left += [f"mount {point}" for point in sorted(mounts_under(self.folder))]
            assert not left, f"left behind: {', '.join(left)}\n{self.logs()}"
        finally:
            self._end_by_force(family)

    def _give_up(self, error: BaseException) -> None:
        """After a failed test: show the logs, remove what runs as far as that works, and end the rest by force."""
        error.add_note(self.logs())
        family = [pid for process in self._processes.values() for pid in descendants(process.pid)]
        try:
            with contextlib.suppress(AssertionError, OSError, subprocess.TimeoutExpired):
                containers = self.nerdctl("ps", "--all", "--quiet").split()
                if containers:
                    self.nerdctl("rm", "--force", *containers)
                self._stop("snapshotter")
                self._stop("containerd")
        finally:
            self._end_by_force(family)

    def _ours(self, family: list[int]) -> list[int]:
        return [pid for pid in {*family, *descendants(os.getpid())} if is_running(pid) and self._belongs(pid)]

    def _belongs(self, pid: int) -> bool:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        return f"HOME={self.folder}/home\0".encode() in environment

    def _end_by_force(self, family: list[int] | None = None) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        self._processes.clear()
        for pid in self._ours(family or []):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self._ours([]), "processes that were killed")
        for point in sorted(mounts_under(self.folder), reverse=True):
            detach_mount(point)
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(f"/run/containerd/runc/{self.namespace}", ignore_errors=True)
        for folder in _listdir(FIFOS) - self._fifos_before:
            _remove_fifos(Path(FIFOS, folder))
        for parent in Path("/sys/fs/cgroup").glob(f"**/{self.namespace}"):
            with contextlib.suppress(OSError):
                parent.rmdir()
        self._turn.close()
