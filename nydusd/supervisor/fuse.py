"""`nydusd fuse`: images behind one FUSE session, and how a successor takes it over from a supervisor that is gone.

Runs in the supervisor. A start makes the session, or adopts that of a killed supervisor with the front ends that serve it
(`adoption.py`), and may have to wait for it first (`handover.py`); from then on the loop is that of any daemon.

What holds after SIGKILL: front ends go on serving what is cached and hold the session; the next supervisor goes on from
wherever this one was, at each step of a start or of a takeover.
"""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from nydusd import points, priority
from nydusd.cli.options import FuseOptions
from nydusd.frontends.fuse.kernel_cache import forget_attributes, forget_names
from nydusd.frontends.fuse.protocol import ROOT_ID
from nydusd.frontends.fuse.session import Session, clear_stale_mount, is_held, mounted_device
from nydusd.ipc.messages import Json
from nydusd.supervisor import control_ops, left_by_erofs
from nydusd.supervisor.children import Child
from nydusd.supervisor.daemon import Supervisor
from nydusd.supervisor.ends import end_together
from nydusd.supervisor.mount_request import first_request
from nydusd.supervisor.restore import Restore

if TYPE_CHECKING:
    from nydusd.cli.options import Options
    from nydusd.config import Config
    from nydusd.forkserver.client import ForkServer
    from nydusd.supervisor.adoption import Former
    from nydusd.supervisor.mount_table import MountTable

log = logging.getLogger(__name__)

_ROUNDS = 10
"""How often it is looked whether somebody holds a session on."""
_FIRST_SECONDS = 0.1
"""Seconds for which a takeover does nothing else at most, until its first workers are there."""


class FuseDaemon(Supervisor):
    """One daemon with one FUSE session."""

    fuse_module = "nydusd.frontends.fuse"
    """What front ends run."""
    own_note = ""
    """The suffix of what we keep beside the run-time folder for a mount of EROFS (`left_by_erofs.py`)."""

    def __init__(self, options: Options, config: Config, fork_server: ForkServer) -> None:
        super().__init__(options, config, fork_server)
        self._former: Former | None = None
        """What was taken over, until it is served again."""
        self._record: Json = {}
        """What the daemon before us has written down."""

    def start(self) -> None:
        """Everything up to RUNNING. The mount is served before the workers are there: `ls` needs none."""
        options = self.options
        assert isinstance(options, FuseOptions)
        count = self.config.front_end_count(options.fuse_threads)
        left_by_erofs.refuse(self.run_dir, options.serves, self.own_note)
        if options.upgrade and not self._runtime.is_free():
            self.handover.wait_for_predecessor(self)
        self._begin(count)
        first = first_request(options, self.config)
        image = None
        if self._former is None:
            mountpoint = self.fuse_mountpoint()
            self._end_left(mountpoint)
            clear_stale_mount(mountpoint)
            image = None if first is None else self.mounts.mount_first(first)
            session = self._family.session = Session.mount(mountpoint, read_ahead_kib=1024)
            points.reach("start: mounted")
            self._bind()
            session.open_lanes(count)
            points.reach("start: lanes opened")
            self._family.remember()
            points.reach("start: noted")
        else:
            session = self._former.session
        places = {
            "fuse": [Child("fuse", i, self.fuse_module) for i in range(len(session.lanes))],
            "fetch": [Child("fetch", i, "workers") for i in range(self._family.count("fetch"))],
            "decompress": [Child("decompress", i, "workers") for i in range(self._family.count("decompress"))],
        }
        restore = None if self._former is None else self._go_on(self._former, places)
        if restore is not None:
            self._answer_first(restore, places)
        # The API at once: clients wait for it. Then one of each: `ls` needs a front end, the first read a blob prepared.
        self.open_api()
        if restore is None:
            for turn in range(max(map(len, places.values()))):
                for children in places.values():
                    for child in children[turn : turn + 1]:
                        self._family.add(child)
        if first is not None and image is not None:
            self.mounts.serve(image, first.files)
        self._ready(f"{self._shown()} mounted at {options.mountpoint}")
        if restore is not None:
            self._know_all(restore)
            self._all_known(restore)
            self._answer_put_off()
            self._former = None

    def fuse_mountpoint(self) -> str:
        """Where the FUSE session is mounted."""
        return self.options.serves

    # --- takeover ---------------------------------------------------------------------------------------------

    def _take(self, record: Json) -> list[int] | None:
        """The pids of what a killed supervisor has left and we take over or end later; None if nothing is taken over."""
        if not record:
            return None
        self._record = record
        from nydusd.supervisor.adoption import take_over

        assert isinstance(self.options, FuseOptions)
        runtime = self._runtime
        options = replace(self.options, mountpoint=self.fuse_mountpoint())

        def look() -> Former | None:
            where = runtime.folder, runtime.prefix
            return take_over(record, options, self.config, *where, self._store, self.handover.sent, self.told)

        former = look()
        if former is None and not self.handover.waited and self.options.supervisor is not None and "session" in record:
            device = str(record["session"].get("device"))
            if is_held(options.mountpoint, device):
                self.handover.wait_for_session(self)
                former = look()
        self._former = former
        self.handover.forget()
        if former is None:
            return None
        self._family.inherited = True
        runtime.term = former.term
        return [*(frontend.process.pid for frontend in former.frontends), *(pid for pid, _ in former.keepers)]

    def _end_left(self, mountpoint: str) -> None:
        """What a daemon before us has mounted here cannot be taken over: end whoever still holds its session, noted or not.

        Else the mount would neither answer nor be dead. Nobody is ended who may be another daemon's: not where nothing of one
        before us was written down, or what was speaks of another mount, nor where somebody holds it who is no process of ours.
        """
        self._store.keep(None)
        device = mounted_device(mountpoint)
        session = self._record.get("session")
        # A record that is damaged, or of another release, may not say of which mount it speaks.
        wanted = session.get("device") if isinstance(session, dict) else device
        if device is None or not self._record or wanted != device:
            return
        from nydusd.frontends.fuse.holders import holders_of

        for _ in range(_ROUNDS):  # a fork server may just have made one
            holders = holders_of(device)
            if not holders or not all(holder.is_left for holder in holders):
                return
            for holder in holders:
                log.warning(
                    "ending pid %d (%s): it holds the mount of a daemon that was killed", holder.pid, holder.title
                )
            end_together([(holder.pid, holder.start) for holder in holders], self.told)

    def _know_mounts(self, rows: int, table: MountTable | None = None) -> None:
        former = self._former
        if former is not None:
            self._family.session = former.session
            rows, table = len(former.session.lanes), former.table
        super()._know_mounts(rows, table)

    def _go_on(self, former: Former, places: dict[str, list[Child]]) -> Restore:
        """Take the places of a killed supervisor: its front ends, its mounts, and its name on the sockets.

        Front ends ask from then on; of the images that of the command line is known, and of the others how to know them.
        """
        for frontend in former.frontends:
            self._family.adopt(places["fuse"][frontend.number], frontend)
            points.reach("takeover: one front end adopted")
        places["fuse"] = [child for child in places["fuse"] if child.process is None]
        # They are to ask as soon as we are there.
        priority.hasten_all(frontend.process.pid for frontend in former.frontends)
        self._family.remember()
        points.reach("takeover: noted")
        former.end_keepers(self.fork_server.pids, self.told)
        points.reach("takeover: keepers ended")
        self._bind()
        points.reach("takeover: bound")
        self._notifier.send(f"STATUS=taking over {len(former.records)} images of a supervisor that was killed")
        restore = Restore(self.mounts, self.engine.router, former.records, control_ops.recall(self))
        self._restoring = True
        restore.begin()
        former.table.begin_term(former.term)
        points.reach("takeover: term begun")
        self._mounts_changed(None)
        points.reach("takeover: front ends woken")
        if self.options.supervisor is not None and not self.handover.waited:
            # We serve, but whoever started us after a crash waits for this, to tell us to take over and to start.
            self._first_state = "INIT"
        return restore

    def _answer_first(self, restore: Restore, places: dict[str, list[Child]]) -> None:
        """Before all else, which takes its time: missing front ends, a worker of each role, and what these have to do.

        Somebody may have waited since the former supervisor was killed. The other workers come one a turn of the loop, which
        does not turn yet where the API is there already: whoever asks that is to be told what we are.
        """
        (fetch, *_), (decompress, *_) = places["fetch"], places["decompress"]
        for child in [*places["fuse"][:1], fetch, decompress, *places["fuse"][1:]]:
            self._family.add(child)
        restore.serve()
        self.engine.router.checkpoints.resume()
        if self.handover.waited:
            return
        self.fork_server.waits = False
        until = time.monotonic() + _FIRST_SECONDS
        pools = self.engine.pools
        self._turn(0)
        while any(pools[child.role].job_of(child.identity) == 0 for child in (fetch, decompress)):
            left = until - time.monotonic()
            if left <= 0 or self.stopping:
                break
            self._turn(min(left, self._timeout()))
        points.reach("takeover: first jobs given out")

    # --- while it serves --------------------------------------------------------------------------------------

    def _mounts_changed(self, place: str | None) -> None:
        """Wake the front ends: those that nobody asks anything would not look at the table of mounts."""
        session = self._family.session
        if place is not None and session is not None:
            forget_names(session.mountpoint)
            if place == "/":
                forget_attributes(session.fd, ROOT_ID, session.mountpoint)
        for child in self.children:
            if child.role == "fuse":
                child.send(signal.SIGURG)
        super()._mounts_changed(place)

    def _is_over(self, child: Child, status: int) -> bool:
        session = self._family.session
        return child.role == "fuse" and (status == 0 or (session is not None and session.is_over()))

    def _can_leave(self) -> bool:
        return self._family.session is not None or self._former is not None
