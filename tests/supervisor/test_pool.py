"""WorkerPool: who gets which job, and what a death costs."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from nydusd.ipc.messages import Json
from nydusd.storage.api.factory import BlobFactory
from nydusd.storage.cache.manager import CacheConfig
from nydusd.storage.cache.requests import Answer, Job, Priority
from nydusd.supervisor import pool as pool_module
from nydusd.supervisor.pool import WorkerPool
from tests.supervisor.world import Clock
from tests.support.blobs import blob_info


class Pool:
    """A pool, what it sent, and how its jobs ended."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, str]] = []
        self.ended: list[tuple[str, Answer]] = []
        self.spare: list[Job] = []
        self.pool = WorkerPool("fetch", self._send, self._more)

    def _send(self, identity: bytes, message: Json) -> None:
        self.sent.append((identity, message["kind"]))

    def _more(self) -> None:
        while self.spare:
            self.pool.submit(self.spare.pop(0))

    def job(self, name: str, priority: Priority = Priority.USER) -> Job:
        return Job(name, None, priority, {}, lambda job, answer: self.ended.append((job.kind, answer)))

    def submit(self, name: str, priority: Priority = Priority.USER) -> Job:
        job = self.job(name, priority)
        self.pool.submit(job)
        return job

    def order(self) -> list[str]:
        """The names of all queued jobs as one worker gets them."""
        self.pool.worker_ready(b"w")
        names: list[str] = []
        self.pool.pump()
        while len(self.sent) > len(names):
            names.append(self.sent[-1][1])
            self.pool.worker_done(b"w", {"id": self.pool._busy[b"w"].number})
            self.pool.pump()
        return names


@pytest.fixture
def pool() -> Pool:
    return Pool()


def test_order_is_users_then_ahead_then_prefetch_each_in_order_of_arrival(pool: Pool) -> None:
    for name, priority in (("p1", 2), ("a1", 1), ("u1", 0), ("p2", 2), ("u2", 0), ("a2", 1)):
        pool.submit(name, Priority(priority))
    assert pool.order() == ["u1", "u2", "a1", "a2", "p1", "p2"]


def test_promoted_job_stands_behind_the_users(pool: Pool) -> None:
    pool.submit("p1", Priority.PREFETCH)
    chosen = pool.submit("p2", Priority.PREFETCH)
    pool.submit("u1")
    pool.pool.promote(chosen)
    pool.pool.promote(chosen)
    assert pool.order() == ["u1", "p2", "p1"]


def test_idle_worker_gets_what_more_submits_at_once(pool: Pool) -> None:
    pool.spare = [pool.job("p1", Priority.PREFETCH), pool.job("p2", Priority.PREFETCH)]
    assert pool.order() == ["p1", "p2"]


def test_more_is_not_asked_while_a_job_is_queued(pool: Pool) -> None:
    pool.spare = [pool.job("spare")]
    pool.submit("u1")
    pool.pool.worker_ready(b"w")
    pool.pool.pump()
    assert pool.spare


def test_worker_has_one_job_at_a_time(pool: Pool) -> None:
    pool.submit("a")
    pool.submit("b")
    pool.pool.worker_ready(b"w")
    pool.pool.worker_ready(b"w")  # a repeated hello is not a second worker
    pool.pool.pump()
    assert pool.sent == [(b"w", "a")]
    assert pool.pool.size == 1


def test_job_whose_worker_died_goes_to_another_before_the_rest(pool: Pool) -> None:
    pool.submit("a")
    pool.submit("b")
    pool.pool.worker_ready(b"w1")
    pool.pool.pump()
    pool.pool.worker_died(b"w1")
    pool.pool.worker_ready(b"w2")
    pool.pool.pump()
    assert pool.sent == [(b"w1", "a"), (b"w2", "a")]
    assert pool.ended == []


def test_third_death_gives_a_job_up(pool: Pool) -> None:
    pool.submit("poison")
    for name in (b"w1", b"w2", b"w3"):
        assert pool.ended == []
        pool.pool.worker_ready(name)
        pool.pool.pump()
        pool.pool.worker_died(name)
    ((kind, answer),) = pool.ended
    assert (kind, answer["errno"], answer["type"]) == ("poison", errno.EIO, "WorkerDied")
    assert not pool.pool.queued()
    assert pool.pool.size == 0


def test_kills_from_outside_are_no_fault_of_the_job_until_the_tenth(pool: Pool) -> None:
    pool.submit("a")
    for number in range(10):
        assert pool.ended == []
        name = f"w{number}".encode()
        pool.pool.worker_ready(name)
        pool.pool.pump()
        pool.pool.worker_died(name, killed=True)
    assert [(kind, answer["type"]) for kind, answer in pool.ended] == [("a", "WorkerDied")]


def test_what_a_worker_does_is_known(pool: Pool) -> None:
    assert pool.pool.job_of(b"w") == 0
    pool.pool.worker_ready(b"w")
    assert pool.pool.job_of(b"w") is None
    job = pool.submit("a")
    pool.pool.pump()
    assert pool.pool.job_of(b"w") == job.number > 0
    pool.pool.worker_died(b"w")
    assert pool.pool.job_of(b"w") == 0


@pytest.mark.parametrize(("kind", "may"), [("fetch", False), ("fill", False), ("prepare", True), ("survey", True)])
def test_jobs_on_whole_blobs_may_compute_for_long_and_those_on_a_few_chunks_may_not(
    pool: Pool, kind: str, may: bool
) -> None:
    pool.pool.worker_ready(b"w")
    assert not pool.pool.may_compute(b"w")
    job = pool.submit(kind)
    pool.pool.pump()
    assert pool.pool.may_compute(b"w") == may
    pool.pool.worker_done(b"w", {"id": job.number})
    assert not pool.pool.may_compute(b"w")


def test_report_of_a_dead_worker_is_ignored(pool: Pool) -> None:
    job = pool.submit("a")
    pool.pool.worker_ready(b"w1")
    pool.pool.pump()
    pool.pool.worker_died(b"w1")
    pool.pool.worker_done(b"w1", {"id": job.number})
    assert pool.ended == []
    assert pool.pool.size == 0


def test_report_of_another_job_is_ignored(pool: Pool) -> None:
    pool.submit("a")
    pool.pool.worker_ready(b"w")
    pool.pool.pump()
    pool.pool.worker_done(b"w", {"id": 12345})
    assert pool.ended == []


def test_dead_idle_worker_gets_no_job(pool: Pool) -> None:
    pool.pool.worker_ready(b"w")
    pool.pool.worker_died(b"w")
    pool.submit("a")
    pool.pool.pump()
    assert pool.sent == []


def test_refused_kind_is_neither_begun_nor_repeated_and_others_go_on() -> None:
    sent: list[tuple[bytes, int]] = []
    pool = WorkerPool("fetch", lambda identity, message: sent.append((identity, message["id"])), lambda: None)
    ended: list[Answer] = []
    jobs = [Job(kind, None, Priority.USER, {}, lambda _job, answer: ended.append(answer)) for kind in "abab"]
    for job in jobs:
        pool.submit(job)
    pool.worker_ready(b"one")
    pool.pump()
    assert pool.refuse("a") == [b"one"]
    pool.worker_died(b"one")
    pool.worker_ready(b"two")
    pool.submit(Job("a", None, Priority.USER, {}, lambda _job, answer: ended.append(answer)))
    for _ in range(3):
        pool.pump()
        if len(sent) > 1:
            identity, number = sent[-1]
            pool.worker_done(identity, {"id": number})
    assert sent == [(b"one", jobs[0].number), (b"two", jobs[1].number), (b"two", jobs[3].number)]
    assert len(ended) == 2


def test_workers_are_told_to_forget_what_they_have_open_and_is_used_no_more() -> None:
    sent: list[Json] = []
    pool = WorkerPool("decompress", lambda _identity, message: sent.append(message), lambda: None)
    factory = BlobFactory("forget", "/nonexistent")
    config = CacheConfig("localfs", {}, "/cache", False)
    first, second = (
        factory.new_blob_cache(config, replace(blob_info(), blob_id=name), "image", "/boot", "", False) for name in "ab"
    )
    pool.worker_ready(b"w")
    for cache in (first, second, None, second):
        pool.submit(Job("fill", cache, Priority.USER, {}, lambda _job, _answer: None))
        pool.pump()
        pool.worker_done(b"w", {"id": sent[-1]["id"]})
        if cache is first:
            pool.forget(first)
            pool.forget(second)
    assert [message.get("forget") for message in sent] == [None, [first.handle], None, None]
    assert ["spec" in message for message in sent] == [True, True, False, False]


class TestUpkeep:
    """Chunk maps are stored and room is made however many readers wait."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> Clock:
        clock = Clock()
        monkeypatch.setattr(pool_module, "time", clock)
        return clock

    @staticmethod
    def done(pool: Pool, identity: bytes) -> None:
        pool.pool.worker_done(identity, {"id": pool.pool._busy[identity].number})
        pool.pool.pump()

    @pytest.mark.parametrize("kind", ["checkpoint", "evict", "survey"])
    def test_waits_behind_readers_for_two_seconds_and_no_longer(self, pool: Pool, clock: Clock, kind: str) -> None:
        pool.submit(kind, Priority.AHEAD)
        for _ in range(3):
            pool.submit("fetch")
        pool.pool.worker_ready(b"w")
        pool.pool.pump()
        clock.now += 2.0
        self.done(pool, b"w")
        clock.now += 0.1
        self.done(pool, b"w")
        assert [name for _, name in pool.sent] == ["fetch", "fetch", kind]

    def test_is_one_job_at_a_time_while_readers_wait(self, pool: Pool, clock: Clock) -> None:
        for _ in range(3):
            pool.submit("checkpoint", Priority.AHEAD)
        for _ in range(6):
            pool.submit("fetch")
        clock.now += 60.0
        for name in (b"one", b"two"):
            pool.pool.worker_ready(name)
        pool.pool.pump()
        assert sorted(name for _, name in pool.sent) == ["checkpoint", "fetch"]
        (reads,) = [identity for identity, job in pool.pool._busy.items() if job.kind == "fetch"]
        for _ in range(4):
            self.done(pool, reads)
        assert [name for _, name in pool.sent].count("checkpoint") == 1
        (stores,) = [identity for identity, job in pool.pool._busy.items() if job.kind == "checkpoint"]
        self.done(pool, stores)
        assert [name for _, name in pool.sent].count("checkpoint") == 2

    def test_has_an_only_worker_half_of_the_time_at_most(self, pool: Pool, clock: Clock) -> None:
        for _ in range(2):
            pool.submit("checkpoint", Priority.AHEAD)
        for _ in range(9):
            pool.submit("fetch")
        clock.now += 60.0
        pool.pool.worker_ready(b"w")
        pool.pool.pump()
        clock.now += 5.0
        for _ in range(7):
            self.done(pool, b"w")
            clock.now += 1.0
        assert [name for _, name in pool.sent] == ["checkpoint", *["fetch"] * 5, "checkpoint", "fetch"]

    def test_that_nobody_waits_behind_is_done_at_once(self, pool: Pool, clock: Clock) -> None:
        for _ in range(2):
            pool.submit("checkpoint", Priority.AHEAD)
            pool.pool.worker_ready(f"w{_}".encode())
        pool.pool.pump()
        assert [name for _, name in pool.sent] == ["checkpoint", "checkpoint"]


class TestRetiredWorker:
    def test_does_its_job_and_gets_no_other(self, pool: Pool) -> None:
        pool.submit("a")
        pool.submit("b")
        pool.pool.worker_ready(b"old")
        pool.pool.pump()
        pool.pool.retire(b"old")
        assert pool.pool.is_busy(b"old")
        assert pool.pool.size == 0
        pool.pool.worker_done(b"old", {"id": pool.pool._busy[b"old"].number})
        pool.pool.pump()
        assert [name for name, _ in pool.ended] == ["a"]
        assert not pool.pool.is_busy(b"old")
        pool.pool.worker_ready(b"new")
        pool.pool.pump()
        assert pool.sent == [(b"old", "a"), (b"new", "b")]

    def test_that_is_idle_or_has_not_announced_itself_yet_gets_none(self, pool: Pool) -> None:
        pool.pool.worker_ready(b"idle")
        for name in (b"idle", b"starting"):
            pool.pool.retire(name)
        pool.pool.worker_ready(b"starting")
        pool.submit("a")
        pool.pool.pump()
        assert pool.sent == []
        assert pool.pool.size == 0

    def test_that_dies_leaves_its_job_to_others_and_nothing_of_itself(self, pool: Pool) -> None:
        pool.submit("a")
        pool.pool.worker_ready(b"old")
        pool.pool.pump()
        pool.pool.retire(b"old")
        pool.pool.worker_died(b"old", killed=True)
        pool.pool.worker_ready(b"new")
        pool.pool.pump()
        assert pool.sent == [(b"old", "a"), (b"new", "a")]
        assert not pool.pool._retired

    def test_is_no_reason_to_let_the_jobs_of_a_silent_server_wait(self, pool: Pool) -> None:
        load = pool.pool.load()
        pool.submit("a")
        pool.pool.worker_ready(b"old")
        pool.pool.pump()
        pool.pool.retire(b"old")
        assert pool.pool.load()["busy"] == load["busy"] == 0
