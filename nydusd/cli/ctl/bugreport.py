"""`nydusctl bugreport [-o FILE]`: a tarball of what whoever looks into a problem wants to see.

In it: the daemon's state and configuration without secrets, its processes with their kernel stacks, its log, its metrics, the
trace of each image, pictures of the chunk maps, the mounts of this system. Nothing looks at a mount point, and a daemon that
once has not answered for a few seconds is asked no more: its processes, log, configuration and chunk maps are looked for by
what is written down of it. `missing.txt` says what is not there, and why.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from nydusd.cli.ctl.connection import Api, SilentError
from nydusd.cli.ctl.picture import png, states_of
from nydusd.cli.ctl.silent import Record
from nydusd.cli.ctl.text import list_at, number_at, table_at, text_at
from nydusd.cli.ctl.verb import Verb
from nydusd.errors import NydusError
from nydusd.logs import clean
from nydusd.version import build_info

_PATIENCE: Final = 5.0
_LOG_BYTES: Final = 4 << 20
"""The end of the log that is taken along."""
_ANSWERS: Final = {
    "daemon.json": "/api/v1/daemon",
    "events.json": "/api/v1/daemon/events",
    "cache.json": "/api/v1/nydusd/cache",
    "load.json": "/api/v1/nydusd/load",
    "mounts.json": "/api/v1/nydusd/mounts",
    "quota.json": "/api/v1/nydusd/quota",
    "workers.json": "/api/v1/nydusd/workers",
    "inflight.json": "/api/v1/metrics/inflight",
}
_OF_PROCESS: Final = ("status", "stack", "wchan", "syscall", "limits")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write it (nydusd-bugreport-TIME.tar.gz)")


class _Report:
    """The parts by name, and what is missing."""

    def __init__(self) -> None:
        self.parts: dict[str, bytes] = {}
        self.missing: list[str] = []
        self.silent = False
        """Whether the daemon has not answered in time."""

    def ask(self, name: str, get: Callable[[], bytes]) -> None:
        """One part that the daemon tells, unless it tells nothing."""
        if self.silent:
            self.missing.append(f"{name}: not asked for")
        else:
            self.take(name, get)

    def take(self, name: str, get: Callable[[], bytes]) -> None:
        """One part; whatever goes wrong costs this part only."""
        try:
            self.parts[name] = get()
        except SilentError as error:
            self.silent = True
            self.missing.append(f"{name}: {error}")
        except (NydusError, OSError, ValueError, subprocess.SubprocessError) as error:
            self.missing.append(f"{name}: {error}")

    def tar(self, top: str) -> bytes:
        out = io.BytesIO()
        self.parts["missing.txt"] = "".join(f"{clean(line)}\n" for line in self.missing).encode(errors="replace")
        with tarfile.open(fileobj=out, mode="w:gz") as tar:
            for name, data in self.parts.items():
                entry = tarfile.TarInfo(f"{top}/{name}")
                entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
                tar.addfile(entry, io.BytesIO(data))
        return out.getvalue()


def run(api: Api, args: argparse.Namespace) -> Iterator[str]:
    api = api.with_patience(_PATIENCE)
    report = _Report()
    answers: dict[str, dict[str, object]] = {}

    def answer(name: str, path: str) -> bytes:
        text = api.text(path)
        data = json.loads(text) if text else None  # 204: there is nothing to tell
        answers[name] = data if isinstance(data, dict) else {}
        return json.dumps(data, indent=1).encode()

    for name, path in _ANSWERS.items():
        report.ask(name, partial(answer, name, path))
    report.ask("metrics.txt", lambda: api.text("/metrics/prometheus"))
    report.ask("chunkmaps.png", lambda: _chunk_maps(api))
    report.ask("trace.json", lambda: json.dumps(api.get("/api/v1/nydusd/trace")).encode())
    report.take("system.txt", _system)
    report.take("mountinfo.txt", lambda: Path("/proc/self/mountinfo").read_bytes())
    rows = list_at(answers.get("workers.json", {}), "processes")
    processes = {int(number_at(row, "pid")): text_at(row, "role").replace(" ", "-") for row in rows}
    log: object = table_at(answers.get("mounts.json", {}), "log").get("file")
    if report.silent:
        try:
            record = Record(api.path)
        except NydusError as error:
            report.missing.append(f"what is written down of the daemon: {error}")
        else:
            processes, log = record.processes(), record.log_file()
            report.take("config.json", record.configuration)
            report.take("chunkmaps.png", record.chunk_maps)
    for pid, role in processes.items():
        for file in _OF_PROCESS if pid > 0 else ():
            report.take(f"processes/{role}-{pid}-{file}.txt", partial(_proc, pid, file))
    report.take("nydusd.log", lambda: _log(log, [pid for pid in processes if pid > 0]))
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    path = args.output or f"nydusd-bugreport-{stamp}.tar.gz"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as f:
            f.write(report.tar(f"nydusd-bugreport-{stamp}"))
    except (OSError, ValueError) as error:
        raise NydusError(f"--output {path}: {getattr(error, 'strerror', None) or error}") from error
    yield f"{path}: {len(report.parts)} parts, {len(report.missing)} missing"


def _chunk_maps(api: Api) -> bytes:
    return png([states_of(blob) for blob in list_at(api.get("/api/v1/nydusd/chunks"), "blobs")])


def _proc(pid: int, file: str) -> bytes:
    return Path(f"/proc/{pid}/{file}").read_bytes()


def _system() -> bytes:
    lines = [f"{name}: {value}" for name, value in build_info().items()]
    lines += [f"kernel: {platform.release()} {platform.machine()}", f"cpus: {os.cpu_count()}"]
    for file in ("/proc/meminfo", "/proc/loadavg", "/etc/os-release"):
        lines += ["", file, Path(file).read_text()]
    return "\n".join(lines).encode()


def _log(file: object, pids: Sequence[int]) -> bytes:
    """The end of the log: of its file, or of what the journal has of these processes, and of those of their unit that have
    ended: it files a line under its writer. A unit that has only started them is not theirs.
    """
    if isinstance(file, str):
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as f:
            f.seek(max(0, os.fstat(fd).st_size - _LOG_BYTES))
            return f.read(_LOG_BYTES)
    if not pids:
        raise NydusError("no process of the daemon is known, and no file")
    command = ["journalctl", "--no-pager", "--quiet", "--lines=20000", *(f"_PID={pid}" for pid in pids)]
    for unit in sorted({unit for pid in pids if (unit := _unit(pid)) is not None}):
        if _main_pid(unit) in pids:
            command += ["+", f"_SYSTEMD_UNIT={unit}"]
    found = subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=True).stdout
    return clean(found.decode(errors="replace")).encode()[-_LOG_BYTES:]


def _unit(pid: int) -> str | None:
    """The service of systemd's that a process belongs to. None as well for one that somebody has started by hand."""
    try:
        groups = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return None
    found = re.search(r":/system\.slice/(?:.*/)?([^/\n]+\.service)(?:/|$)", groups, re.MULTILINE)
    return None if found is None else found[1]


def _main_pid(unit: str) -> int | None:
    command = ["systemctl", "show", "--property=MainPID", "--value", "--", unit]
    try:
        return int(subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=True).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


VERB = Verb(("bugreport",), "a tarball of all that helps to look into a problem", run, add_arguments)
