"""Watch: ends workers that do nothing on their job any more: stopped, deadlocked, spinning, or stuck in the kernel.

Runs in the supervisor. A worker's heartbeat is what the kernel counts anyway: how often it went to sleep of its own accord.
All work does, at least at each timeout of a backend; what is stopped, spins, or waits for ever does not. So a worker
needs no thread and no timer for it, and none can beat on while its job hangs. One that starts may be starved by a busy
machine in the middle of its imports: for that, being made to sleep is a sign of life, too. And some jobs only compute, over
all chunks of a blob or all files of an image: for those, being on a processor, or in line for one, is one, though not for ever.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nydusd.supervisor.children import Child
    from nydusd.supervisor.pool import WorkerPool

log = logging.getLogger(__name__)

_LOOKS = 4
"""Looks in the time after which a worker is given up."""
_COMPUTING = 12
"""How many times as long a worker may only compute: longer than any job takes, but who is in an endless loop must end, too."""


class _Seen(NamedTuple):
    """The heartbeat at the last look, since when it is this one, and when there was any sign of life (`time.monotonic()`)."""

    beat: tuple[int, int]
    since: float
    alive: float


class Watch:
    """`patience`: seconds without a heartbeat, on one job, after which a worker is given up."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._interval = patience / _LOOKS
        self._seen: dict[int, _Seen] = {}
        self._looked = 0.0
        self._told: set[int] = set()
        """Pids of those who were killed and did not end, as was said."""

    def next_look(self) -> float:
        """When to look for hung workers next (`time.monotonic()`)."""
        return self._looked + self._interval

    def end_hung(self, children: Sequence[Child], pools: Mapping[str, WorkerPool], now: float) -> None:
        """Kill workers that do nothing on their job, or never get ready; the job goes to another when they are reaped.

        That may last: what a disk holds in the kernel ends when the disk goes on (`pool.py` says why its job waits for that).
        """
        workers = {child.pid: child for child in children if child.role in pools and child.pid}
        jobs = {pid: pools[child.role].job_of(child.identity) for pid, child in workers.items()}
        busy = {pid: job for pid, job in jobs.items() if job is not None}
        computing = {pid for pid in busy if pools[workers[pid].role].may_compute(workers[pid].identity)}
        told, self._told = self._told, set()
        for pid in self.hung(busy, now, computing):
            child = workers[pid]
            if not child.hung:
                log.warning(
                    "%s (pid %d) has shown no sign of life for %g s; killing it", child.name, pid, self._patience
                )
                child.hung = True
                child.send(signal.SIGKILL)
                continue
            self._told.add(pid)
            if pid not in told:
                log.warning("%s (pid %d) was killed and does not end: a disk holds it, and its job", child.name, pid)

    def hung(self, busy: Mapping[int, int], now: float, computing: Container[int] = ()) -> list[int]:
        """The pids of hung workers. `busy`: by the pid of each worker that has one, the number of its job; 0: its start.

        `computing`: the pids of those whose job may compute for long.
        """
        # If we were not there to look (stopped, or the whole machine was), neither may they have been.
        absent = now - self._looked > self._patience
        self._looked = now
        before, self._seen = self._seen, {}
        for pid, job in busy.items():
            beat = job, _sleeps(pid, starts=job == 0)
            known = before.get(pid)
            if known is None or known.beat != beat or absent:
                self._seen[pid] = _Seen(beat, now, now)
            else:
                self._seen[pid] = known._replace(alive=now) if pid in computing and _runs(pid) else known
        return [pid for pid, seen in self._seen.items() if self._is_over(seen, now)]

    def _is_over(self, seen: _Seen, now: float) -> bool:
        return now - seen.alive >= self._patience or now - seen.since >= self._patience * _COMPUTING


def _sleeps(pid: int, starts: bool) -> int:
    """How often a process has gone to sleep of its own accord, or, if it `starts`, at all; 0 if it is gone."""
    wanted = (b"voluntary_ctxt_switches:", b"nonvoluntary_ctxt_switches:") if starts else b"voluntary_ctxt_switches:"
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            return sum(int(line.split()[1]) for line in status if line.startswith(wanted))
    except OSError:
        return 0


def _runs(pid: int) -> bool:
    """Whether the main thread of a process is on a processor or waits for one: not asleep, not stopped."""
    try:
        with open(f"/proc/{pid}/task/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b") ")[2].startswith(b"R")
    except OSError:
        return False
