"""Staff: how many workers there are, and how those end that are too many: no job is lost, no reader waits longer.

Part of the supervisor. A worker that is to leave gets no more jobs, and ends when it has done the one that it has; if that
takes too long it is killed, and another does the job again.

What holds after SIGKILL of the supervisor: all workers end with it. How many an operator wants is in `state.json`, so the
next supervisor starts as many; a stop forgets it.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from nydusd import points
from nydusd.errors import ConfigError, NydusError
from nydusd.ipc.messages import Json
from nydusd.supervisor.children import Child

if TYPE_CHECKING:
    from nydusd.storage.api.factory import BlobFactory
    from nydusd.supervisor.family import Family
    from nydusd.supervisor.pool import WorkerPool
    from nydusd.supervisor.runtime import Runtime
    from nydusd.supervisor.upgrade import Upgrade

log = logging.getLogger(__name__)

ROLES: Final = ("fetch", "decompress")
MOST: Final = 128
"""Workers of a role at most."""
_PATIENCE = 30.0
"""Seconds that a worker may take for its last job."""


Send = Callable[[bytes, Json], None]


class UnderWayError(NydusError):
    """Two changes of the workers at once."""

    rest_status = 409


class Staff:
    """`pools` are the workers' by role, `send(identity, message)` gives a job to one. `step` is called in each turn of the
    supervisor's loop."""

    def __init__(
        self, family: Family, pools: Mapping[str, WorkerPool], send: Send, factory: BlobFactory, runtime: Runtime
    ) -> None:
        self.family = family
        self.pools = pools
        self.guests: dict[bytes, Callable[[bytes, Json], None]] = {}
        """Who hears what workers on trial say, by their identities."""
        self._send = send
        self._factory = factory
        self._runtime = runtime
        self._upgrade: Upgrade | None = None
        self._changing: set[str] = set()
        """Roles of which there are too few or too many."""
        family.others = lambda: [] if self._upgrade is None else self._upgrade.pids()

    def workers(self) -> list[Child]:
        """The places of workers that are to stay."""
        return [child for child in self.family.children if child.role in ROLES and not child.leaving]

    def on_trial(self) -> list[Child]:
        """Workers of a new generation that are not trusted yet."""
        return [] if self._upgrade is None else self._upgrade.candidates

    def upgrade(self, answer: Callable[[Json], object]) -> None:
        """Begin an upgrade of the workers; `answer` is told how it ended. Raises UnderWayError, or OSError."""
        # Loaded by then, but not while a client waits for the start.
        from nydusd.supervisor.trial import Trial
        from nydusd.supervisor.upgrade import Upgrade

        self._refuse_while_upgrading()
        mounts = self.family.mounts
        assert mounts is not None
        trial = Trial(self._send, self.pools, self._factory, self._runtime, mounts.unused.let_go)
        self._upgrade = Upgrade(self, trial, answer)

    def _refuse_while_upgrading(self) -> None:
        if self._upgrade is not None:
            raise UnderWayError("an upgrade of the workers is under way")

    def close(self) -> None:
        """The daemon ends: what is on trial ends first."""
        if self._upgrade is not None:
            self._upgrade.close()

    def scale(self, wanted: Mapping[str, object]) -> Json:
        """Have so many workers of each role, 0 for as many as are configured. Raises ConfigError, and nothing changes then.

        Gives, by role, how many there are and how many there will be.
        """
        self._refuse_while_upgrading()
        there = {child.role for child in self.family.children}
        counts: dict[str, int] = {}
        for role, count in wanted.items():
            if role not in ROLES:
                raise ConfigError(f"workers: role {role!r} is unknown; there are {' and '.join(ROLES)}")
            if role not in there:
                raise ConfigError(f"workers: this daemon has no {role} workers")
            if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MOST:
                raise ConfigError(
                    f"workers: {role}: {count!r} is not allowed; it must be 1 to {MOST}, or 0 for what is configured"
                )
            counts[role] = count
        if not counts:
            raise ConfigError("workers: say how many of which role are wanted: decompress=4")
        self.family.wanted |= counts
        self._changing |= counts.keys()
        self.family.remember()
        points.reach("scale: noted")
        answer = {role: {"before": len(self._staying(role)), "wanted": self.family.count(role)} for role in counts}
        log.info("workers: %s", ", ".join(f"{role} {row['before']} -> {row['wanted']}" for role, row in answer.items()))
        return answer

    def _staying(self, role: str) -> list[Child]:
        return [child for child in self.family.children if child.role == role and not child.leaving]

    def dismiss(self, child: Child) -> None:
        """Have a worker end after its job."""
        child.leave_by = time.monotonic() + _PATIENCE
        if child.process is not None:
            self.pools[child.role].retire(child.identity)

    def recount(self) -> None:
        """Look whether there are as many as there are to be."""
        self._changing |= {child.role for child in self.family.children if child.role in ROLES}

    def step(self, now: float) -> None:
        """Start or dismiss who is too few or too many, one start a turn; end those who have done their last job."""
        if self._upgrade is not None and self._upgrade.step(now):
            self._upgrade = None
        for role in list(self._changing):
            self._change(role)
        for child in [child for child in self.family.children if child.leave_by is not None]:
            assert child.leave_by is not None
            if child.process is None:
                self.family.children.remove(child)
            elif now >= child.leave_by:
                log.warning("%s is to leave and has not done its job; killing it", child.name)
                child.send(signal.SIGKILL)
                child.leave_by = now + _PATIENCE  # it may wait for a disk, and end when that answers
            elif not self.pools[child.role].is_busy(child.identity):
                child.send(signal.SIGTERM)
                points.reach("scale: one is told to end")

    def _change(self, role: str) -> None:
        staying = sorted(self._staying(role), key=lambda child: child.index)
        missing = self.family.count(role) - len(staying)
        if missing <= 1:
            self._changing.discard(role)
        for child in staying[missing:] if missing < 0 else ():
            self.dismiss(child)
        if missing > 0:
            free = next(index for index in range(len(staying) + 1) if all(child.index != index for child in staying))
            try:
                self.family.add(Child(role, free, "workers"))
                points.reach("scale: one started")
            except NydusError as e:
                log.error("%s; trying again", e)

    def wait(self, now: float) -> float | None:
        """Seconds until `step` has something to do; None: nothing."""
        if self._changing:
            return 0.0
        waits = [child.leave_by - now for child in self.family.children if child.leave_by is not None]
        if self._upgrade is not None:
            waits.append(self._upgrade.wait(now))
        return min(waits, default=None)


def wanted_of(record: Json) -> dict[str, int]:
    """How many workers of each role an operator has wanted, by the record of a supervisor that was killed."""
    found = record.get("workers")
    rows = found.items() if isinstance(found, dict) else ()
    return {role: count for role, count in rows if role in ROLES and isinstance(count, int) and 0 <= count <= MOST}
