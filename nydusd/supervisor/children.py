"""Child processes: fresh interpreters, each with a spec, a pidfd to watch, and a back-off when it keeps dying."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from nydusd.ipc.messages import Json
from nydusd.ipc.spec import write_spec

_STEADY = 10.0
"""A child that lived this many seconds starts the next time without delay."""
_DELAY_FIRST, _DELAY_MOST = 0.05, 5.0


class Child:
    """One place in the daemon (`fuse 0`, `decompress 1`, …) and the process that fills it now."""

    def __init__(self, role: str, index: int, module: str) -> None:
        self.role = role
        self.index = index
        self.module = module
        self.generation = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.pidfd = -1
        self.restart_at: float | None = None
        self.expected = False  # it was told to stop
        self._started = 0.0
        self._delay = 0.0

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
        """Start a process; `fds` are inherited under the numbers that the spec names."""
        self.generation += 1
        self.restart_at = None
        spec_fd = write_spec(spec | {"identity": self.identity.decode(), "index": self.index})
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", self.module, "--spec-fd", str(spec_fd)],
                stdin=subprocess.DEVNULL,
                pass_fds=[spec_fd, *fds],
            )
        finally:
            os.close(spec_fd)
        self.pidfd = os.pidfd_open(self.process.pid)
        self._started = time.monotonic()

    def reap(self) -> int | None:
        """The exit status (negative: signal) if the process has ended; sets when it may be started again."""
        if self.process is None or (status := self.process.poll()) is None:
            return None
        os.close(self.pidfd)
        self.pidfd = -1
        self.process = None
        now = time.monotonic()
        self._delay = 0.0 if now - self._started > _STEADY else min(max(self._delay * 2, _DELAY_FIRST), _DELAY_MOST)
        # The first restart is at once: a single kill must not cost its readers a delay.
        self.restart_at = now + (self._delay if self._delay > _DELAY_FIRST else 0.0)
        return int(status)

    def send(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
