"""The daemon's side of its fork server: start it, have it make children, start another when it is gone.

Runs in the supervisor, and is begun by the command line before all that the supervisor needs is loaded: the fork server loads
what children need meanwhile.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from nydusd.forkserver.process import Process
from nydusd.version import GIT_COMMIT, commit_on_disk

log = logging.getLogger(__name__)

PACKET_MAX = 64 * 1024
FDS_MAX = 253
_SET_CHILD_SUBREAPER = 36
_PATIENCE = 5.0
"""Seconds that a fork server may take to answer: it takes a few milliseconds."""
_FIRST_PATIENCE = 20.0
"""The same for its first answer, before which it loads all that children need: 0.3 s, unless the machine is busy."""
_SECRET_NAME = re.compile(
    r"(?i)secret|token|auth|passw|credential|cookie|key|sign|proxy|^NYDUS_HEADER_|^DOCKER_CONFIG$"
)
_SECRET_VALUE = re.compile(r"://[^/\s]*@")
"""What may hold credentials, by its name or as an URL: only a process that talks to backends gets it."""

FOR_DAEMON = (
    "nydusd.frontends.fuse.main",
    "nydusd.formats.rafs_v6",
    "nydusd.ipc.client",
    "workers.loop",
    "workers.fill",
    "workers.prepare",
    "workers.fetch",
)
"""What the children of any daemon need: loaded while the supervisor loads its own."""


class ForkServer:
    """One process at a time, started anew when it is gone. Raises OSError when there is no room for it."""

    def __init__(self, made: tuple[socket.socket, int, int] | None = None) -> None:
        """`made`: our end of the line to a fork server that is there already, its pid, and an fd with our environment."""
        self._process: Process | None = None
        self._line: socket.socket | None = None
        self.commit = GIT_COMMIT
        """Which build it has loaded: what was on disk when it started, or what we have loaded if it is a copy of us."""
        self._given = -1 if made is None else made[2]
        """What holds the environment that we were given, where /proc/self/environ does not."""
        if made is None:
            self._start()
        else:
            self._line, self._process = made[0], Process(made[1])
            self._line.settimeout(_PATIENCE)

    @property
    def pid(self) -> int:
        """Its process now; 0: none."""
        return self._process.pid if self._process is not None else 0

    def spawn(self, module: str, fds: Sequence[int], load: Sequence[str] = ()) -> Process:
        """Have a child run `module`, the first of `fds` being its spec's; it has these fds under the numbers that we have them.

        `load`: modules that the fork server is to have loaded before. Raises OSError when that fails, twice.
        """
        _take_in_orphans()
        request = json.dumps({"module": module, "fds": list(fds), "load": list(load)}).encode()
        answer = self._ask(request, fds)
        if answer is None:
            self._renew()
            answer = self._ask(request, fds)
        if answer is None:
            raise OSError(errno.ETIMEDOUT, "the fork server does not answer")
        if "pid" not in answer:
            raise OSError(answer["errno"], answer["error"])
        return Process(answer["pid"])

    def hold(self, fds: Sequence[int]) -> list[int]:
        """Have it hold copies of these fds for a supervisor to come; gives their numbers there. Raises OSError."""
        held: list[int] = []
        for start in range(0, len(fds), FDS_MAX):
            part = fds[start : start + FDS_MAX]
            answer = self._ask(json.dumps({"hold": True}).encode(), part)
            if answer is None:
                raise OSError(errno.ETIMEDOUT, "the fork server does not answer")
            held += answer["held"]
        return held

    def guard(self, delay: float) -> None:
        """Have it start this command again if this process is killed, and nobody else does so for `delay` seconds.

        The environment that we were given stays in a memfd until then: no process has it in its memory. Raises OSError.
        """
        environ = os.memfd_create("nydusd-environment", os.MFD_CLOEXEC)
        try:
            # As it was: secrets were taken out of `os.environ`.
            with open("/proc/self/environ" if self._given < 0 else f"/proc/self/fd/{self._given}", "rb") as given:
                os.write(environ, given.read())
            command = [sys.executable, "-P", "-m", "nydusd", *sys.argv[1:]]
            request = {"hold": True, "guard": {"delay": delay, "command": command}}
            if self._ask(json.dumps(request).encode(), [environ]) is None:
                raise OSError(errno.ETIMEDOUT, "the fork server does not answer")
        finally:
            os.close(environ)

    def keep(self) -> None:
        """To be called now and then: if it has ended, start another, so that one is there when it is needed."""
        if self._process is not None and self._process.poll() is not None:
            self._renew()

    def close(self) -> None:
        """End it. Its children stay."""
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(_PATIENCE)
            self._process.close()
            self._process = None

    def _renew(self) -> None:
        log.warning("the fork server (pid %d) is gone or hangs; starting another", self.pid)
        self.close()
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            os.set_inheritable(theirs.fileno(), True)
            try:
                pid = os.posix_spawn(
                    sys.executable,
                    [sys.executable, "-P", "-m", "nydusd.forkserver", str(theirs.fileno()), *FOR_DAEMON],
                    environment(secrets=False),
                    file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
                    setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
                )
            except OSError:
                ours.close()
                raise
        ours.settimeout(_FIRST_PATIENCE)
        self.commit = commit_on_disk()
        self._line, self._process = ours, Process(pid)

    def _ask(self, request: bytes, fds: Sequence[int]) -> dict[str, Any] | None:
        """The answer; None if there is none."""
        if self._line is None:
            return None
        try:
            socket.send_fds(self._line, [request], list(fds))
            packet = self._line.recv(PACKET_MAX)
            self._line.settimeout(_PATIENCE)
        except OSError:  # a time-out is one, too
            return None
        return json.loads(packet) if packet else None


@functools.cache
def _take_in_orphans() -> None:
    """Become a subreaper: a child whose parent ends, as the fork server has it, becomes ours. Raises OSError."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def environment(*, secrets: bool) -> dict[str, str]:
    """What a child finds in its environment: ours, with or without what may hold credentials."""
    return {
        name: value
        for name, value in os.environ.items()
        if secrets or not (_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))
    }
