"""Child processes, made by the fork server: each with a spec, a pidfd to watch, and a back-off when it keeps dying."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nydusd.errors import NydusError
from nydusd.forkserver.client import ForkServer, LoadingError
from nydusd.forkserver.environment import environment
from nydusd.forkserver.process import Process
from nydusd.ipc.messages import Json
from nydusd.ipc.spec import write_spec

if TYPE_CHECKING:
    from nydusd.supervisor.adoption import FrontEnd

log = logging.getLogger(__name__)

_STEADY = 2.0
"""A child that lived this many seconds starts the next time without delay: it did not die of its start or its first job."""
_KILL_SECONDS = 30.0
"""How long the kernel may take to end what was killed: more than any I/O that it waits for."""
_DELAY_FIRST, _DELAY_MOST, _DOUBLINGS = 0.05, 5.0, 7


class Turns:
    """How many processes a place has had. Those who share it never have the same number at once."""

    def __init__(self) -> None:
        self._last = 0

    def next(self, known: int) -> int:
        """A number that is new; `known` is one that somebody else gave out."""
        self._last = max(self._last, known) + 1
        return self._last


class Child:
    """One place in the daemon (`fuse 0`, `decompress 1`, …) and the process that fills it now."""

    def __init__(self, role: str, index: int, module: str, load: Sequence[str] = ()) -> None:
        """`load`: modules that the fork server is to have loaded, beside those that every daemon needs."""
        self.role = role
        self.load = load
        self.index = index
        self.module = module
        self.generation = 0
        self.turns = Turns()
        self.mark = ""
        """Of a process that is to end with this supervisor: tells it from one of another's that is slow to end."""
        self.commit = ""
        """Which build its process runs: that of its fork server."""
        self.process: Process | None = None
        self.adopted: FrontEnd | None = None
        """What is known of the process if another supervisor has started it."""
        self.restart_at: float | None = None
        self.deaths = 0
        """How often in a row it died early: what its back-off grows with."""
        self.hung = False
        """Killed by us because it hung."""
        self.resting = False
        """Ended by us because there was nothing to do (`rest.py`)."""
        self.crashed = False
        """The last process died by itself, and was not killed."""
        self.leave_by: float | None = None
        """It ends after its job, at this time at the latest (`time.monotonic()`), and nobody fills its place again."""
        self._started = 0.0

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"

    @property
    def identity(self) -> bytes:
        """Its ZeroMQ identity: a successor has another one, so nothing meant for the dead reaches it."""
        return f"{self.role}-{self.index}-{self.generation}{self.mark}".encode()

    @property
    def leaving(self) -> bool:
        """Whether its process is its last."""
        return self.leave_by is not None

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    @property
    def pidfd(self) -> int:
        return self.process.pidfd if self.process is not None else -1

    def start(self, server: ForkServer, spec: Json, fds: Sequence[int]) -> None:
        """Start a process; `fds` are inherited under the numbers that the spec names.

        Where the fork server is loading and does not wait, there is none yet, and `restart_at` is now. Raises NydusError
        when the system has no room for another process; `restart_at` then says when to try again.
        """
        try:
            spec_fd = self.write_spec(spec)
            try:
                self.begin(server.spawn(self.module, [spec_fd, *fds], self.load), server.commit)
            finally:
                os.close(spec_fd)
        except LoadingError:
            self.restart_at = time.monotonic()
        except OSError as e:
            raise self.no_room(e) from e

    def no_room(self, error: OSError) -> NydusError:
        """The system has refused what a process needs: `restart_at` says when to try again. What to raise."""
        self._started = time.monotonic()  # it was tried: the next pause is longer
        self._back_off()
        return NydusError(f"{self.name} cannot be started: {error.strerror or error}")

    def write_spec(self, spec: Json) -> int:
        """Make ready for the next process: an fd with its spec, which the caller closes. Raises OSError."""
        self.generation = self.turns.next(self.generation)
        self.restart_at = None
        self.hung = self.resting = False
        self._started = time.monotonic()
        spec |= {"identity": self.identity.decode(), "index": self.index}
        if self.role == "fetch":
            spec["environment"] = environment(secrets=True)
        return write_spec(spec)

    def begin(self, process: Process, commit: str) -> None:
        """A fork server of this build has made the process."""
        self.process, self.commit = process, commit

    def adopt(self, frontend: FrontEnd) -> None:
        """Fill the place with a process that another supervisor has started."""
        self.adopted, self.process = frontend, frontend.process
        self.generation, self.commit = frontend.generation, frontend.commit

    def reap(self) -> int | None:
        """The exit status (negative: signal) if the process has ended; sets when it may be started again."""
        if self.process is None or (status := self.process.poll()) is None:
            return None
        self.process.close()
        self.process = self.adopted = None
        self.crashed = self.hung or status not in (0, -signal.SIGKILL, -signal.SIGTERM)
        if not self.resting:
            self._back_off()
        return int(status)

    def _back_off(self) -> None:
        now = time.monotonic()
        self.deaths = 0 if now - self._started > _STEADY else self.deaths + 1
        # The first restart is at once: a single kill must not cost its readers a delay.
        exponent = min(self.deaths - 1, _DOUBLINGS)
        self.restart_at = now + (min(_DELAY_FIRST * 2**exponent, _DELAY_MOST) if exponent > 0 else 0.0)

    def send(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)


def end_all(children: Sequence[Child], patience: float) -> None:
    """End processes: by SIGTERM, and by SIGKILL those that are still there after `patience` seconds."""
    for child in children:
        child.send(signal.SIGTERM)
    deadline = time.monotonic() + patience
    for child in children:
        if child.process is None:
            continue
        if child.process.wait(max(0.0, deadline - time.monotonic())) is None:
            log.warning("%s did not end; killing it", child.name)
            child.send(signal.SIGKILL)
            child.process.wait(_KILL_SECONDS)
        child.reap()


def reap_strays(children: Sequence[Child], others: Sequence[int]) -> None:
    """Let go of processes that became our children when their parents ended: what a worker had started.

    `others`: pids of children of ours that somebody else looks after.
    """
    ours = {child.pid for child in children} | set(others)
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if found.si_pid in ours:
                return  # its turn comes first
            os.waitpid(found.si_pid, os.WNOHANG)


def renew_front_end(children: Sequence[Child], fork_server: ForkServer) -> None:
    """Of those that were taken over and are of another build, have one succeeded by one of ours, which goes on where it is.

    One at a time, and none while another is missing.
    """
    front_ends = [child for child in children if child.role == "fuse"]
    if any(child.process is None for child in front_ends) or not fork_server.ready:
        return
    for child in front_ends:
        if child.adopted is not None and child.commit != fork_server.commit:
            log.info("%s (pid %d) is of build %s; starting another", child.name, child.pid, child.commit)
            child.send(signal.SIGTERM)
            return
