"""Any interleaving of readers of two images with a blob in common, of fills, of evictions and of deaths in the middle of them:
each request is answered exactly once, and no chunk is ready that is not in the cache file."""

from __future__ import annotations

from enum import Enum, auto

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nydusd.ipc.messages import LOST, UNREADABLE
from nydusd.storage.cache.blob_cache import BlobCache
from tests.supervisor.shared_world import SharedWorld
from tests.supervisor.world import CHUNKS
from tests.support.models import run_model

CLIENTS = (b"fuse-0-1", b"fuse-1-1")
_FEW = 6
"""Chunks that are asked for: so few that one is often asked for by both while it is taken out."""
picks = st.integers(0, 1 << 16)
images = st.integers(0, 1)
chunks = st.integers(0, _FEW - 1)


class Wrong(Enum):
    LOST = auto()
    UNREADABLE = auto()
    SUPERVISOR_DIES = auto()
    WORKER_DIES = auto()
    CHUNK_FAILS = auto()
    DISK_FULL = auto()
    FILE_REPLACED = auto()


class Machine(RuleBasedStateMachine):
    """`pick` chooses among what there is. The second image's clients are those of the first, too."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.world = SharedWorld(self.patch)
        self.number = 0
        self.workers = 0

    @property
    def blobs(self) -> list[BlobCache]:
        return [self.world.plain, self.world.twin]

    @initialize()
    def start(self) -> None:
        self.staff()
        for blob in self.blobs:
            self.world.router.open_blob(blob)
            self.world.pump()
            for identity in list(self.world.sent):
                self.world.finish(identity)

    def staff(self) -> None:
        for role in ("fetch", "decompress"):
            while self.world.pool(role).size < 3:
                self.workers += 1
                self.world.worker(role, f"{role}-{self.workers}".encode())

    @rule(client=st.sampled_from(CLIENTS), image=images, first=chunks, size=st.integers(1, 3))
    def request(self, client: bytes, image: int, first: int, size: int) -> None:
        self._ask(client, image, first, size)

    def _ask(self, client: bytes, image: int, first: int, size: int, flag: int = 0) -> None:
        self.number += 1
        self.world.ask(client, self.number, self.blobs[image], first, size, flag)

    @rule(pick=picks)
    def reader_gives_up(self, pick: int) -> None:
        if self.world.open:
            client, number = list(self.world.open)[pick % len(self.world.open)]
            del self.world.open[client, number]
            self.world.router.cancel(client, number)

    @rule(image=images, some=st.sets(chunks), full=st.booleans())
    def room_is_made(self, image: int, some: set[int], full: bool) -> None:
        """Of what the one image has; the other one knows nothing of that, if nobody has asked for it."""
        self._ask(CLIENTS[0], image, 0, _FEW)
        for _ in range(100):
            self.turn()
            busy = self._sent("fill", "fetch", "prepare", "checkpoint")
            if not busy:
                break
            self.world.finish(busy[0])
        self.world.evict(self.blobs[image], range(CHUNKS) if full else some)

    @rule(pick=picks)
    def chunks_are_taken_out(self, pick: int) -> None:
        """Nobody has heard of it yet."""
        if evicting := self._sent("evict"):
            self.world.take_out(evicting[pick % len(evicting)])

    @rule(pick=picks)
    def eviction_ends(self, pick: int) -> None:
        if evicting := self._sent("evict"):
            self.world.finish(evicting[pick % len(evicting)])

    @rule(pick=picks)
    def job_ends(self, pick: int) -> None:
        if busy := self._sent("fill", "fetch", "prepare", "checkpoint"):
            self.world.finish(busy[pick % len(busy)])

    @rule(wrong=st.sampled_from(Wrong), image=images, first=chunks, pick=picks)
    def something_goes_wrong(self, wrong: Wrong, image: int, first: int, pick: int) -> None:
        filling, evicting = self._sent("fill"), self._sent("evict")
        if wrong is Wrong.LOST:
            self._ask(CLIENTS[1], image, first, 1, LOST)
        elif wrong is Wrong.UNREADABLE:
            self._ask(CLIENTS[1], image, first, 1, UNREADABLE)
        elif wrong is Wrong.SUPERVISOR_DIES:
            self.world.succeed()
        elif wrong is Wrong.WORKER_DIES and self.world.sent:
            self.world.kill(list(self.world.sent)[pick % len(self.world.sent)])
        elif wrong is Wrong.CHUNK_FAILS and filling:
            self.world.filled(filling[pick % len(filling)], [first])
        elif wrong is Wrong.DISK_FULL and filling:
            self.world.filled(filling[pick % len(filling)], (), range(CHUNKS))
        elif wrong is Wrong.FILE_REPLACED and evicting:
            self.world.stale(evicting[pick % len(evicting)])

    @rule(image=images, first=chunks, seconds=st.sampled_from([1.0, 31.0]))
    def time_passes(self, image: int, first: int, seconds: float) -> None:
        self.world.clock.now += seconds
        self.world.router.checkpoint()
        self.world.prefetch.want(self.blobs[image], first, 3)

    def _sent(self, *kinds: str) -> list[bytes]:
        return [identity for identity, message in self.world.sent.items() if message["kind"] in kinds]

    def turn(self) -> None:
        """A turn of the daemon's loop."""
        while self.world.leases:
            self.world.router.release(self.world.leases.pop())
        self.staff()
        self.world.router.tick()
        self.world.pump()

    @invariant()
    def consistent(self) -> None:
        self.world.check()
        self.turn()
        self.world.check()
        self.world.check_urgent()

    def teardown(self) -> None:
        try:
            self.world.settle()
            self.world.check_nothing_left()
        finally:
            self.world.close()
            self.patch.undo()


class RemoteMachine(Machine):
    """The blob is remote: what it holds is fetched by one worker and decoded by another."""

    @property
    def blobs(self) -> list[BlobCache]:
        return [self.world.far, self.world.far_twin]


@pytest.mark.parametrize("machine", [Machine, RemoteMachine])
def test_nothing_is_ready_that_is_not_in_the_file_and_every_request_is_answered(machine: type[Machine]) -> None:
    run_model(machine, examples=40, steps=30)


def test_who_waits_for_room_in_shared_memory_has_it_when_an_eviction_has_ended() -> None:
    """Found by the machine: what the requests that waited for the eviction had held, nobody was given."""
    machine = RemoteMachine()
    try:
        machine.start()
        machine.consistent()
        machine.request(client=CLIENTS[0], image=0, first=0, size=1)
        machine.consistent()
        machine.job_ends(pick=0)
        machine.consistent()
        machine.something_goes_wrong(wrong=Wrong.DISK_FULL, image=0, first=0, pick=0)
        machine.consistent()
        for some in ({0}, set(), set()):
            machine.room_is_made(image=0, some=some, full=bool(some))
            machine.consistent()
        machine.eviction_ends(pick=0)
        machine.consistent()
    finally:
        machine.teardown()
