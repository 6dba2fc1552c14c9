"""A child of a fork server that tells what it was given; and a fork server with its copy."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

from nydusd.forkserver.client import ForkServer
from nydusd.forkserver.process import Process
from nydusd.ipc.spec import write_spec
from tests.support.discipline import wait_until

CHILD = """
import json, os, signal, sys
from nydusd.ipc.spec import read_spec
spec = read_spec(sys.argv[1:])
fds = {}
for name in os.listdir("/proc/self/fd"):
    if os.path.lexists(f"/proc/self/fd/{name}"):
        fds[name] = os.readlink(f"/proc/self/fd/{name}")
told = {"argv": sys.argv, "fds": fds, "environment": dict(os.environ), "loaded": "extra" in sys.modules}
os.write(spec["out"], json.dumps(told).encode())
os.close(spec["out"])
if spec.get("wait"):
    signal.pause()
sys.exit(spec.get("status", 0))
"""
"""What is run by the module `child`, which a fixture writes."""
LEAVES = """
import sys
from nydusd.ipc.spec import read_spec
sys.exit(read_spec(sys.argv[1:])["status"])
"""
"""And by `leaves`."""


def spawn(server: ForkServer, load: tuple[str, ...] = (), **spec: object) -> tuple[Process, dict[str, object]]:
    """A child, and what it told."""
    reader, writer = os.pipe()
    with open(reader, "rb") as f:
        spec_fd = write_spec({"out": writer, **spec})
        try:
            process = server.spawn("child", [spec_fd, writer], load)
        finally:
            os.close(spec_fd)
            os.close(writer)
        return process, json.loads(f.read())


def spawn_leaving(server: ForkServer, status: int) -> Process:
    """A child that ends with this status. Whoever else was asked for it, and is stopped, has nothing that is missed."""
    spec_fd = write_spec({"status": status})
    try:
        return server.spawn("leaves", [spec_fd])
    finally:
        os.close(spec_fd)


def wait_for_copy(server: ForkServer) -> list[int]:
    def is_there() -> bool:
        server.tend()
        return len(server.pids) == 2

    wait_until(is_there, "a fork server and its copy", 60)
    return server.pids


def wait_until_gone(server: ForkServer, pid: int) -> None:
    """The daemon has seen the end of this one."""

    def is_gone() -> bool:
        server.tend()
        return pid not in server.pids

    wait_until(is_gone, "the end of a fork server", 60)


def stop(pid: int) -> None:
    """Until SIGCONT."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: ") T " in Path(f"/proc/{pid}/stat").read_text(), "it is stopped", 60)


def open_in(pid: int, like: int) -> list[int]:
    """The numbers under which a process has this file of ours open."""
    wanted, found = os.fstat(like), []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), wanted):
                found.append(int(name))
    return sorted(found)
