"""An upgrade of the workers: a new generation with the code that is on disk takes the place of the old one, or nothing changes.

Part of the supervisor. A fresh fork server loads the code and is given the session's fds to hold. From it the new workers are
forked, as many as there are. Each must say HELLO in our protocol and pass its trial (`trial.py`). Then, within one turn of
the loop, they are given the jobs, the fresh fork server takes the place of the old one, and the old workers leave: each does
the job that it has. If anything goes wrong before that turn, what is new is ended and the old goes on, untouched.

What holds after SIGKILL of the supervisor: `state.json` names both fork servers and all workers from their starts on; all of
them end, or are ended by the next supervisor, which loads the code on disk anyway. A front end is never touched.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nydusd import points
from nydusd.errors import NydusError
from nydusd.forkserver.fresh import FreshServer
from nydusd.ipc.messages import DONE, HELLO, PROTOCOL, Json
from nydusd.supervisor.children import Child
from nydusd.supervisor.trial import Steps, Trial

if TYPE_CHECKING:
    from nydusd.supervisor.staff import Staff

log = logging.getLogger(__name__)

_PATIENCE: Final = 60.0
"""Seconds until an upgrade that comes to no end is given up: it takes about one."""
_END_SECONDS = 1.0


class UpgradeError(NydusError):
    """The workers were not upgraded, and the old ones go on."""


class Upgrade:
    """`answer` is called once, with {"ok": …} or {"error": …}."""

    def __init__(self, staff: Staff, trial: Trial, answer: Callable[[Json], object]) -> None:
        self.candidates: list[Child] = []
        """The new workers, as long as they are on trial."""
        self._staff = staff
        self._family = staff.family
        self._trial = trial
        self._answer = answer
        self._server: FreshServer | None = None
        self._hellos: dict[bytes, Json] = {}
        self._started = time.monotonic()
        self._deadline = self._started + _PATIENCE
        self._doing = "the start of a fork server"
        self._result: Json = {}
        self._steps = self._run()

    def pids(self) -> list[int]:
        """Processes that are not the daemon's yet."""
        servers = [] if self._server is None else self._server.pids
        return [*servers, *(child.pid for child in self.candidates if child.pid)]

    def step(self, now: float) -> bool:
        """Go on as far as that can be done without waiting; True when it is over."""
        try:
            self._look(now)
            next(self._steps)
            return False
        except StopIteration:
            self._finish({"ok": self._result})
        except (NydusError, OSError) as e:
            self.give_up(str(e) if isinstance(e, NydusError) else f"{self._doing}: {e.strerror or e}")
        except Exception as e:
            log.exception("an upgrade of the workers failed by a bug of ours")
            self.give_up(f"{self._doing}: internal error: {e!r}")
        return True

    def wait(self, now: float) -> float:
        """Seconds until it has taken too long, or its trial goes on without what it waits for."""
        return min(self._deadline, self._trial.until) - now

    def close(self) -> None:
        """The daemon ends."""
        if self.pids():
            self.give_up("the daemon ends")

    def _look(self, now: float) -> None:
        """Raises UpgradeError when something of what is new has ended, or all has taken too long."""
        for child in self.candidates:
            pidfd = child.pidfd
            status = child.reap()
            if status is not None:
                self._family.forget(pidfd)
                raise UpgradeError(f"{child.name} of the new generation ended with status {status} ({self._doing})")
        if self._server is not None and self._server.ended() and self._server.ready:
            raise UpgradeError(f"the new fork server has ended ({self._doing})")
        if now >= self._deadline:
            raise UpgradeError(f"{self._doing} took longer than {_PATIENCE:g} s")

    def _run(self) -> Steps:
        family, staff = self._family, self._staff
        before = {child.commit for child in staff.workers()}
        server = self._server = FreshServer()
        points.reach("upgrade: server not noted")
        family.watch(server.fileno())
        family.remember()  # before it holds anything: so that a successor ends it
        points.reach("upgrade: server noted")
        self._doing = "loading the code that is on disk"
        server.hold(
            family.fork_server.held
        )  # before any child is made: so it has them when it takes the old one's place
        points.reach("upgrade: server holds")
        while not server.is_ready():
            yield
        self._doing = "starting the new generation"
        if not staff.workers():
            raise UpgradeError("this daemon has no workers now")
        for old in staff.workers():
            child = Child(old.role, old.index, "workers")
            family.prepare(child)
            yield from self._start(server, child)
        while not all(child.identity in self._hellos for child in self.candidates):
            yield
        points.reach("upgrade: all have said hello")
        for child in self.candidates:
            spoken = self._hellos[child.identity].get("protocol")
            if spoken != PROTOCOL:
                raise UpgradeError(
                    f"the code on disk speaks protocol {spoken}, this daemon {PROTOCOL}: workers alone cannot be upgraded,"
                    " have the whole daemon succeeded (docs/operating.md)"
                )
        self._doing = "the trial of the new generation"
        yield from self._trial.run(self.candidates)
        points.reach("upgrade: trial passed")
        old_ones, number = self._switch(server), len(self.candidates)
        self._doing = "the end of the old generation"
        after = {child.commit for child in self.candidates}
        self.candidates, self._deadline = [], math.inf
        while any(child in family.children for child in old_ones):
            yield
        points.reach("upgrade: old ones gone")
        self._result = {
            "workers": number,
            "from": ", ".join(sorted(before)),
            "to": ", ".join(sorted(after)),
            "checked": self._trial.note,
            "seconds": round(time.monotonic() - self._started, 3),
        }

    def _start(self, server: FreshServer, child: Child) -> Steps:
        spec, fds = self._family.spec_of(child)
        spec_fd = child.write_spec(spec)
        try:
            server.ask_for_child(child.module, [spec_fd, *fds], child.load)
        finally:
            os.close(spec_fd)
        identity = child.identity
        points.reach("upgrade: candidate asked for")
        self._staff.guests[identity] = lambda kind, body: self._hear(identity, kind, body)
        self.candidates.append(child)
        while (process := server.take_child()) is None:
            yield
        child.begin(process, server.commit)
        points.reach("upgrade: candidate not noted")
        self._family.watch(child.pidfd)
        self._family.remember()
        points.reach("upgrade: candidate noted")

    def _switch(self, server: FreshServer) -> list[Child]:
        """Give the jobs to the new generation; gives the old workers. From here on there is no way back, nor a need of one."""
        family, staff = self._family, self._staff
        old_ones = staff.workers()
        family.forget(server.fileno())
        for child in self.candidates:
            del staff.guests[child.identity]
            family.children.append(child)
            family.live.add(child.identity)
            staff.pools[child.role].worker_ready(child.identity)
        points.reach("upgrade: new ones have the jobs")
        for child in old_ones:
            staff.dismiss(child)
        points.reach("upgrade: old ones dismissed")
        family.succeed(server)
        points.reach("upgrade: succession noted")
        self._server = None
        server.close()
        points.reach("upgrade: former server ended")
        staff.recount()
        self._trial.close()
        log.info("the jobs are given to a new generation of workers, %s", ", ".join(c.name for c in self.candidates))
        return old_ones

    def _hear(self, identity: bytes, kind: bytes, body: Json) -> None:
        if kind == HELLO:
            self._hellos[identity] = body
        elif kind == DONE:
            self._trial.answered(identity, body)

    # --- the end ----------------------------------------------------------------------------------------------

    def give_up(self, why: str) -> None:
        """End what is new, and say why."""
        self._steps.close()
        if self._server is not None:
            self._family.forget(self._server.fileno())
            self._server.close()
            self._server = None
        for child in self.candidates:
            self._staff.guests.pop(child.identity, None)
            child.send(signal.SIGKILL)
        for child in self.candidates:
            if child.process is not None:
                self._family.forget(child.pidfd)
                child.process.wait(_END_SECONDS)
                child.reap()
        self.candidates = []
        self._trial.close()
        self._family.remember()
        log.warning("the workers are not upgraded: %s", why)
        self._finish({"error": {"status": UpgradeError.rest_status, "message": f"the workers are not upgraded: {why}"}})

    def _finish(self, answer: Json) -> None:
        if "ok" in answer:
            log.info("the workers are upgraded: %s", answer["ok"])
        self._answer(answer)
