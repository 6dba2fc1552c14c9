"""Backends that cannot be reached: who is put off, for how long, and what is done meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

import pytest

from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.supervisor.pool import WorkerPool
from tests.supervisor.world import World

A, B = b"fuse-0-1", b"fuse-1-1"
DEADLINE = 30.0
"""How long the world's readers wait."""


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(monkeypatch, 0)
    try:
        made.open_all()
        for role in ("fetch", "decompress"):
            made.worker(role, role.encode())
        yield made
        made.settle()
        made.check_nothing_left()
    finally:
        made.close()


def codes(world: World) -> list[tuple[int, int]]:
    return [(number, code) for _client, number, code, _slot in world.answers]


def fail(world: World, retry_after: float = 0.0) -> None:
    """The fetch job that is under way now ends without a backend."""
    world.pump()
    world.out(b"fetch", retry_after)
    world.pump()
    world.check()


def pass_time(world: World) -> float:
    """Until the next request is due; gives the seconds."""
    wait = world.router.outages.wait(world.clock.now)
    assert wait is not None
    world.clock.now += wait
    world.router.tick()
    world.check()
    return wait


def try_until_time_is_over(world: World, cache: BlobCache, hurt: Callable[[World], None]) -> None:
    """A reader asks, and `hurt` is done to each job for it: it is tried again and again, and he gets an error at the end."""
    begin = world.clock.now
    world.ask(A, 1, cache, 4, 1)
    tries = 0
    while not codes(world):
        assert world.clock.now - begin < DEADLINE
        hurt(world)
        tries += 1
        if not codes(world):
            pass_time(world)
    assert codes(world) == [(1, errno.EIO)]
    assert world.clock.now - begin > DEADLINE - 2.0
    assert 10 < tries < 30


def test_reader_is_put_off_again_and_again_holds_nothing_meanwhile_and_gets_the_data(world: World) -> None:
    world.ask(A, 1, world.far, 4, 1)
    for _ in range(5):
        fail(world)
        assert not world.sent and not world.far.jobs and not world.stage.in_use()
        pass_time(world)
    assert codes(world) == []
    world.settle()
    assert codes(world) == [(1, 0)]


def test_reader_gets_an_error_when_his_time_is_over_and_not_before(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    try_until_time_is_over(world, world.far, fail)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(warned) == len(errors) == 1
    assert "readers wait for the backend" in warned[0] and "readers have no more time" in errors[0]
    world.ask(B, 2, world.far, 4, 1)
    assert codes(world)[1:] == [(2, errno.EIO)], (
        "the kernel asks once more for what it read ahead, and need not wait again"
    )
    world.clock.now += 0.6
    world.ask(B, 3, world.far, 4, 1)
    world.settle()
    assert codes(world)[2:] == [(3, 0)]


def test_reader_who_came_later_waits_on_when_another_gives_up(world: World) -> None:
    world.ask(A, 1, world.far, 4, 1)
    world.pump()
    world.clock.now += DEADLINE - 1.0
    world.ask(B, 2, world.far, 4, 1)
    fail(world)
    assert codes(world) == [(1, errno.EIO)]
    pass_time(world)
    world.settle()
    assert codes(world) == [(1, errno.EIO), (2, 0)]


def test_server_is_left_alone_as_long_as_it_wants_unless_nobody_waits_so_long(world: World) -> None:
    world.ask(A, 1, world.far, 4, 1)
    fail(world, retry_after=7.0)
    assert 7.0 <= pass_time(world) <= 8.75
    fail(world, retry_after=60.0)
    assert codes(world) == [(1, errno.EIO)]


def test_every_try_ends_when_the_reader_gives_up(world: World) -> None:
    begin = world.clock.now
    world.ask(A, 1, world.far, 4, 1)
    for _ in range(3):
        world.pump()
        assert world.sent[b"fetch"]["until"] == pytest.approx(begin + DEADLINE - 1.0)
        world.clock.now += 5.0
        fail(world)
        pass_time(world)


def test_reader_in_shared_memory_gives_his_room_back_while_he_waits(world: World) -> None:
    world.ask(A, 1, world.far_dummy, 0, 1)
    world.pump()
    assert world.slots.held()
    fail(world)
    assert not world.slots.held()
    pass_time(world)
    world.settle()
    assert codes(world) == [(1, 0)]


def test_reader_who_is_gone_is_not_served(world: World) -> None:
    world.ask(A, 1, world.far, 4, 1)
    world.ask(B, 2, world.far, 6, 1)
    fail(world)
    fail(world)
    del world.open[A, 1]
    world.router.cancel(A, 1)
    del world.open[B, 2]
    world.router.drop_client(B)
    assert world.router.outages.wait(world.clock.now) is None


def lack(world: World) -> None:
    """A decompress worker has no file descriptor for the job that is under way."""
    while b"decompress" not in world.sent:
        world.pump()
        if b"fetch" in world.sent:
            world.finish(b"fetch")
    world.lack(b"decompress")
    world.check()


@pytest.mark.parametrize("name", ["plain", "dummy", "far", "far_dummy"])
def test_reader_waits_while_a_worker_lacks_file_descriptors_and_that_is_said_once(
    world: World, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """A backend that answers meanwhile, again and again, does not end it."""
    cache = getattr(world, name)
    world.ask(A, 1, cache, 4, 1)
    for _ in range(5):
        lack(world)
        assert not cache.jobs and not world.stage.in_use() and not world.slots.held()
        assert (cache.outage, cache.lacks) == ("Too many open files", True)
        assert pass_time(world) > 0.05
    assert codes(world) == []
    world.settle()
    assert codes(world) == [(1, 0)]
    assert not cache.outage
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 2
    assert said[0] == "readers wait for file descriptors or memory: Too many open files"
    assert "file descriptors and memory are there again" in said[1]


def test_reader_for_whom_file_descriptors_are_lacking_for_too_long_gets_an_error(world: World) -> None:
    try_until_time_is_over(world, world.plain, lack)


def test_worker_that_lacks_something_is_asked_after_the_others(world: World) -> None:
    world.ask(A, 1, world.plain, 4, 1)
    world.pump()
    world.worker("decompress", b"other")
    world.lack(b"decompress")
    pass_time(world)
    world.pump()
    assert list(world.sent) == [b"other"]


def test_chunk_that_could_not_be_looked_at_in_the_cache_file_is_not_fetched(world: World) -> None:
    world.far.chunk_map.doubt(4)
    world.ask(A, 1, world.far, 4, 1)
    for _ in range(3):
        world.pump()
        assert world.sent.keys() == {b"decompress"} and world.sent[b"decompress"]["verify"] == [4]
        world.lack(b"decompress")
        world.check()
        pass_time(world)


def test_blob_that_cannot_be_opened_for_want_of_its_backend_keeps_readers_waiting(world: World) -> None:
    world.far.state = "new"
    world.ask(A, 1, world.far, 4, 1)
    for _ in range(3):
        fail(world)
        world.ask(B, 2, world.far, 4, 1)
        assert codes(world) == []
        while not world.sent:
            pass_time(world)
            world.pump()
        assert world.sent[b"fetch"]["kind"] == "prepare"
    world.settle()
    assert sorted(codes(world)) == [(1, 0), (2, 0)]


def test_blob_that_cannot_be_opened_for_want_of_file_descriptors_keeps_readers_waiting(world: World) -> None:
    world.far.state = "new"
    world.ask(A, 1, world.far, 4, 1)
    world.pump()
    world.done(b"fetch", {"error": "too many open files", "errno": errno.EIO, "type": "ScarceError"})
    assert codes(world) == []
    assert (world.far.outage, world.far.lacks) == ("too many open files", True), "the backend has done nothing wrong"
    world.settle()
    assert codes(world) == [(1, 0)]
    assert (world.far.outage, world.far.lacks) == ("", False)


def test_outage_of_a_local_blob_is_over_when_it_was_read(world: World) -> None:
    world.plain.outage = "no file descriptor is left"
    world.ask(A, 1, world.plain, 4, 1)
    world.settle()
    assert not world.plain.outage


def test_prefetch_is_put_back_for_a_while(world: World) -> None:
    world.prefetch.want(world.far, 0, 2)
    fail(world)
    assert not world.sent, "nothing is asked for at once"
    world.clock.now += 1.1
    world.pump()
    assert world.sent[b"fetch"]["prefetch"]
    world.settle()
    assert world.far.chunk_map.is_ready(0) and world.far.chunk_map.is_ready(1)


class Pool:
    """A pool of four workers, and the jobs that they have: of blobs `here`, whose server is silent, and `there`."""

    def __init__(self, world: World, others: bool = True) -> None:
        world.far.server, world.far_batch.server = "silent", "other"
        self.world = world
        self.sent: list[bytes] = []
        self.pool = WorkerPool(
            "fetch", lambda identity, _message: self.sent.append(identity), lambda: None, lambda _: others
        )
        for number in range(4):
            self.pool.worker_ready(b"%d" % number)

    def submit(self, server: str, count: int, kind: str = "fetch") -> None:
        cache = self.world.far if server == "silent" else self.world.far_batch
        for _ in range(count):
            self.pool.submit(Job(kind, cache, Priority.USER, {}, lambda _job, _answer: None))
        self.pool.pump()

    def busy(self) -> list[str]:
        return sorted(job.cache.server for job in self.pool._busy.values() if job.cache is not None)

    def end_all(self, server: str, answer: Answer) -> None:
        for identity, job in list(self.pool._busy.items()):
            if job.cache is not None and job.cache.server == server:
                self.pool.worker_done(identity, answer | {"id": job.number})
        self.pool.pump()


class TestWorkers:
    def test_last_one_is_kept_for_other_servers(self, world: World) -> None:
        pool = Pool(world)
        pool.submit("silent", 9)
        assert pool.busy() == ["silent"] * 3
        pool.submit("other", 9)
        assert pool.busy() == ["other"] + ["silent"] * 3

    def test_all_are_used_where_there_is_one_server(self, world: World) -> None:
        pool = Pool(world, others=False)
        pool.submit("silent", 9)
        assert pool.busy() == ["silent"] * 4

    def test_silent_server_gets_one_until_it_answers(self, world: World) -> None:
        pool = Pool(world)
        pool.submit("silent", 9)
        pool.end_all(
            "silent", {"error": "no answer", "errno": errno.EIO, "type": "BackendTimeoutError", "retry_after": 0}
        )
        assert pool.busy() == ["silent"]
        pool.submit("other", 9)
        assert pool.busy() == ["other"] * 3 + ["silent"]
        pool.end_all("other", {})
        assert pool.busy() == ["other"] * 3 + ["silent"]
        pool.end_all("silent", {})
        pool.end_all("other", {})
        assert pool.busy() == ["other"] + ["silent"] * 3

    def test_silent_server_is_asked_again_however_busy_the_others_are(self, world: World) -> None:
        pool = Pool(world)
        pool.submit("other", 9)
        pool.submit("silent", 1)
        assert pool.busy() == ["other"] * 3 + ["silent"]
        for _ in range(2):
            pool.end_all("silent", {"error": "no", "errno": errno.EIO, "type": "BackendTimeoutError", "retry_after": 0})
            pool.submit("silent", 1)
            assert pool.busy() == ["other"] * 3 + ["silent"]

    def test_silent_servers_leave_one_to_the_others(self, world: World) -> None:
        pool = Pool(world)
        pool.submit("silent", 1)
        pool.submit("other", 1)
        failed: Answer = {"error": "no", "errno": errno.EIO, "type": "BackendTimeoutError", "retry_after": 0}
        pool.end_all("silent", failed)
        pool.end_all("other", failed)
        for name in (b"0", b"1"):
            pool.pool.worker_died(name)
        pool.submit("silent", 1)
        pool.submit("other", 1)
        assert pool.busy() == ["silent"]
        pool.end_all("silent", {})
        assert pool.busy() == ["other"]

    def test_one_that_is_alone_works_for_all(self, world: World) -> None:
        pool = Pool(world)
        for number in range(3):
            pool.pool.worker_died(b"%d" % number)
        pool.submit("silent", 1)
        assert pool.busy() == ["silent"]
        pool.end_all(
            "silent", {"error": "no answer", "errno": errno.EIO, "type": "BackendTimeoutError", "retry_after": 0}
        )
        pool.submit("silent", 1)
        assert pool.busy() == ["silent"]


def test_blob_that_cannot_be_opened_for_want_of_memory_gets_what_arenas_only_keep(world: World) -> None:
    world.ask(A, 1, world.dummy, 4, 1)
    world.settle()
    world.ask(A, 2, world.far_batch, 4, 1)
    world.settle()

    def backed() -> int:
        arenas = [table._arena for table in (world.slots, world.stage)]
        return sum(os.fstat(arena._fd).st_blocks for arena in arenas if arena is not None)

    assert backed()
    world.far.state = "new"
    world.ask(A, 3, world.far, 4, 1)
    world.pump()
    (identity,) = world.sent
    world.done(identity, {"error": "No space left on device", "errno": errno.EIO, "type": "ScarceError"})
    assert not backed()
    world.settle()
    assert codes(world) == [(1, 0), (2, 0), (3, 0)]
