"""A copy of the nursery becomes a daemon: it takes over all that the stub has, begins, and reports its exit status.

Its fork server is forked off before it reads what may hold secrets. All that can fail comes before READY; the stub then says
GO, and from then on the daemon's supervisor and the stub live and die together: the kernel sends it SIGKILL when the stub is
gone, for its leash, a pipe, is closed then. Before GO nothing is begun: the end of this process costs nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import resource
import select
import signal
import socket
import sys
from typing import NamedTuple

from nydusd import priority
from nydusd.forkserver.__main__ import main as be_fork_server
from nydusd.forkserver.client import ForkServer
from nydusd.forkserver.environment import environment
from nydusd.forkserver.start import FOR_DAEMON
from nydusd.ipc import passed
from nydusd.ipc.spec import read_spec, write_spec
from nydusd.nursery import place
from nydusd.nursery.stand import NOTHING
from nydusd.proctitle import set_title

FDS = 6
"""How many fds a stub sends."""
_GO_SECONDS = 10.0
_CGROUPS = "/sys/fs/cgroup"


class Birth(NamedTuple):
    """What a daemon is to be made from: the pid of the stub, the connection to it, and the fds that it has sent."""

    stub: int
    wire: socket.socket
    stdin: int
    stdout: int
    stderr: int
    folder: int
    letter: int
    leash: int


def be_born(birth: Birth) -> int:
    """Be the daemon, or its fork server, until it ends. Raises OSError if something of the stub cannot be had."""
    os.setsid()
    os.fchdir(birth.folder)
    become_like(birth.stub)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        birth.wire.close()
        os.dup2(birth.stdout, 1)
        os.dup2(birth.stderr, 2)  # without a log file it is the log of all that it makes
        for fd in birth[2:]:
            os.close(fd)
        return _be_fork_server(theirs)
    theirs.close()
    os.close(birth.folder)
    arguments, given = _read_letter(birth.letter)
    sys.argv = arguments
    priority.hurry(pid)
    _tell_environment(ours)
    if not _may_begin(birth.wire):
        return 1
    _fasten(birth.leash)
    for number, fd in enumerate((birth.stdin, birth.stdout, birth.stderr)):
        os.dup2(fd, number)
        os.close(fd)
    set_title("supervisor")
    from nydusd.cli.nydusd import main

    status = main(arguments[1:], ForkServer((ours, pid, given), birth.stub))
    sys.stdout.flush()
    with contextlib.suppress(OSError):  # nobody is there to be told
        birth.wire.send(f"exit {status}".encode())
    return status


def _be_fork_server(line: socket.socket) -> int:
    """A fork server as if it had been started by the daemon: in its environment, but for what may be secret."""
    _, fds = passed.receive(line, 1, 1)
    if not fds:
        return 1
    os.environ.clear()
    read_spec(["--spec-fd", str(fds[0])])
    return be_fork_server([str(line.detach()), *FOR_DAEMON])


def _tell_environment(line: socket.socket) -> None:
    fd = write_spec({"environment": environment(secrets=False)})
    try:
        socket.send_fds(line, [b"e"], [fd])
    finally:
        os.close(fd)


def _read_letter(fd: int) -> tuple[list[str], int]:
    """Arguments, and a memfd with the environment, which becomes ours, too."""
    size = os.fstat(fd).st_size
    data = b""
    while len(data) < size:
        data += os.pread(fd, size - len(data), len(data))
    os.close(fd)
    parts = data.split(b"\0")
    count = int(parts[0])
    os.environ.clear()
    given = os.memfd_create("nydusd-environment", os.MFD_CLOEXEC)
    with open(given, "wb", closefd=False) as file:
        file.write(b"\0".join(parts[1 + count :]))
    for part in parts[1 + count :]:
        name, _, value = part.partition(b"=")
        os.environb[name] = value
    return [os.fsdecode(part) for part in parts[1 : 1 + count]], given


def _may_begin(wire: socket.socket) -> bool:
    """Say READY; whether the stub still waits for us. It may have gone on by itself, or be dead."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        socket.send_fds(wire, [place.READY], [pidfd])
    finally:
        os.close(pidfd)
    wire.settimeout(_GO_SECONDS)
    try:
        return wire.recv(16) == place.GO
    except TimeoutError:  # it is stopped, and may go on later
        wire.send(NOTHING)
        return False


def _fasten(leash: int) -> None:
    """Be killed when the stub is gone: nobody ever writes into this pipe, and the stub alone holds its other end."""
    fcntl.fcntl(leash, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(leash, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(leash, fcntl.F_SETFL, fcntl.fcntl(leash, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(leash, select.POLLIN)
    if poll.poll(0):  # it was gone before
        os.kill(os.getpid(), signal.SIGKILL)


def become_like(stub: int) -> None:
    """Limits, mask, priority and control groups of the stub. Raises OSError if one cannot be had."""
    for name in dir(resource):
        if name.startswith("RLIMIT_"):
            limit = getattr(resource, name)
            wanted = resource.prlimit(stub, limit)
            if resource.getrlimit(limit) != wanted:
                resource.setrlimit(limit, wanted)
    with open(f"/proc/{stub}/status") as lines:
        found = re.search(r"^Umask:\s*([0-7]+)$", lines.read(), re.MULTILINE)
    if found is None:
        raise OSError("the kernel tells no umask")
    os.umask(int(found[1], 8))
    nice = os.getpriority(os.PRIO_PROCESS, stub)
    if os.getpriority(os.PRIO_PROCESS, 0) != nice:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    score = _read(f"/proc/{stub}/oom_score_adj")
    if _read("/proc/self/oom_score_adj") != score:
        _write("/proc/self/oom_score_adj", score)
    _join_control_groups(_read(f"/proc/{stub}/cgroup"))


def _join_control_groups(wanted: str) -> None:
    for line in set(wanted.splitlines()) - set(_read("/proc/self/cgroup").splitlines()):
        number, controllers, path = line.split(":", 2)
        if number != "0":
            top = f"{_CGROUPS}/{controllers.removeprefix('name=')}"
        else:
            top = f"{_CGROUPS}/unified" if os.path.isdir(f"{_CGROUPS}/unified") else _CGROUPS
        _write(f"{top}{path}/cgroup.procs", str(os.getpid()))
    if _read("/proc/self/cgroup") != wanted:
        raise OSError("the control group of the command cannot be joined")


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
