"""`CopiedDaemon`: a daemon of which each start but the first is a copy of a nursery, so that a stub stands for it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from pathlib import Path

from nydusd.storage.state.lock import start_time
from tests.support.daemon import Daemon
from tests.support.discipline import descendants, is_running, wait_until
from tests.support.nursery import noted_processes, nurseries, seats_kept


class CopiedDaemon(Daemon):
    """Its supervisor is a child of the nursery. What was started is killed, or the supervisor, at random."""

    choose = random.Random()
    """Of the act under way."""

    def supervisors(self) -> list[int]:
        """Those that run, or ran last, of this mount: one, but in an upgrade or for a moment after a kill."""
        found = []
        for (pid, start), *_ in noted_processes(Path(self._environment["NYDUSD_RUNTIME_DIR"]), self.place):
            with contextlib.suppress(OSError):
                if start_time(pid) == start:
                    found.append(pid)
        return found

    def family(self) -> list[int]:
        found = super().family()
        for supervisor in self.supervisors():
            found += [pid for pid in (supervisor, *descendants(supervisor)) if pid not in (self.pid, *found)]
        of_others = {*nurseries(), *seats_kept()}
        return [pid for pid in found if pid not in of_others]

    def kill_supervisor(self) -> None:
        """SIGKILL the stub, or what it stands for; the other one ends by that."""
        assert self._process is not None
        stub = self.choose.random() < 0.5
        supervisors = self.supervisors()
        victim = supervisors[0] if supervisors and not stub else self.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        self._process.wait()
        wait_until(lambda: not any(map(is_running, supervisors)), "the end of the supervisor", 60)
