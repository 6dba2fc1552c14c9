"""All child processes of a daemon: each is started with what its role needs, watched, and replaced when it ends.

Part of the supervisor. `state.json` names each of them from the moment after its start, and before the first front end is
started it says under which numbers that will have the session's fds: so a successor finds also the one that was not named yet.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Any

import zmq

from nydusd import logs, points, priority
from nydusd.cli.options import FuseOptions
from nydusd.config.model import REMOTE_FETCH_WORKERS
from nydusd.errors import NydusError
from nydusd.ipc.messages import Json
from nydusd.ipc.silent import SilentHolder
from nydusd.storage.backend import MODULES
from nydusd.storage.cache.spec import LOCAL
from nydusd.storage.state.lock import start_time
from nydusd.supervisor.children import Child, Turns, end_all, reap_strays, renew_front_end
from nydusd.supervisor.frontend_spec import frontend_spec
from nydusd.supervisor.seats import Seats, seats_of
from nydusd.supervisor.watch import Watch

if TYPE_CHECKING:
    from nydusd.cli.options import Options
    from nydusd.config import Config
    from nydusd.forkserver.client import ForkServer
    from nydusd.forkserver.servers import Servers
    from nydusd.frontends.fuse.session import Session
    from nydusd.supervisor.adoption import FrontEnd
    from nydusd.supervisor.mounts import Mounts
    from nydusd.supervisor.pool import WorkerPool
    from nydusd.supervisor.runtime import Runtime

log = logging.getLogger(__name__)

_BOOT = 3.0
"""Seconds in which a child that ends by itself means that the daemon cannot start."""
_OUTLIVING = ("fuse", "erofs", "guard")
"""Roles of children that the next supervisor may find, and must know by their names."""
_HOLDING = ("erofs", "guard")
"""Roles of those that are not in the record as processes: a successor takes over what they hold before it ends them."""
_EXPENDABLE = ("around",)
"""Roles of those that hold nothing, end with us, and must not keep anybody waiting: neither a start, nor a successor."""
_END_PATIENCE = 2.0
"""Seconds that children may take to end; there is nothing that they could lose."""

_ANSWER_PATIENCE = 1.0
"""Seconds that the API process may take for its last answer when all is left to the next one, for whom readers wait."""


class CannotStartError(NydusError):
    """What children are to run does not run: the daemon that has just been started is of no use."""


class Family:
    """`poller` learns of each child's pidfd. `session`, `mounts` and `listeners` are set before they are needed."""

    def __init__(
        self, options: Options, config: Config, fork_server: ForkServer, runtime: Runtime, poller: zmq.Poller
    ) -> None:
        self.fork_server = fork_server
        self.children: list[Child] = []
        self.live: set[bytes] = set()
        """ZeroMQ identities of those that run."""
        self.session: Session | None = None
        self.mounts: Mounts | None = None
        self.inherited = False
        """Whether what is served was so before us: then it stays, whatever fails, and what fails is tried again."""
        self.guarded = False
        """Whether the fork server may have to start us again: nobody else does."""
        self.wanted: dict[str, int] = {}
        """By role, how many workers an operator wants, where that is not what is configured."""
        self.others: Callable[[], list[int]] = list
        """Pids of processes that are ours and not (yet) among the children."""
        self.listeners: Sequence[int] = (-1, -1)
        """The sockets of the API process: the API's, and that of metrics over TCP; -1 for none."""
        self.own_spec: Callable[[Child], tuple[list[int], Json] | None] = lambda _child: None
        """Fds and spec of a child that only some daemons have."""
        self.to_front_ends: Json = {}
        """What front ends over FUSE are told besides."""
        self.left: Callable[[], Json] = dict
        """What else the next supervisor must know, where there is no session; its `holders` are taken over before they end."""
        self.started: Callable[[Child], None] = lambda _child: None
        """Told of each child that was started."""
        self.begins_at_rest: Callable[[str], bool] = lambda _role: False
        """Whether a child of this role is started only when it is needed."""
        self._options = options
        # Now: the folder that we were started in may be removed.
        named = {"apisock": options.apisock, "config": options.config}
        self._paths: Json = {name: None if path is None else os.path.abspath(path) for name, path in named.items()}
        self._config = config
        self._runtime = runtime
        self._poller = poller
        self._started = time.monotonic()
        self._parameters = ""
        """What a successor compares, once it was needed."""
        self.front = runtime.front
        """Where the API process finds us."""
        self.noted = True
        """Whether `state.json` is ours to write."""
        self._kept: Session | None = None
        """Whose fds the fork server holds, too."""
        self._fork_fds: set[int] = set()
        self._turns: dict[tuple[str, int], Turns] = {}
        self._mark = f"-{os.urandom(4).hex()}"
        self._watch = Watch(config.nydusd.worker_patience)
        # What fetch workers share (tokens, redirects, which host is down): in memory, inherited by them alone.
        self._shared = os.memfd_create("nydusd-backend", os.MFD_CLOEXEC)
        self._silent = SilentHolder(self.watch, self.forget)
        self._lifeline, self._lifeline_end = os.pipe2(os.O_CLOEXEC)
        fork_server.started = self.remember
        self._watch_fork_server()

    @property
    def lifeline(self) -> int:
        """A pipe that is closed when we are gone."""
        return self._lifeline

    def add(self, child: Child) -> None:
        self.prepare(child)
        self.children.append(child)
        child.resting = self.begins_at_rest(child.role)
        if not child.resting:
            self.launch(child)

    def prepare(self, child: Child) -> None:
        """Have a child be called like nobody who was in its place before, and may be there still."""
        child.turns = self._turns.setdefault((child.role, child.index), child.turns)
        if child.role not in _OUTLIVING:
            child.mark = self._mark

    def count(self, role: str) -> int:
        """How many workers of a role there are to be."""
        if wanted := self.wanted.get(role):
            return wanted
        if role != "fetch":
            return self._config.decompress_worker_count
        remote = not self._config.nydusd.fetch_workers and self._backends() - set(LOCAL)
        return REMOTE_FETCH_WORKERS if remote else self._config.fetch_worker_count

    def seats(self) -> Seats:
        """This daemon's part of the workers of its node, if it is to have one."""
        tuning = self._config.nydusd
        wanted = seats_of(tuning.node_fetch_workers, tuning.node_decompress_workers)
        return Seats(wanted, self.watch, self.forget, on=tuning.worker_idle > 0)

    def add_fetch_workers(self) -> None:
        """Have as many as if the daemon had been started with an image whose blobs come over a network, if it has one."""
        have = sum(child.role == "fetch" and not child.leaving for child in self.children)
        try:
            for index in range(have, self.count("fetch")):
                self.add(Child("fetch", index, "workers"))
        except NydusError as e:
            log.error("%s; trying again", e)

    def _backends(self) -> set[str]:
        """The kinds of backends that are in use."""
        images = [] if self.mounts is None else self.mounts.images.values()
        return {cache.spec.backend for image in images for cache in image.caches}

    def add_later(self, child: Child, seconds: float) -> None:
        """Have a child started by the loop, as if it had ended: whatever becomes of that, the daemon goes on."""
        self.prepare(child)
        self.children.append(child)
        child.restart_at = time.monotonic() + seconds

    def drop(self, child: Child, patience: float) -> None:
        """Kill a child that holds nothing, and fill its place no more. It may end later than after so many seconds."""
        if child not in self.children:
            return
        self.children.remove(child)
        if child.process is None:
            return
        child.send(signal.SIGKILL)
        self._poller.unregister(child.pidfd)
        self.live.discard(child.identity)
        child.process.wait(patience)
        if child.reap() is None:
            log.warning("%s does not end yet", child.name)

    def adopt(self, child: Child, frontend: FrontEnd) -> None:
        """Fill a place with a front end that outlived another supervisor."""
        self.prepare(child)
        child.adopt(frontend)
        self.children.append(child)
        self.live.add(child.identity)
        self._poller.register(child.pidfd, zmq.POLLIN)

    def launch(self, child: Child) -> None:
        """Start the process of a place; later when no fork server is ready, if that is not to be waited for.

        Raises NydusError when there is no room for another; it is tried again then.
        """
        try:
            spec, fds = self.spec_of(child)
        except OSError as e:
            raise child.no_room(e) from e
        points.reach("start: before a child")
        try:
            child.start(self.fork_server, spec, fds)
        finally:
            self._watch_fork_server()  # at once: it may be another, and numbers of its fds be the child's
            if child.role == "api":
                self._silent.begun()
        points.reach("start: child not noted")
        if child.process is not None:
            self.begin(child)

    def begin(self, child: Child) -> None:
        """The process of a place is there."""
        self.live.add(child.identity)
        self._poller.register(child.pidfd, zmq.POLLIN)
        self.remember()
        points.reach("start: child noted")
        self.started(child)

    def spec_of(self, child: Child) -> tuple[Json, list[int]]:
        """What a child is told, and the fds that it is given."""
        spec: Json = {"log": self.log_spec(), "lifeline_fd": self._lifeline}
        fds = [self._lifeline]
        if child.role == "fuse":
            fds, more = self._frontend_spec(child.index)
            spec |= more | {"crashed": child.crashed}
        elif child.role == "api":
            silent_fd, silent = self._silent.begin()
            fds += [fd for fd in (*self.listeners, silent_fd) if fd >= 0]
            spec |= {"listen_fd": self.listeners[0], "metrics_fd": self.listeners[1], "front": self.front}
            spec |= {"silent_fd": silent_fd, "silent": silent}
        elif (own := self.own_spec(child)) is not None:
            fds, more = own
            spec |= more
        else:
            spec |= {"role": child.role, "work": self._runtime.work}
            if child.role == "fetch":
                child.load = [MODULES[kind] for kind in sorted(self._backends())]
                fds.append(self._shared)
                spec["shared_fd"] = self._shared
        return spec, fds

    def remember(self) -> None:
        """Write down what a successor must know."""
        if not self.noted:
            return
        more: Json = {"workers": self.wanted} | self.left() | self._for_operator()
        if self.session is not None and isinstance(self._options, FuseOptions):
            from nydusd.supervisor.adoption import parameters, record_of

            if not self._parameters:
                self._parameters = parameters(self._options, self._config)
            self._have_held(self.session)
            more |= record_of(self.session, self._parameters, self.children, self.fork_server)
        ended = [child for child in self.children if child.role not in _HOLDING + _EXPENDABLE]
        pids = [*self.fork_server.pids, *(child.pid for child in ended if child.adopted is None), *self.others()]
        adopted = [(each.process.pid, each.process.start) for child in ended if (each := child.adopted) is not None]
        self._runtime.record([pid for pid in pids if pid], more, adopted)

    def _for_operator(self) -> Json:
        """How `nydusctl` finds this record, and what else of us, when we do not answer."""
        besides = [child.pid for child in self.children if child.role in _HOLDING + _EXPENDABLE]
        besides.append(self.fork_server.stub)
        return self._paths | {
            "log": logs.current_file(),
            "besides": [[pid, start_time(pid)] for pid in besides if pid],
        }

    def succeed(self, fresh: Servers) -> None:
        """Go on with another fork server, which holds the session's fds already; `fresh` is the former then.

        Noted before the former one ends: whoever is killed in between, a successor finds one that has them.
        """
        fresh.release([fd for fd in fresh.held if fd not in self.fork_server.held])  # let go of while it was tried
        self.fork_server.trade_places(fresh)
        points.reach("upgrade: servers traded")
        self.fork_server.hold(self.fork_server.held)  # some may be newer than it is
        self._watch_fork_server()
        self._have_guarded()
        self.remember()

    def _have_held(self, session: Session) -> None:
        """Have the fork server hold the session's fds."""
        if self._kept is not session:
            self._kept = session
            self.hold([fd for lane in session.lanes for fd in lane])

    def hold(self, fds: Sequence[int]) -> None:
        """Have the fork server hold these, too, so that nothing is lost when all others die with us."""
        first = not self.fork_server.held
        self.fork_server.hold(fds)
        if first:
            self._have_guarded()

    def _have_guarded(self) -> None:
        """Have the fork server start us again when we are killed, if nobody else does."""
        if self.fork_server.held and self.guarded and self._config.nydusd.guardian:
            self.fork_server.guard(self._config.nydusd.guardian)

    def log_spec(self) -> Json:
        from nydusd import logs

        size = self._options.log_rotation_size << 20
        return {"level": logs.level_name(), "file": self._options.log_file, "rotation_size": size}

    def _frontend_spec(self, index: int) -> tuple[list[int], Json]:
        assert self.session is not None
        assert self.mounts is not None
        assert isinstance(self._options, FuseOptions)
        fds, spec = frontend_spec(self.session, self.mounts, index)
        return fds, spec | {
            "front": self._runtime.front,
            "read_deadline": self._config.nydusd.read_deadline,
            "failover_policy": self._options.failover_policy,
            **self.to_front_ends,
        }

    def watch(self, fd: int) -> None:
        """Have the supervisor's loop wake when there is something to read."""
        self._poller.register(fd, zmq.POLLIN)

    def forget(self, fd: int) -> None:
        """End of `watch`."""
        self._poller.unregister(fd)

    def reap(self, ended: Callable[[Child, bytes], None]) -> list[tuple[Child, int]]:
        """Look after children that have ended: `ended(child, identity)` gives their work to others. Gives their statuses."""
        found = []
        for child in list(self.children):
            identity, pidfd = child.identity, child.pidfd
            if child.process is None:
                continue
            status = child.reap()
            if status is None:
                continue
            self._poller.unregister(pidfd)
            self.live.discard(identity)
            ended(child, identity)
            if child.leaving:
                self.children.remove(child)
                self.remember()
            elif not child.resting:
                found.append((child, status))
        return found

    def judge(self, child: Child, status: int) -> None:
        """A child has ended and nobody told it to. Raises CannotStartError when that means that the daemon cannot start."""
        booting = not self.inherited and time.monotonic() - self._started < _BOOT
        if status > 0 and booting and child.role not in _EXPENDABLE:
            # By itself, not by a signal: starting it again would fail again, behind a mount that hangs.
            raise CannotStartError(f"{child.name} could not start (exit status {status}); the log says why")
        log.warning("%s ended with status %d; starting it again", child.name, status)

    def restart(self, now: float) -> None:
        """Fill the places again whose time has come; later while a fork server gets ready: nobody waits for that."""
        if not self.fork_server.ready:
            return
        for child in self.children:
            if child.restart_at is None or now < child.restart_at or child.leaving:
                continue
            try:
                self.launch(child)
            except NydusError as e:
                log.error("%s; trying again", e)

    def look_after(self, pools: dict[str, WorkerPool], now: float) -> None:
        """When it is time: end workers that hang, let go of strays."""
        if now >= self._watch.next_look():
            self.fork_server.follow_stderr()
            self._watch.end_hung(self.children, pools, now)
            renew_front_end(self.children, self.fork_server)
            reap_strays(self.children, [*self.fork_server.pids, *self.others()])

    def tend(self, ready: Container[Any], now: float) -> None:
        """When the fork server has ended or has something to say (`ready` are the fds that do), or when it is time: see to it.

        At once: it holds what must not be lost, so until there is another, one of those that do is missing. And take what the
        API process says.
        """
        if self._silent.fileno() in ready:
            self._silent.take()
        if now < self.fork_server.due() and not any(fd in ready for fd in self._fork_fds):
            return
        if self.fork_server.tend():
            self.remember()
        self._watch_fork_server()

    def _watch_fork_server(self) -> None:
        fds = set(self.fork_server.fds())
        for fd in self._fork_fds - fds:
            self._poller.unregister(fd)
        for fd in fds - self._fork_fds:
            self._poller.register(fd, zmq.POLLIN)
        self._fork_fds = fds

    def due(self) -> float:
        """When there is something to do next (`time.monotonic()`)."""
        soonest = min(self._watch.next_look(), self.fork_server.due())
        if not self.fork_server.ready:
            return soonest
        return min([soonest, *(c.restart_at for c in self.children if c.restart_at is not None)])

    def end(self) -> None:
        """End all processes."""
        self._silent.close()
        self.fork_server.close()
        end_all(self.children, _END_PATIENCE)

    def leave(self, *, keep_fork_server: bool = False) -> None:
        """End all but the front ends, which hold what a successor needs, and perhaps the fork server, which does, too."""
        self._silent.close()
        gone = [child for child in self.children if child.role != "fuse"]
        priority.leave(child.pid for child in gone if child.pid)
        for child in gone:
            if child.role != "api":
                child.send(signal.SIGKILL)  # it may be stopped, and readers wait for the next one
        if keep_fork_server:
            if self.fork_server.held:
                self.fork_server.let_go()
            else:  # it has nothing that anybody could need, and may hang
                self.fork_server.close()
            # The API process has an answer to give still: it ends by itself when this pipe is closed.
            os.close(self._lifeline_end)
            for child in self.children:
                if child.role == "api" and child.process is not None:
                    child.process.wait(_ANSWER_PATIENCE)
                    child.send(signal.SIGKILL)
        else:
            self.fork_server.close()
        end_all(gone, _END_PATIENCE)

    def close(self) -> None:
        for fd in (self._shared, self._lifeline, self._lifeline_end):
            os.close(fd)
