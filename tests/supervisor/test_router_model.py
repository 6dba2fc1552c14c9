"""Any interleaving of clients, workers, deaths, upgrades, successions of the supervisor, full disks, shared memory that is full
and lost cache files: each request is answered exactly once."""

from __future__ import annotations

import errno
from enum import Enum, auto

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nydusd.ipc.messages import AHEAD, LOST, Json
from nydusd.storage.cache.blob_cache import BlobCache
from tests.supervisor.world import CHUNKS, World
from tests.support.models import run_model

CLIENTS = (b"fuse-0-1", b"fuse-1-1", b"fuse-2-1")
clients = st.sampled_from(CLIENTS)
picks = st.integers(0, 1 << 16)
numbers = st.integers(0, 2)
starts = st.sampled_from([*range(9), CHUNKS - 1, CHUNKS])
some_chunks = st.sets(st.integers(0, CHUNKS - 1), max_size=6)


class Bad(Enum):
    CHUNKS_FAIL = auto()
    DISK_FULL = auto()
    FILE_REPLACED = auto()
    ERROR = auto()
    NO_BACKEND = auto()


class Machine(RuleBasedStateMachine):
    """`pick` chooses among what there is: an open request, a busy worker, a lease."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.world = World(self.patch)
        self.number = 0
        self.workers = {"fetch": 0, "decompress": 0}
        self.eager = True

    @property
    def blobs(self) -> list[BlobCache]:
        return self.world.blobs[:3]

    @initialize(opened=st.sets(numbers), eager=st.booleans(), workers=st.integers(0, 3))
    def start(self, opened: set[int], eager: bool, workers: int) -> None:
        """`eager`: jobs are sent after every event, as in a daemon that has little to do."""
        for role in ("fetch", "decompress"):
            for _ in range(workers):
                self.new_worker(role)
        if workers:
            for blob in opened:
                self.world.router.open_blob(self.blobs[blob])
            self.world.pump()
            for identity in list(self.world.sent):
                self.world.finish(identity)
        self.eager = eager

    @rule(client=clients, blob=numbers, first=starts, size=st.integers(0, 5))
    def request(self, client: bytes, blob: int, first: int, size: int) -> None:
        self.number += 1
        self.world.ask(client, self.number, self.blobs[blob], first, size)

    @rule(client=clients, blob=numbers, first=starts)
    def hint(self, client: bytes, blob: int, first: int) -> None:
        self.number += 1
        self.world.router.request(client, self.number, self.blobs[blob].handle, first, 1, AHEAD)

    @rule(client=clients, blob=numbers, first=starts)
    def request_of_lost_chunk(self, client: bytes, blob: int, first: int) -> None:
        self.number += 1
        self.world.ask(client, self.number, self.blobs[blob], first, 2, LOST)

    @rule(pick=picks, first=starts)
    def duplicate(self, pick: int, first: int) -> None:
        if self.world.open:
            (client, number), cache = list(self.world.open.items())[pick % len(self.world.open)]
            self.world.ask(client, number, cache, first, 1, LOST * (pick % 2))

    @rule(pick=picks)
    def duplicate_after_answer(self, pick: int) -> None:
        if self.world.answers:
            client, number, _code, _slot = self.world.answers[pick % len(self.world.answers)]
            self.world.ask(client, number, self.blobs[pick % 3], pick % CHUNKS, 1)

    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        if self.world.open:
            client, number = list(self.world.open)[pick % len(self.world.open)]
            del self.world.open[client, number]
            self.world.router.cancel(client, number)
        else:
            self.world.router.cancel(CLIENTS[0], pick)

    @rule(client=clients)
    def drop_client(self, client: bytes) -> None:
        for key in [key for key in self.world.open if key[0] == client]:
            del self.world.open[key]
        self.world.router.drop_client(client)

    @rule(pick=picks)
    def release(self, pick: int) -> None:
        if self.world.leases:
            self.world.router.release(self.world.leases.pop(pick % len(self.world.leases)))
        else:
            self.world.router.release(pick)

    @rule(role=st.sampled_from(["fetch", "decompress"]))
    def new_worker(self, role: str) -> None:
        self.workers[role] += 1
        if self.world.pool(role).size < 3:
            self.world.worker(role, f"{role}-{self.workers[role]}".encode())

    @rule()
    def pump(self) -> None:
        self.world.pump()

    @rule(pick=picks)
    def job_ends_well(self, pick: int) -> None:
        if self.world.sent:
            self.world.finish(self._busy(pick))

    @rule(pick=picks, how=st.sampled_from(Bad), some=some_chunks, others=some_chunks)
    def job_ends_badly(self, pick: int, how: Bad, some: set[int], others: set[int]) -> None:
        if not self.world.sent:
            return
        identity = self._busy(pick)
        kind = self.world.sent[identity]["kind"]
        if kind == "fill" and how is not Bad.ERROR:
            if how is Bad.CHUNKS_FAIL:
                self.world.filled(identity, some, others)
            elif how is Bad.DISK_FULL:
                self.world.filled(identity, unstored=range(CHUNKS))
            elif self.world.sent[identity]["slot"] is None:
                self.world.stale(identity)
        elif kind == "fetch" and how is Bad.CHUNKS_FAIL:
            error = {"error": "the blob is too short", "errno": errno.EIO, "type": "RangeNotSatisfiableError"}
            self.world.done(identity, error)
        elif kind in ("fetch", "prepare") and how is Bad.NO_BACKEND:
            self.world.out(identity, float(len(some)))
        elif kind == "prepare" and how is Bad.CHUNKS_FAIL:
            self.world.prepared(identity, ready=some)
        elif kind == "checkpoint" and how is Bad.FILE_REPLACED:
            self.world.stale(identity)
        else:
            self.world.fail(identity)

    @rule(pick=picks, stored=some_chunks)
    def worker_dies(self, pick: int, stored: set[int]) -> None:
        if self.world.sent:
            identity = self._busy(pick)
            message = self.world.sent[identity]
            if message["kind"] == "fill":
                self.world.store(identity, stored & set(message["chunks"]))
            self.world.kill(identity)

    @rule(pick=picks, which=picks)
    def job_kills_all_its_workers(self, pick: int, which: int) -> None:
        """Because of one of its chunks, if it has any: that, and what is decoded with it, fails, and no other."""
        if not self.world.sent:
            return
        identity = self._busy(pick)
        message, role = self.world.sent[identity], self.world.role_of(identity)
        cache = self.world.cache_of(identity)
        chunks = message["chunks"] if message["kind"] in ("fetch", "fill") else []
        culprit = chunks[which % len(chunks)] if chunks else None
        good = set(range(CHUNKS)) - set(cache.meta.unit(culprit)) if culprit is not None else set()
        before = {chunk: cache.failure(chunk) for chunk in good}

        def kills(other: Json) -> bool:
            if culprit is None:
                return bool(other["id"] == message["id"])
            return other["kind"] == message["kind"] and other["handle"] == cache.handle and culprit in other["chunks"]

        while victims := [identity for identity, other in self.world.sent.items() if kills(other)]:
            for victim in victims:
                self.world.kill(victim)
                self.new_worker(role)
            self.world.pump()
        assert before == {chunk: cache.failure(chunk) for chunk in good}

    @rule(pick=picks)
    def idle_worker_dies(self, pick: int) -> None:
        idle = [*self.world.fetch._idle, *self.world.decompress._idle]
        if idle:
            self.world.kill(idle[pick % len(idle)])

    @rule(role=st.sampled_from(["fetch", "decompress"]), pick=picks)
    def worker_is_to_leave(self, role: str, pick: int) -> None:
        staying = [identity for identity in self.world.pool(role)._knows if identity not in self.world.retired]
        if staying:
            self.world.retire(role, staying[pick % len(staying)])

    @rule()
    def workers_are_upgraded(self) -> None:
        for role in ("fetch", "decompress"):
            old = [identity for identity in self.world.pool(role)._knows if identity not in self.world.retired]
            for identity in old:
                self.workers[role] += 1
                self.world.worker(role, f"{role}-{self.workers[role]}".encode())
                self.world.retire(role, identity)

    @rule()
    def those_who_have_done_their_last_job_end(self) -> None:
        for identity in list(self.world.retired):
            if identity not in self.world.sent:
                self.world.kill(identity)

    @rule(pages=st.sampled_from([3, 8, 16, 1 << 18]))
    def memory_becomes_short_or_is_there_again(self, pages: int) -> None:
        self.world.memory = pages << 12

    @rule()
    def supervisor_is_killed_and_succeeded(self) -> None:
        self.world.succeed()

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.clock.now += seconds
        self.world.router.tick()

    @rule(blob=st.integers(0, 1), first=st.integers(0, CHUNKS - 1), size=st.sampled_from([-1, 1, 4]))
    def prefetch(self, blob: int, first: int, size: int) -> None:
        self.world.prefetch.want(self.blobs[blob], first, size)

    @rule()
    def checkpoint(self) -> None:
        self.world.router.checkpoint()

    def _busy(self, pick: int) -> bytes:
        return list(self.world.sent)[pick % len(self.world.sent)]

    @invariant()
    def consistent(self) -> None:
        if self.eager:
            self.world.pump()
        self.world.check()

    def teardown(self) -> None:
        try:
            self.world.settle()
            self.world.check_nothing_left()
        finally:
            self.world.close()
            self.patch.undo()


class RemoteMachine(Machine):
    """The blobs are remote: what they hold is fetched by one worker and decoded by another."""

    @property
    def blobs(self) -> list[BlobCache]:
        return self.world.blobs[3:]

    @rule(pick=picks, bad=some_chunks)
    def chunks_come_damaged(self, pick: int, bad: set[int]) -> None:
        filling = [identity for identity, message in self.world.sent.items() if message["kind"] == "fill"]
        if filling:
            identity = filling[pick % len(filling)]
            chunks = self.world.sent[identity]["chunks"]
            self.world.filled(identity, failed={chunks[number % len(chunks)] for number in bad})

    @rule()
    def all_is_fetched(self) -> None:
        for identity in [identity for identity, message in self.world.sent.items() if message["kind"] == "fetch"]:
            self.world.finish(identity)


@pytest.mark.parametrize("machine", [Machine, RemoteMachine])
def test_every_request_is_answered_once_and_nothing_is_left(machine: type[Machine]) -> None:
    run_model(machine, examples=100, steps=60)
