"""How a daemon ends: what asks for it, and what is done then; all is removed, or all is left to the next one.

Runs in the supervisor. A signal, the API and an error ask for an end; the loop of the daemon stops after its turn then, and
`end` does the rest. What only one kind of daemon has to do is in its own `stop`.

What holds after SIGKILL in the middle: until the unmount the next daemon here takes over, as after any SIGKILL; later it finds
a run-time folder and shared memory that nobody uses, and removes them. Of what is left to it nothing is removed, and the lock
is given up last.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from nydusd import points
from nydusd.errors import MountError

if TYPE_CHECKING:
    from nydusd.frontends.fuse.session import Session
    from nydusd.storage.api.factory import BlobFactory
    from nydusd.supervisor.engine import Engine
    from nydusd.supervisor.family import Family
    from nydusd.supervisor.handover import Handover
    from nydusd.supervisor.listener import Listener
    from nydusd.supervisor.notify import Notifier
    from nydusd.supervisor.runtime import Runtime

log = logging.getLogger(__name__)


class Ending:
    """The end of the daemon that serves at `serves`. `sources`: what its loop polls for input besides, and who takes it."""

    def __init__(
        self,
        serves: str,
        runtime: Runtime,
        family: Family,
        factory: BlobFactory,
        handover: Handover,
        notifier: Notifier,
        sources: dict[int, Callable[[], None]],
    ) -> None:
        self._serves = serves
        self._runtime = runtime
        self._family = family
        self._factory = factory
        self._handover = handover
        self._notifier = notifier
        self._sources = sources
        self.asked = False
        """Whether the loop ends after its turn."""
        self.unmounts = True
        """Whether what is served is unmounted then."""
        self._failed = False

    @property
    def leaves_all(self) -> bool:
        """Whether an end leaves everything as it is to the next one."""
        return self._handover.waiting or self._handover.leaving

    # --- what asks for it -------------------------------------------------------------------------------------

    def ask(self, unmount: bool = True) -> None:
        """End the loop after this turn."""
        self.asked = True
        self.unmounts = self.unmounts and unmount

    def by_signal(self, *, can_leave: bool) -> None:
        """`can_leave`: whether there is a mount that goes on without us.

        What systemd starts again takes over, perhaps as newer code; nobody who reads notices. So it is asked first.
        """
        answer = self._notifier.ask_for_restart() if can_leave else None
        if answer is None:
            self.ask()
        elif answer not in self._sources:
            self._family.watch(answer)
            self._sources[answer] = self._systemd_has_said

    def _systemd_has_said(self) -> None:
        answer = self._notifier.ask_for_restart()
        assert answer is not None
        self._family.forget(answer)
        del self._sources[answer]
        self._handover.leaving = self._notifier.restarts()
        self.ask(unmount=not self._handover.leaving)

    def by_api(self, *, can_leave: bool) -> None:
        """End without unmounting; if a successor waits for that, leave everything to it.

        If one was killed while it waited, whoever tells us to end may not know that yet: then to the next one, if there is
        a mount that goes on without us.
        """
        found = self._runtime.has_successor()
        self._handover.leaving = can_leave if found is None else found
        points.reach("handover: told to exit")
        self.ask(unmount=False)

    def by_error(self) -> None:
        """A mount that was served, or taken over, is left as a SIGKILL would leave it."""
        log.error("%s stays mounted, for the next daemon here to take it over", self._serves)
        self._handover.leaving = self._failed = True
        self.ask(unmount=False)

    # --- what is done then ------------------------------------------------------------------------------------

    def end(
        self,
        engine: Engine | None,
        listener: Listener | None,
        metrics: socket.socket | None,
        turn: Callable[[float], None],
        workers_have_ended: Callable[[], None],
        spared: Callable[[], set[str]],
    ) -> None:
        """Unmount, store what is ready, end all children, leave nothing behind; or leave all that to the next one.

        `turn(seconds)` is a turn of the daemon's loop; `spared`: shared memory that stays, since somebody reads by it.
        """
        self.asked = True
        if self.leaves_all:
            if engine is not None and not self._failed:
                engine.come_to_rest(turn)
            self._let_go(listener, workers_have_ended)
            return
        self._notifier.send("STOPPING=1")
        sockets, session, stays = self._handover.sockets, self._family.session, spared()
        if engine is not None:
            engine.staff.close()
        with ExitStack() as steps:  # backwards, and each one whatever becomes of those before it
            steps.callback(self._runtime.remove, stays)
            steps.callback(self._family.close)
            steps.callback(self._factory.close, stays)
            if sockets is not None:
                steps.callback(sockets.close)
            if engine is not None:
                steps.callback(engine.close)
            if session is not None:
                steps.callback(session.close)
            steps.callback(workers_have_ended)
            steps.callback(self._family.end)
            if engine is not None:
                steps.callback(engine.store_all, turn)
            if session is not None and self.unmounts:
                steps.callback(_try_unmount, session)
            if listener is not None:
                steps.callback(listener.remove)
            if metrics is not None:
                steps.callback(metrics.close)

    def _let_go(self, listener: Listener | None, workers_have_ended: Callable[[], None]) -> None:
        """Leave everything to the next one. Front ends serve what is cached until then."""
        self._family.leave(keep_fork_server=self._handover.leaving)
        workers_have_ended()
        points.reach("handover: others ended")
        if listener is not None:
            listener.remove()
        if self._handover.sockets is not None:
            self._handover.sockets.close()
        if self._handover.waiting:
            self._runtime.leave_line()
        points.reach("handover: before the lock is free")
        self._runtime.let_go()


def _try_unmount(session: Session) -> None:
    points.reach("stop: before the unmount")
    try:
        session.unmount()
    except MountError as e:
        log.error("%s", e)
