"""Watch: which workers do nothing on their job any more: stopped, deadlocked, spinning, or stuck in the kernel.

Runs in the supervisor. A worker's heartbeat is what the kernel counts anyway: how often it went to sleep of its own accord.
All work does, at least at each timeout of a backend; what is stopped, spins, or waits for ever does not. So a worker
needs no thread and no timer for it, and none can beat on while its job hangs. One that starts may be starved by a busy
machine in the middle of its imports: for that, being made to sleep is a sign of life, too.
"""

from __future__ import annotations

from collections.abc import Mapping

_LOOKS = 4
"""Looks in the time after which a worker is given up."""


class Watch:
    """`patience`: seconds without a heartbeat, on one job, after which a worker is given up."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._interval = patience / _LOOKS
        self._seen: dict[int, tuple[tuple[int, int], float]] = {}
        self._looked = 0.0

    def next_look(self) -> float:
        """When `hung` is to be called next (`time.monotonic()`)."""
        return self._looked + self._interval

    def hung(self, busy: Mapping[int, int], now: float) -> list[int]:
        """The pids of hung workers. `busy`: by the pid of each worker that has one, the number of its job; 0: its start."""
        # If we were not there to look (stopped, or the whole machine was), neither may they have been.
        absent = now - self._looked > self._patience
        self._looked = now
        before, self._seen = self._seen, {}
        for pid, job in busy.items():
            beat = job, _sleeps(pid, starts=job == 0)
            known = before.get(pid)
            self._seen[pid] = known if known is not None and known[0] == beat and not absent else (beat, now)
        return [pid for pid, (_, since) in self._seen.items() if now - since >= self._patience]


def _sleeps(pid: int, starts: bool) -> int:
    """How often a process has gone to sleep of its own accord, or, if it `starts`, at all; 0 if it is gone."""
    wanted = (b"voluntary_ctxt_switches:", b"nonvoluntary_ctxt_switches:") if starts else b"voluntary_ctxt_switches:"
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            return sum(int(line.split()[1]) for line in status if line.startswith(wanted))
    except OSError:
        return 0
