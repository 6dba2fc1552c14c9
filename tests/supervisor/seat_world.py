"""Several daemons' `Rest` and `Seats` over real sockets to a real desk, with workers, time and the desk's process by hand."""

from __future__ import annotations

import os
import select
import socket
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from nydusd.ipc.messages import Json
from nydusd.nursery import client, desk, place
from nydusd.nursery.desk import Desk
from nydusd.nursery.seats import ROLES
from nydusd.storage.cache.requests import Job, Priority
from nydusd.supervisor import rest, seats
from nydusd.supervisor.pool import WorkerPool
from nydusd.supervisor.rest import Rest
from nydusd.supervisor.seats import Seats

SEATS = {"fetch": 2, "decompress": 3}
IDLE = 15.0


class Place:
    """What `Rest` knows of a child: `alive` is its process, `ending` once it was killed."""

    def __init__(self, role: str, index: int) -> None:
        self.role, self.index = role, index
        self.generation = 0
        self.resting = False
        self.process: object | None = None
        self.ending = False
        self.announced = False

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"

    @property
    def identity(self) -> bytes:
        return f"{self.role}-{self.index}-{self.generation}".encode()

    def send(self, _number: object) -> None:
        self.ending = True


class FakeFamily:
    """The places of one daemon, whose processes are made and ended here."""

    def __init__(self) -> None:
        self.children: list[Place] = []
        self.begins_at_rest: Any = None
        self.inherited = False

    def launch(self, child: Place) -> None:
        child.generation += 1
        child.process, child.ending, child.announced, child.resting = object(), False, False, False


class OneDaemon:
    """A daemon as far as its workers go."""

    def __init__(self, world: World, workers: Mapping[str, int], takes_over: bool) -> None:
        self.world = world
        self.stopped = False
        self.sent: dict[bytes, Json] = {}
        self.family = FakeFamily()
        self.family.inherited = takes_over
        self.undone = 0
        self.fds: set[int] = set()
        self.pools = {role: WorkerPool(role, self._send, lambda: None) for role in ROLES}
        self.seats = Seats(SEATS, self.fds.add, self.fds.remove, on=True)
        self.rest = Rest(cast(Any, self.family), self.pools, IDLE, lambda: False, self.seats)
        for role, count in workers.items():
            for index in range(count):
                child = Place(role, index)
                self.family.children.append(child)
                child.resting = self.family.begins_at_rest(role)
                if not child.resting:
                    self.family.launch(child)

    def _send(self, identity: bytes, message: Json) -> None:
        self.sent[identity] = message

    def processes(self, role: str) -> int:
        return sum(child.process is not None for child in self.family.children if child.role == role)

    def submit(self, role: str, priority: Priority) -> None:
        self.undone += 1
        self.pools[role].submit(Job("fill", None, priority, {}, self._done))

    def _done(self, _job: Job, _answer: Json) -> None:
        self.undone -= 1

    def turn(self) -> None:
        """One turn of the supervisor's loop: what has ended is reaped, what was begun announces itself, jobs are given out."""
        if self.stopped:
            return
        for child in self.family.children:
            if child.process is not None and child.ending:
                self.pools[child.role].worker_died(child.identity, killed=True)
                self.sent.pop(child.identity, None)
                child.process = None
                if not child.resting:  # killed from outside: started again at once
                    self.family.launch(child)
            elif child.process is not None and not child.announced:
                child.announced = True
                self.pools[child.role].worker_ready(child.identity)
        self.rest.make_room(self.world.now)
        for pool in self.pools.values():
            pool.pump()
        self.rest.tick(self.world.now)

    def finish(self, identity: bytes) -> None:
        """A worker reports its job."""
        message = self.sent.pop(identity)
        self.pools[identity.decode().partition("-")[0]].worker_done(identity, {"id": message["id"]})

    def kill(self, child: Place) -> None:
        """A worker is killed from outside."""
        child.ending = True

    def end(self) -> None:
        """It is gone, with its workers."""
        self.seats.close()


class World:
    """`time` of all is `now`; a desk's process is `serve`d by hand, as any of the daemons."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.folder = tempfile.TemporaryDirectory(prefix="seats-", dir="/tmp")
        patch.setenv("NYDUSD_RUNTIME_DIR", self.folder.name)
        patch.setenv("NYDUSD_NURSERY", "")
        for module in (desk, rest, seats):
            if hasattr(module, "time"):
                patch.setattr(module, "time", self)
        patch.setattr(client, "start_if_useful", self.start_desk)
        self.path = Path(f"{place.stem(place.identity())}.seats")
        self.desk: Desk | None = None
        self.hung = False
        self.daemons: list[OneDaemon] = []

    def monotonic(self) -> float:
        return self.now

    def start_desk(self) -> None:
        """A nursery begins, unless there is one."""
        if self.desk is not None:
            return
        self.poll = select.poll()
        self.desk = Desk(self.poll)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(self.path))
        self.listener.listen(64)
        self.listener.setblocking(False)
        self.waiting: list[socket.socket] = []

    def kill_desk(self) -> None:
        if self.desk is None:
            return
        self.hung = False
        self.desk.close()
        self.desk = None
        for wire in self.waiting:
            wire.close()
        self.listener.close()
        os.unlink(self.path)

    def serve(self) -> None:
        """The nursery does all that there is to do."""
        if self.desk is None or self.hung:
            return
        for _ in range(64):
            try:
                wire = self.listener.accept()[0]
            except BlockingIOError:
                break
            wire.setblocking(False)
            self.waiting.append(wire)
        for wire in list(self.waiting):
            try:
                packet = wire.recv(1024)
            except BlockingIOError:
                continue
            self.waiting.remove(wire)
            if packet:
                self.poll.register(wire, select.POLLIN)
                self.desk.admit(wire, packet)
            else:
                wire.close()
        for _ in range(64):
            events = self.poll.poll(0)
            if not events:
                break
            for fd, _event in events:
                if fd in self.desk:
                    self.desk.hear(fd)
        self.desk.settle()

    def add(self, *, takes_over: bool = False, **workers: int) -> OneDaemon:
        daemon = OneDaemon(self, workers, takes_over)
        self.daemons.append(daemon)
        return daemon

    def processes(self, role: str) -> int:
        return sum(daemon.processes(role) for daemon in self.daemons)

    def run(self, seconds: float, step: float = 0.01, working: Collection[OneDaemon] | None = None) -> None:
        """Everybody goes on; each job of those that are `working`, by default of all, takes one step."""
        end = self.now + seconds
        while self.now < end:
            self.now += step
            self.serve()
            for daemon in self.daemons:
                daemon.turn()
                self.serve()
                daemon.turn()
                if not daemon.stopped and (working is None or daemon in working):
                    for identity in list(daemon.sent):
                        daemon.finish(identity)

    def close(self) -> None:
        for daemon in self.daemons:
            daemon.end()
        self.kill_desk()
        self.folder.cleanup()
