"""Child processes: fresh interpreters, each with a spec, a pidfd to watch, and a back-off when it keeps dying."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from nydusd.errors import NydusError
from nydusd.ipc.messages import Json
from nydusd.ipc.spec import write_spec
from nydusd.storage.backend.base import HEADER_VARIABLE
from nydusd.version import commit_on_disk

log = logging.getLogger(__name__)

_STEADY = 2.0
"""A child that lived this many seconds starts the next time without delay: it did not die of its start or its first job."""
_DELAY_FIRST, _DELAY_MOST, _DOUBLINGS = 0.05, 5.0, 7
_HURRY = 10
"""Levels of niceness by which a child that starts is preferred."""
_FOR_FETCH_ONLY = (HEADER_VARIABLE, "DOCKER_CONFIG")
_SECRET_NAME = re.compile(r"(?i)secret|token|auth|passw|credential|cookie|key|sign|proxy")
_SECRET_VALUE = re.compile(r"://[^/\s]*@")
"""What may hold credentials, by its name or as an URL: only a process that talks to backends gets it."""


class Child:
    """One place in the daemon (`fuse 0`, `decompress 1`, …) and the process that fills it now."""

    def __init__(self, role: str, index: int, module: str) -> None:
        self.role = role
        self.index = index
        self.module = module
        self.generation = 0
        self.commit = ""
        """Which build its process runs: a fresh interpreter loads what is on disk when it starts."""
        self.process: subprocess.Popen[bytes] | None = None
        self.pidfd = -1
        self.restart_at: float | None = None
        self.deaths = 0
        """How often in a row it died early: what its back-off grows with."""
        self.hung = False
        """Killed by us because it hung."""
        self.crashed = False
        """The last process died by itself, and was not killed."""
        self._started = 0.0

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"

    @property
    def identity(self) -> bytes:
        """Its ZeroMQ identity: a successor has another one, so nothing meant for the dead reaches it."""
        return f"{self.role}-{self.index}-{self.generation}".encode()

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    def start(self, spec: Json, fds: Sequence[int]) -> None:
        """Start a process; `fds` are inherited under the numbers that the spec names.

        Raises NydusError when the system has no room for another process; `restart_at` then says when to try again.
        """
        self.generation += 1
        self.restart_at = None
        self.commit = commit_on_disk()
        self.hung = False
        self._started = time.monotonic()
        try:
            spec_fd = write_spec(spec | {"identity": self.identity.decode(), "index": self.index, "nice": _nice()})
            try:
                with _in_a_hurry():
                    process = subprocess.Popen(
                        [sys.executable, "-P", "-m", self.module, "--spec-fd", str(spec_fd)],
                        stdin=subprocess.DEVNULL,
                        pass_fds=[spec_fd, *fds],
                        env=_environment(self.role),
                    )
            finally:
                os.close(spec_fd)
            try:
                self.pidfd = os.pidfd_open(process.pid)
            except OSError:
                process.kill()
                process.wait()
                raise
        except OSError as e:
            self._back_off()
            raise NydusError(f"{self.name} cannot be started: {e.strerror or e}") from e
        self.process = process

    def reap(self) -> int | None:
        """The exit status (negative: signal) if the process has ended; sets when it may be started again."""
        if self.process is None or (status := self.process.poll()) is None:
            return None
        os.close(self.pidfd)
        self.pidfd = -1
        self.process = None
        self.crashed = self.hung or status not in (0, -signal.SIGKILL, -signal.SIGTERM)
        self._back_off()
        return int(status)

    def _back_off(self) -> None:
        now = time.monotonic()
        self.deaths = 0 if now - self._started > _STEADY else self.deaths + 1
        # The first restart is at once: a single kill must not cost its readers a delay.
        exponent = min(self.deaths - 1, _DOUBLINGS)
        self.restart_at = now + (min(_DELAY_FIRST * 2**exponent, _DELAY_MOST) if exponent > 0 else 0.0)

    def send(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)


def _nice() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


@contextlib.contextmanager
def _in_a_hurry() -> Iterator[None]:
    """What is started in here goes before others until it is ready (`nydusd.ipc.spec.ready`), where we may decide that.

    A start takes 0.15 s of a processor, and readers wait for it: on a busy machine that is seconds.
    """
    before = _nice()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, before - _HURRY)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def _environment(role: str) -> dict[str, str]:
    """What a child finds in its environment: ours, without credentials unless it needs them."""
    return {
        name: value
        for name, value in os.environ.items()
        if role == "fetch"
        or not (name.startswith(_FOR_FETCH_ONLY) or _SECRET_NAME.search(name) or _SECRET_VALUE.search(value))
    }


def end_all(children: Sequence[Child], patience: float) -> None:
    """End processes: by SIGTERM, and by SIGKILL those that are still there after `patience` seconds."""
    for child in children:
        child.send(signal.SIGTERM)
    deadline = time.monotonic() + patience
    for child in children:
        if child.process is None:
            continue
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("%s did not end; killing it", child.name)
            child.send(signal.SIGKILL)
            child.process.wait()
        child.reap()
