"""The supervisor: starts and restarts all other processes, routes misses, and stops cleanly. It holds no data.

What all daemons have: how they begin, and the loop. What they serve, and how that is taken over, is in a module each
(`fuse.py`, `erofs.py`, …); what answers requests in `engine.py`; how they end in `ending.py`.

One thread, one poll over its two ROUTER sockets, a pidfd a child, and the pipe into which signal handlers write. Nothing in
the loop waits for a disk or a network: whatever may, is a job for a worker.

What holds after SIGKILL of the supervisor: workers and the API process end (their lifeline pipe closes), front ends go on
serving what is cached, the kernel fds live on in the front ends, the state bytes stay in shared memory.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import zmq

from nydusd import points, priority
from nydusd.cli.options import FuseOptions
from nydusd.errors import MountError
from nydusd.frontends.fuse.session import clear_stale_mount
from nydusd.ipc.messages import Json, SlotRef
from nydusd.storage.api.factory import BlobFactory
from nydusd.storage.cache.prefetch import PrefetchWorker
from nydusd.supervisor import control_ops
from nydusd.supervisor.children import Child
from nydusd.supervisor.ending import Ending
from nydusd.supervisor.engine import Engine
from nydusd.supervisor.family import Family
from nydusd.supervisor.fd_store import FdStore
from nydusd.supervisor.handover import ANY_TIME, FUSE_DEVICE, Handover
from nydusd.supervisor.images import Image
from nydusd.supervisor.listener import Listener, metrics_socket
from nydusd.supervisor.mount_request import Request, first_request
from nydusd.supervisor.mounts import Mounts
from nydusd.supervisor.notify import Notifier
from nydusd.supervisor.runtime import Runtime
from nydusd.supervisor.sockets import guarded
from nydusd.supervisor.staff import wanted_of
from nydusd.supervisor.status import Status
from nydusd.waits import Told

if TYPE_CHECKING:
    from nydusd.cli.options import Options
    from nydusd.config import Config
    from nydusd.forkserver.client import ForkServer
    from nydusd.supervisor.blobs import BlobTable
    from nydusd.supervisor.handover import Sent
    from nydusd.supervisor.mount_records import Recorded
    from nydusd.supervisor.mount_table import MountTable
    from nydusd.supervisor.restore import Restore

log = logging.getLogger(__name__)

_SCARCE_PAUSE = 0.1
"""Seconds until an image is known again for which there were no file descriptors or no memory."""

_HURRY_ON = 1.0
"""Seconds after READY in which a takeover keeps its priority: workers begin, and answer who waited for them."""

_NAMED = 3
"""Images that are named one by one where all are told of."""


class Supervisor:
    """What is common to all daemons. Each has a `start` of its own."""

    blobs: BlobTable | None = None
    """The images of a singleton."""
    mounts_by_api = True
    """Whether the API may mount and unmount images."""
    front_end = ("FUSE", "`nydusd fuse` serves images through FUSE only")
    """By which way images are read, and why."""

    def __init__(self, options: Options, config: Config, fork_server: ForkServer) -> None:
        self.options = options
        self.fork_server = fork_server
        self.config = config
        self.pid = os.getpid()
        self.started = time.monotonic()
        self.state = "INIT"
        self._first_state = "RUNNING"
        self.images: dict[str, Image] = {}
        self.coming: Mapping[str, Recorded] = {}
        """Those that a killed supervisor had mounted, and that are not known again yet."""
        self._restoring = False
        """Whether a takeover is under way: until all of those are known."""
        self._put_off: list[tuple[float, Callable[[list[bytes]], None]]] = []
        """What the API has asked for and is answered when all are known, and until when who asked waits."""
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
        self._status = Status(self._notifier, lambda: self.images.values(), lambda: self.coming)
        self._family.guarded = not self._notifier.active and options.supervisor is None
        self._store = FdStore(self._notifier)
        self.factory = BlobFactory(self._runtime.instance, str(self._runtime.folder))
        self.prefetch = PrefetchWorker()
        self._engine: Engine | None = None
        self._listener: Listener | None = None
        self._metrics: socket.socket | None = None
        self.handover = Handover(options.serves, self._runtime, self._family, self._poller, self._notifier)
        self._calm_at = math.inf
        """When a takeover goes back to the usual priority."""
        self.told = fork_server.told = Told(options.serves)
        """Whether a signal has told us to end, for all that a start may have to wait for."""
        self.ending = Ending(
            *(options.serves, self._runtime, self._family, self.factory, self.handover, self._notifier, self._sources)
        )

    @property
    def engine(self) -> Engine:
        """What serves requests; it is there when anybody can ask for something."""
        assert self._engine is not None
        return self._engine

    @property
    def is_looked_after(self) -> bool:
        """Whether it is known that somebody starts this command again if we are killed (systemd does, but without a stub)."""
        return self.options.supervisor is not None or (self._family.guarded and self.config.nydusd.guardian > 0)

    # --- start ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Everything up to RUNNING. Raises NydusError."""
        raise NotImplementedError

    def _begin(self, rows: int) -> None:
        """What comes first in any daemon; `rows` is the number of front ends."""
        self.told.catch()  # first of all: a signal ends the daemon after its start, or in a wait of that
        self._runtime.claim(self._take_all, lambda: self.fork_server.pids, self.told)
        self.factory.begin(self._runtime.first)
        self._know_mounts(rows)
        if self.handover.waited:
            self._first_state = "RUNNING" if self.handover.told_to_start else "READY"

    def _begin_with_image(self) -> tuple[Image, Request]:
        """`_begin` of a daemon with one image, that of the command line, which is not shown by FUSE."""
        options = self.options
        assert isinstance(options, FuseOptions)
        self._begin(1)
        if options.mountpoint:
            clear_stale_mount(options.mountpoint)
        first = first_request(options, self.config)
        assert first is not None
        return self.mounts.mount_first(first), first

    def _take_all(self, record: Json) -> list[int] | None:
        """What `_take` gives; and what an operator has told the killed supervisor about its workers."""
        self._family.wanted = wanted_of(record)
        return self._take(record)

    def _take(self, record: Json) -> list[int] | None:
        """The pids of what a killed supervisor has left and we take over or end later; None if nothing is taken over.

        That is of the record alone: some daemons note elsewhere what is taken over.
        """
        return None

    def _know_mounts(self, rows: int, table: MountTable | None = None) -> None:
        """Make the table of images, or go on with that of a supervisor that was killed."""
        runtime = self._runtime
        if table is None:
            control_ops.remember(self)
        self.mounts = Mounts(
            runtime.folder,
            runtime.prefix,
            self.factory,
            self.prefetch,
            self._mounts_changed,
            rows,
            runtime.first,
            table,
        )
        self.images, self.coming = self.mounts.images, self.mounts.coming
        self._family.mounts = self.mounts

    def _bind(self) -> None:
        """Be found by front ends and workers, and serve what they ask for."""
        sockets = self.handover.bind()
        for source in (sockets.front, sockets.work, self.told.fd):
            self._poller.register(source, zmq.POLLIN)
        self._engine = Engine(
            self.config,
            self._runtime,
            self._family,
            self.factory,
            self.mounts,
            self.prefetch,
            sockets,
            self._reply,
            self.control,
        )

    def open_api(self) -> None:
        if any(child.role == "api" for child in self.children):
            return
        if self.options.apisock is not None:
            self._listener = Listener(self.options.apisock)
        self._metrics = metrics_socket(self.config.nydusd.metrics_listen)
        if self._listener is not None or self._metrics is not None:
            self._family.listeners = [-1 if sock is None else sock.fileno() for sock in (self._listener, self._metrics)]
            self._family.add(Child("api", 0, "nydusd.control"))

    def _wait_for_blobs(self, image: Image) -> None:
        """Until each has its cache file, at its full size. Raises MountError when one cannot be opened."""
        while not self.stopping and any(cache.state != "ready" for cache in image.caches):
            self._turn(self._timeout())
            for cache in image.caches:
                if cache.state == "failed":
                    raise MountError(f"blob {cache.spec.info.blob_id} cannot be opened: {cache.reason}")

    def _ready(self, what: str) -> None:
        points.reach("start: before READY")
        self.state = self._first_state
        self.fork_server.waits = False  # from now on the loop waits for nobody
        if self._restoring:
            self.engine.staff.recount()  # one a turn: somebody may be waiting for an answer
        else:
            self._family.add_fetch_workers()
        self._store.keep(self._family.session)
        self._status.ready(what)
        if priority.is_hurried():
            self._calm_at = time.monotonic() + _HURRY_ON
        log.info("%s", what)

    def _shown(self) -> str:
        """Which images there are, whether they are known again or not."""
        images: list[Image | Recorded] = [*self.images.values(), *self.coming.values()]
        if len(images) > _NAMED:
            return f"{len(images)} images are"
        return f"{', '.join(image.source for image in images) or 'an empty folder'} is"

    def _know_all(self, restore: Restore) -> None:
        """Know the images again that a killed supervisor had mounted, one a turn of the loop.

        Told to stop, all at once: what is ready of their blobs is to be stored.
        """
        while restore.step():
            if not self.stopping:
                self._turn(_SCARCE_PAUSE if restore.is_scarce else 0)
            elif restore.is_scarce:
                break  # the table has them: the next one finds them

    def _all_known(self, restore: Restore) -> None:
        """What waited for that."""
        restore.end()
        points.reach("takeover: mounts known")
        restore.serve()
        self.engine.router.checkpoints.resume()
        self.engine.staff.recount()

    def _answer_put_off(self) -> None:
        """What the API was asked for meanwhile, in its order."""
        self._restoring = False
        waiting, self._put_off = self._put_off, []
        for _, again in waiting:
            guarded(again, [b"api"])

    # --- what is asked of a daemon ----------------------------------------------------------------------------

    def exit(self) -> None:
        """End without unmounting."""
        self.ending.by_api(can_leave=self._can_leave())

    def take_sent(self, sent: Sent) -> None:
        """What whoever keeps our session has sent."""
        self.handover.take(sent)

    def session_fd(self) -> int:
        """The session's, -1 if there is none."""
        session = self._family.session
        return -1 if session is None else session.fd

    def session_state(self) -> Json:
        """What else is kept with the session, by whoever keeps it for us."""
        return {}

    def session_device(self) -> int:
        """The number of the device that the session is of."""
        return FUSE_DEVICE

    def control(self, request: Json, answer: Callable[[Json], object]) -> None:
        """What the API process asks for. What may concern an image that is not known again yet waits until all are."""
        if (self.coming or self._restoring) and request.get("op") not in ANY_TIME:
            now = time.monotonic()
            self._put_off = [(until, again) for until, again in self._put_off if until >= now]
            self._put_off.append((request.get("until", math.inf), lambda _: self.control(request, answer)))
            return
        if time.monotonic() > request.get("until", math.inf):
            return  # who asked has been told that it is not done
        # Here and not above: a start need not wait for what only operators ask.
        from nydusd.supervisor import report

        report.answer(self, request, answer)

    def _reply(self, client: bytes, number: int, errno: int, slot: SlotRef | None) -> None:
        """Answer who has asked the router for chunks."""
        assert self.handover.sockets is not None
        self.handover.sockets.reply(client, number, errno, slot)

    def _mounts_changed(self, place: str | None) -> None:
        """The table of images is another one, and where the kernel may have another memory of it is `place`."""
        if self.state == "RUNNING":
            self._family.add_fetch_workers()

    # --- the loop ---------------------------------------------------------------------------------------------

    def run(self, *later: Callable[[], object]) -> None:
        """Serve until told to stop. What nobody waits for is done `later`: after a turn each."""
        self.told.end()
        for do in later:
            if not self.stopping:
                self._turn(0)
                do()
        while not self.stopping:
            self._turn(self._timeout())

    def _timeout(self) -> float:
        now = time.monotonic()
        until = [self._family.due(), *self.engine.due(now)]
        until.append(self._calm_at)
        alive = self._notifier.wait(now)
        if alive is not None:
            until.append(now + alive)
        return max(0.0, min(until) - now)

    def _turn(self, timeout: float) -> None:
        engine = self.engine
        events = dict(self._poller.poll(int(timeout * 1000) + 1 if timeout else 0))
        engine.take(events)
        for source in [source for source in self._sources if source in events]:
            if source in self._sources:  # who was called before may have let go of it
                self._sources[source]()
        if self.told.fd in events and self.told.take():
            self.ending.by_signal(can_leave=self._can_leave())
        self._reap()
        now = time.monotonic()
        self._family.tend(events, now)
        if not self.stopping:
            self._family.restart(now)
            engine.staff.step(now)
        engine.tick(now, self.stopping)  # jobs go out: the rest can wait
        self._family.look_after(engine.pools, now)
        self._notifier.alive(now)
        self._status.tick(now)
        if now >= self._calm_at:
            self._calm()

    def _calm(self) -> None:
        """End of the hurry of a takeover, for all that was started in it."""
        self._calm_at = math.inf
        children = (child.pid for child in self.children if child.pid)
        priority.calm([*self.fork_server.pids, *children, *self._family.others()])

    def _reap(self) -> None:
        """Look after children that have ended: their work goes to others, their place is filled again."""
        for child, status in self._family.reap(self.engine.ended):
            if self.stopping:
                continue
            if self._is_over(child, status):
                log.info("%s was unmounted from outside", self.options.serves)
                self.ending.ask()
            else:
                self._family.judge(child, status)

    def _is_over(self, child: Child, status: int) -> bool:
        """Whether a child has ended because what it served was unmounted."""
        return False

    # --- stop -------------------------------------------------------------------------------------------------

    def _can_leave(self) -> bool:
        """Whether there is a mount that goes on without us."""
        return False

    @property
    def stopping(self) -> bool:
        """Whether it was asked to end."""
        return self.ending.asked

    def fail(self) -> None:
        """It ends by an error: a mount that was served, or taken over, is left as a SIGKILL would leave it."""
        if (self._family.inherited or self.state != "INIT") and self._can_leave():
            self.ending.by_error()

    def leave(self) -> None:
        """Told to end in a wait of the start. What was to be taken over, or is by now, is left as a SIGKILL would leave it.

        A start in which nothing was taken over ends as any daemon, from the moment at which it could be found by others.
        """
        if not self.handover.waiting and (self._engine is None or self._family.inherited):
            log.info("what is served at %s is left to the next daemon here", self.options.serves)
            self.handover.leaving = True
        self.ending.ask(unmount=not self.ending.leaves_all)

    def stop(self) -> None:
        """Unmount, store what is ready, end all children, leave nothing behind; or leave all that to the next one."""
        self.told.end()
        self._calm()
        self.state = "STOPPED"
        workers_have_ended, spared = self._workers_have_ended, self._spared
        self.ending.end(self._engine, self._listener, self._metrics, self._turn, workers_have_ended, spared)

    def _spared(self) -> set[str]:
        """Shared memory that a stop leaves, since somebody reads by it who outlives us."""
        return set()

    def _workers_have_ended(self) -> None:
        """In a stop: what they may have borrowed of us can be closed, and nobody can have come after us yet."""
