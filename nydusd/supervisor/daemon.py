"""The supervisor: mounts, starts and restarts all other processes, routes misses, and stops cleanly. It holds no data.

One thread, one poll over its two ROUTER sockets, a pidfd a child, and the pipe into which signal handlers write. Nothing in
the loop waits for a disk or a network: whatever may, is a job for a worker.

What holds after SIGKILL of the supervisor: workers and the API process end (their lifeline pipe closes), front ends go on
serving what is cached, the kernel fds live on in the front ends, the state bytes stay in shared memory.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from nydusd import points, priority
from nydusd.cli.options import FuseOptions
from nydusd.errors import MountError
from nydusd.forkserver.client import ForkServer
from nydusd.frontends.fuse.kernel_cache import forget_attributes, forget_names
from nydusd.frontends.fuse.protocol import ROOT_ID
from nydusd.frontends.fuse.session import Session, clear_stale_mount, is_held
from nydusd.ipc.messages import Json, SlotRef
from nydusd.storage.api.factory import BlobFactory
from nydusd.storage.cache.prefetch import PrefetchWorker
from nydusd.supervisor import control_ops
from nydusd.supervisor.children import Child
from nydusd.supervisor.family import Family
from nydusd.supervisor.fd_store import FdStore
from nydusd.supervisor.handover import FUSE_DEVICE, EndedError, Handover
from nydusd.supervisor.images import Image
from nydusd.supervisor.listener import Listener, metrics_socket
from nydusd.supervisor.mounts import Mounts, first_request
from nydusd.supervisor.notify import Notifier
from nydusd.supervisor.pool import WorkerPool
from nydusd.supervisor.quota import Quota
from nydusd.supervisor.rest import Rest
from nydusd.supervisor.router import Router
from nydusd.supervisor.runtime import Runtime
from nydusd.supervisor.slots import SlotTable
from nydusd.supervisor.staff import Staff, wanted_of
from nydusd.supervisor.status import Status
from nydusd.supervisor.traffic import Traffic

if TYPE_CHECKING:
    from nydusd.cli.options import Options
    from nydusd.config import Config
    from nydusd.supervisor.adoption import Former
    from nydusd.supervisor.blobs import BlobTable
    from nydusd.supervisor.handover import Sent

log = logging.getLogger(__name__)

_STOP_PATIENCE = 10.0
"""Seconds that a stop waits for the last checkpoint."""


class Supervisor:
    """One daemon with one FUSE session; `Singleton` is one without."""

    blobs: BlobTable | None = None
    """The images of a singleton."""
    mounts_by_api = True
    """Whether the API may mount and unmount images."""
    front_end = ("FUSE", "`nydusd fuse` serves images through FUSE only")
    """By which way images are read, and why."""
    fuse_module = "nydusd.frontends.fuse"
    """What front ends run."""

    def __init__(self, options: Options, config: Config, fork_server: ForkServer) -> None:
        self.options = options
        self.fork_server = fork_server
        self.config = config
        self.pid = os.getpid()
        self.started = time.monotonic()
        self.state = "INIT"
        self._first_state = "RUNNING"
        self.images: dict[str, Image] = {}
        self.errors = control_ops.ErrorRing()
        self.settings: dict[str, dict[str, str]] = {}
        """What was set by the API at run time, by the id that it was set for."""
        self._runtime = Runtime(options.serves)
        self.run_dir = str(self._runtime.folder)
        self._poller = zmq.Poller()
        self._sources: dict[int, Callable[[], None]] = {}
        """What else is polled for input, and who takes it."""
        self._family = Family(options, config, fork_server, self._runtime, self._poller)
        self.children = self._family.children
        self._notifier = Notifier()
        self._status = Status(self._notifier, lambda: self.images.values())
        self._family.guarded = not self._notifier.active and options.supervisor is None
        self._store = FdStore(self._notifier)
        self.factory = BlobFactory(self._runtime.instance, str(self._runtime.folder))
        settings = config.rafs.prefetch if config.rafs is not None else None
        self.prefetch = PrefetchWorker(
            settings.batch_size if settings is not None else 0, settings.bandwidth_limit if settings is not None else 0
        )
        self._session: Session | None = None
        self._former: Former | None = None
        """What was taken over, until it is served again."""
        self._listener: Listener | None = None
        self._metrics: socket.socket | None = None
        self.handover = Handover(options.serves, self._runtime, self._family, self._poller, self._notifier)
        self._wake = -1
        self.stopping = False
        self._unmount = True
        self._next_checkpoint = time.monotonic() + config.nydusd.checkpoint_interval

    # --- start ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Everything up to RUNNING. The mount is served before the workers are there: `ls` needs none."""
        options = self.options
        assert isinstance(options, FuseOptions)
        count = self.config.front_end_count(options.fuse_threads)
        try:
            if options.upgrade and not self._runtime.is_free():
                self.handover.wait_for_predecessor(self)
            self._begin(count)
        except EndedError:
            self.stopping = True
            return
        first = first_request(options, self.config)
        image = None
        if self._former is None:
            mountpoint = self.fuse_mountpoint()
            clear_stale_mount(mountpoint)
            self._refuse_erofs(mountpoint)
            image = None if first is None else self.mounts.mount_first(first)
            self._session = self._family.session = Session.mount(mountpoint, read_ahead_kib=1024)
            points.reach("start: mounted")
            self._bind()
            self._session.open_lanes(count)
            points.reach("start: lanes opened")
            self._family.remember()
            points.reach("start: noted")
        assert self._session is not None
        places = {
            "fuse": [Child("fuse", i, self.fuse_module) for i in range(len(self._session.lanes))],
            "fetch": [Child("fetch", i, "workers") for i in range(self._family.count("fetch"))],
            "decompress": [Child("decompress", i, "workers") for i in range(self._family.count("decompress"))],
        }
        if self._former is not None:
            self._go_on(self._former, places)
        # The API at once: clients wait for it. Then one of each: `ls` needs a front end, the first read a blob prepared.
        self.open_api()
        for turn in range(max(map(len, places.values()))):
            for children in places.values():
                for child in children[turn : turn + 1]:
                    self._family.add(child)
        if self._former is not None:
            for recorded in self._former.records:
                self.mounts.serve(self.images[recorded.place], recorded.files)
            self._former = None
        elif first is not None and image is not None:
            self.mounts.serve(image, first.files)
        shown = ", ".join(image.source for image in self.images.values()) or "an empty folder"
        self._ready(f"{shown} is mounted at {options.mountpoint}")

    def _refuse_erofs(self, mountpoint: str) -> None:
        """Raises MountError where a killed `nydusd erofs` has left its mount: one above it would hide, not end it."""
        left = Path(self.run_dir)
        if any(left.with_suffix(suffix).exists() for suffix in (".erofs.json", ".tarfs.json", ".blobs")):
            from nydusd.frontends.erofs.session import top_is_erofs

            if top_is_erofs(mountpoint):
                raise MountError(
                    f"{mountpoint}: a `nydusd erofs` that was killed has left its mount here: start that again, or unmount it"
                )

    def _go_on(self, former: Former, places: dict[str, list[Child]]) -> None:
        """Take the places of a killed supervisor: its front ends, its mounts, and its name on the sockets."""
        for frontend in former.frontends:
            self._family.adopt(places["fuse"][frontend.number], frontend)
            points.reach("takeover: one front end adopted")
        places["fuse"] = [child for child in places["fuse"] if child.process is None]
        self._family.remember()
        points.reach("takeover: noted")
        former.end_keepers(self.fork_server.pids)
        points.reach("takeover: keepers ended")
        self._bind()
        points.reach("takeover: bound")
        self._notifier.send(f"STATUS=taking over {len(former.records)} images of a supervisor that was killed")
        self.mounts.restore(former.records)
        points.reach("takeover: mounts known")
        control_ops.recall(self)
        former.table.begin_term(former.term)
        points.reach("takeover: term begun")
        self._mounts_changed(None)
        points.reach("takeover: front ends woken")
        if self.options.supervisor is not None and not self.handover.waited:
            # We serve, but whoever started us after a crash waits for this, to tell us to take over and to start.
            self._first_state = "INIT"

    def take_sent(self, sent: Sent) -> None:
        """What whoever keeps our session has sent."""
        self.handover.take(sent)

    def session_fd(self) -> int:
        """The FUSE session's, -1 if there is none."""
        return -1 if self._session is None else self._session.fd

    def session_state(self) -> Json:
        """What else is kept with the session, by whoever keeps it for us."""
        return {}

    def session_device(self) -> int:
        """The number of the device that the session is of."""
        return FUSE_DEVICE

    def fuse_mountpoint(self) -> str:
        """Where the FUSE session is mounted."""
        return self.options.serves

    def _begin(self, rows: int) -> None:
        """What comes first in any daemon; `rows` is the number of front ends."""
        self.catch_signals()
        self._runtime.claim(self._take_all)
        if self.handover.waited:
            self._first_state = "RUNNING" if self.handover.told_to_start else "READY"
        runtime, former = self._runtime, self._former
        size = self.config.nydusd.arena_size
        self.slots, self.stage = SlotTable(runtime.arena, size, runtime.first), SlotTable(runtime.stage, size)
        self.factory.begin(runtime.first)
        table = None
        if former is None:
            control_ops.remember(self)
        else:
            self._session, table, rows = former.session, former.table, len(former.session.lanes)
        self.mounts = Mounts(
            runtime.folder, runtime.prefix, self.factory, self._mounts_changed, rows, runtime.first, table
        )
        self.images = self.mounts.images
        self._family.session, self._family.mounts = self._session, self.mounts

    def catch_signals(self) -> int:
        """First of all: a signal during the start ends the daemon after it, and nothing is left behind. Gives their pipe."""
        if self._wake < 0:
            self._wake, wake_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)
        return self._wake

    def _take_all(self, record: Json) -> list[int] | None:
        """What `_take` gives; and what an operator has told the killed supervisor about its workers."""
        self._family.wanted = wanted_of(record)
        return self._take(record)

    def _take(self, record: Json) -> list[int] | None:
        """The pids of what a killed supervisor has left and we take over or end later; None if nothing is taken over."""
        if not record or not isinstance(self.options, FuseOptions):
            return None
        from nydusd.supervisor.adoption import take_over

        runtime = self._runtime
        options = replace(self.options, mountpoint=self.fuse_mountpoint())

        def look() -> Former | None:
            where = runtime.folder, runtime.prefix
            return take_over(record, options, self.config, *where, self._store, self.handover.sent)

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
        runtime.term = former.term
        return [*(frontend.process.pid for frontend in former.frontends), *(pid for pid, _ in former.keepers)]

    def open_api(self) -> None:
        if any(child.role == "api" for child in self.children):
            return
        if self.options.apisock is not None:
            self._listener = Listener(self.options.apisock)
        self._metrics = metrics_socket(self.config.nydusd.metrics_listen)
        if self._listener is not None or self._metrics is not None:
            self._family.listeners = [-1 if sock is None else sock.fileno() for sock in (self._listener, self._metrics)]
            self._family.add(Child("api", 0, "nydusd.control"))

    def _ready(self, what: str) -> None:
        points.reach("start: before READY")
        self.state = self._first_state
        self._family.add_fetch_workers()
        self._store.keep(self._session)
        self._status.ready(what)
        priority.calm([*self.fork_server.pids, *(child.pid for child in self.children if child.pid)])
        log.info("%s", what)

    def _mounts_changed(self, place: str | None) -> None:
        """Wake the front ends: those that nobody asks anything would not look at the table of mounts."""
        if place is not None and self._session is not None:
            forget_names(self._session.mountpoint)
            if place == "/":
                forget_attributes(self._session.fd, ROOT_ID, self._session.mountpoint)
        for child in self.children:
            if child.role == "fuse":
                child.send(signal.SIGURG)
        if self.state == "RUNNING":
            self._family.add_fetch_workers()

    def _bind(self) -> None:
        sockets = self.handover.bind()
        for source in (sockets.front, sockets.work, self._wake):
            self._poller.register(source, zmq.POLLIN)
        self.fetch = WorkerPool("fetch", sockets.send_job, lambda: None, self._has_others)
        self.decompress = WorkerPool("decompress", sockets.send_job, self._prefetch_more)
        rafs = self.config.rafs
        self.router = Router(
            self.factory,
            self.fetch,
            self.decompress,
            self.slots,
            self.stage,
            self.prefetch,
            self._reply,
            amplify=rafs.batch_size if rafs is not None else 1 << 20,
            deadline=self.config.nydusd.read_deadline,
        )
        pools = {"fetch": self.fetch, "decompress": self.decompress}
        self.staff = Staff(self._family, pools, sockets.send_job, self.factory, self._runtime)
        self._traffic = Traffic(
            *(sockets, self.router, self.fetch, self.decompress, self._family.live), self.control, self.staff.guests
        )
        self._rest = Rest(
            self._family,
            (self.fetch, self.decompress),
            self.config.nydusd.worker_idle,
            lambda: not self.prefetch.idle(),
        )
        self.mounts.start(self.fetch, self.router, self.prefetch)
        self.quota = Quota(
            self._runtime.instance,
            self.factory,
            self.images.values,
            lambda: [self.pid, *self.fork_server.pids, *(child.pid for child in self.children)],
            (self.fetch, self.decompress),
            self.router.evictions,
        )

    def _reply(self, client: bytes, number: int, errno: int, slot: SlotRef | None) -> None:
        """Answer who has asked the router for chunks."""
        assert self.handover.sockets is not None
        self.handover.sockets.reply(client, number, errno, slot)

    def _has_others(self, server: str) -> bool:
        """Whether blobs of other servers than this one are in use."""
        return any(cache.server not in ("", server) and cache.users > 0 for cache in self.factory.blobs())

    def control(self, request: Json, answer: Callable[[Json], object]) -> None:
        """What the API process asks for."""
        # Here and not above: a start need not wait for what only operators ask.
        from nydusd.supervisor import report

        report.answer(self, request, answer)

    def _prefetch_more(self) -> None:
        if self.quota.allows_prefetch():
            self.router.prefetch()

    # --- children ---------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Look after children that have ended: their work goes to others, their place is filled again."""
        for child, status in self._family.reap(self._ended):
            if self.stopping:
                continue
            if self._is_over(child, status):
                log.info("%s was unmounted from outside", self.options.serves)
                self.ask_to_stop()
            else:
                self._family.judge(child, status)

    def _is_over(self, child: Child, status: int) -> bool:
        """Whether a child has ended because what it served was unmounted."""
        return child.role == "fuse" and (status == 0 or (self._session is not None and self._session.is_over()))

    def _ended(self, child: Child, identity: bytes) -> None:
        self.router.drop_client(identity)
        for pool in (self.fetch, self.decompress):
            pool.worker_died(identity, killed=not child.crashed)

    # --- the loop ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until told to stop."""
        # Now, while what is on disk is what we run: it may be another version when an operator asks for the first time.
        from nydusd.supervisor import report  # noqa: F401

        while not self.stopping:
            self._turn(self._timeout())

    def _timeout(self) -> float:
        now = time.monotonic()
        until = [self._next_checkpoint, self._family.due(), *self._rest.due()]
        alive = self._notifier.wait(now)
        if alive is not None:
            until.append(now + alive)
        waits = self.prefetch.wait(now), self.quota.wait(now), self.router.outages.wait(now), self.staff.wait(now)
        for wait in waits:
            if wait is not None:
                until.append(now + max(wait, 0.05))
        return max(0.0, min(until) - now)

    def _turn(self, timeout: float) -> None:
        events = dict(self._poller.poll(int(timeout * 1000) + 1 if timeout else 0))
        self._traffic.take(events)
        for source, take in self._sources.items():
            if source in events:
                take()
        if self._wake in events and os.read(self._wake, 64).strip(bytes([signal.SIGCHLD])):
            # What systemd starts again takes over, perhaps as newer code; nobody who reads notices.
            self.handover.leaving = self._can_leave() and self._notifier.restarts()
            self.ask_to_stop(unmount=not self.handover.leaving)
        self._reap()
        now = time.monotonic()
        self._family.tend_fork_server(events, now)
        if not self.stopping:
            self._family.restart(now)
            self.staff.step(now)
        self._family.look_after({"fetch": self.fetch, "decompress": self.decompress}, now)
        self._notifier.alive(now)
        self._status.tick(now)
        if now >= self._next_checkpoint:
            self._next_checkpoint = now + self.config.nydusd.checkpoint_interval
            self.router.checkpoint()
            for table in (self.slots, self.stage):
                table.trim()
        self.mounts.collect()
        self.quota.tick(now)
        self.router.tick()
        # In this order: an idle decompress worker may have prefetch want a blob opened.
        self.decompress.pump()
        self.fetch.pump()
        if not self.stopping:
            self._rest.tick(now)

    def _can_leave(self) -> bool:
        """Whether there is a mount that goes on without us."""
        return self._session is not None

    def ask_to_exit(self) -> None:
        """As the API has it: end without unmounting; if a successor waits for that, leave everything to it."""
        self.handover.leaving = self._runtime.has_successor()
        self.ask_to_stop(unmount=False)

    def ask_to_stop(self, unmount: bool = True) -> None:
        """End the loop after this turn."""
        self.stopping = True
        self._unmount = self._unmount and unmount

    def stop(self) -> None:
        """Unmount, store what is ready, end all children, leave nothing behind."""
        self.stopping = True
        self.state = "STOPPED"
        if self._former is not None or self.handover.waiting or self.handover.leaving:
            self._let_go()
            return
        self._notifier.send("STOPPING=1")
        if hasattr(self, "staff"):
            self.staff.close()
        with ExitStack() as steps:  # backwards, and each one whatever becomes of those before it
            steps.callback(self._runtime.remove)
            steps.callback(self._family.close)
            steps.callback(self.factory.close)
            if self.handover.sockets is not None:
                steps.callback(self.handover.sockets.close)
            if hasattr(self, "router"):
                steps.callback(self.stage.close)
                steps.callback(self.slots.close)
            if self._session is not None:
                steps.callback(self._session.close)
            steps.callback(self._family.end)
            if hasattr(self, "router"):
                steps.callback(self._last_checkpoint)
            if self._session is not None and self._unmount:
                steps.callback(self._try_unmount, self._session)
            if self._listener is not None:
                steps.callback(self._listener.remove)
            if self._metrics is not None:
                steps.callback(self._metrics.close)

    def _let_go(self) -> None:
        """Leave everything as it is to the next one, whether it waits or we cannot serve what we took over.

        Front ends serve what is cached until then.
        """
        self._family.leave(keep_fork_server=self.handover.leaving)
        if self._listener is not None:
            self._listener.remove()
        if self.handover.sockets is not None:
            self.handover.sockets.close()
        if self.handover.waiting:
            self._runtime.leave_line()
        self._runtime.let_go()

    @staticmethod
    def _try_unmount(session: Session) -> None:
        points.reach("stop: before the unmount")
        try:
            session.unmount()
        except MountError as e:
            log.error("%s", e)

    def _last_checkpoint(self) -> None:
        points.reach("stop: unmounted")
        deadline = time.monotonic() + _STOP_PATIENCE
        fetchers = [child for child in self.children if child.role == "fetch"]
        # A server that does not answer must not keep the worker that is to store what is here.
        stuck = self.fetch.refuse("fetch")
        for child in fetchers:
            if child.identity in stuck:
                child.send(signal.SIGKILL)
        while self.router.checkpoint() and time.monotonic() < deadline:
            if fetchers and not any(child.pid for child in fetchers):
                self._family.launch(fetchers[0])
            self._turn(0.05)
        points.reach("stop: maps stored")
