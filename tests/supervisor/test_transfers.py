"""Transfers in single situations: what is asked of the backend in which order, and what becomes of a region."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

import pytest

from nydusd.ipc.messages import AHEAD, LOST, Json
from nydusd.storage.cache.requests import Priority
from nydusd.supervisor import transfers
from tests.supervisor.world import CHUNKS, World, opened

A, B = b"fuse-0-1", b"fuse-1-1"


def make(patch: pytest.MonkeyPatch, amplify: int) -> Iterator[World]:
    with opened(patch, amplify) as made:
        patch.setattr(transfers, "MIN_REQUEST", 16 << 10)
        yield made


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """One in which nothing is taken along."""
    yield from make(monkeypatch, 0)


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """One in which a miss takes along a chunk or two."""
    yield from make(monkeypatch, 10 << 10)


def codes(world: World) -> list[tuple[int, int]]:
    """(number, errno) of the answers so far, in order."""
    return [(number, code) for _client, number, code, _slot in world.answers]


def workers(world: World, fetch: int = 1, decompress: int = 1) -> None:
    for role, count in (("fetch", fetch), ("decompress", decompress)):
        for number in range(count):
            world.worker(role, b"%s-%d" % (role.encode(), number))


def fetching(world: World) -> list[Sequence[int]]:
    """The chunks of the fetch jobs that workers have now."""
    world.pump()
    return [message["chunks"] for message in world.sent.values() if message["kind"] == "fetch"]


def error(kind: str) -> Json:
    return {"error": "no", "errno": errno.EIO, "type": kind, "reads": 1, "read_errors": 1, "read_bytes": 0}


def test_miss_is_one_request_with_its_neighbours_and_then_fills_with_the_waiting_chunks_first(greedy: World) -> None:
    workers(greedy)
    greedy.ask(A, 1, greedy.far, 4, 1)
    assert fetching(greedy) == [[4, 5]]  # 4 + 6 KiB, of 16 at most
    message = greedy.sent[b"fetch-0"]
    assert message["coff"] == sum((8 + n % 4 * 4) << 9 for n in range(4))
    assert message["slot"]["length"] == 10 << 10
    greedy.fetched(b"fetch-0")
    greedy.pump()
    assert greedy.sent[b"decompress-0"]["chunks"] == [4]
    greedy.filled(b"decompress-0")
    assert codes(greedy) == [(1, 0)]
    assert greedy.router.backend == {"reads": 2, "read_errors": 0, "read_bytes": 10240 + 4096}
    greedy.settle()


def test_decompress_worker_gets_no_settings_of_a_remote_backend_and_those_of_a_local_one(world: World) -> None:
    workers(world)
    world.ask(A, 1, world.far, 0, 1)
    world.pump()
    assert world.sent[b"fetch-0"]["spec"]["backend_config"] == {"secret": "of the test"}
    world.fetched(b"fetch-0")
    world.pump()
    assert world.sent[b"decompress-0"]["spec"]["backend_config"] == {}
    world.settle()
    world.worker("decompress", b"new")
    world.ask(A, 2, world.plain, 0, 1)
    world.settle()
    specs = [
        message["spec"] for message in world.dispatched if "spec" in message and message["handle"] == world.plain.handle
    ]
    assert specs[0]["backend_config"] == {"secret": "of the test"}


def test_many_readers_of_a_chunk_are_one_request(world: World) -> None:
    for number in range(50):
        world.ask(A if number % 2 else B, number, world.far, 23, 1)
    world.settle()
    assert sorted(codes(world)) == [(number, 0) for number in range(50)]
    assert [message["chunks"] for message in world.dispatched if message["kind"] == "fetch"] == [[23]]


class TestDamaged:
    def test_chunk_is_fetched_once_more_past_all_caches_and_its_neighbours_are_not(self, world: World) -> None:
        workers(world)
        world.ask(A, 1, world.far, 4, 2)
        assert fetching(world) == [[4, 5]]
        world.fetched(b"fetch-0")
        assert world.fill_next(failed=[5]) == [4, 5]
        assert world.far.chunk_map.is_ready(4)
        assert codes(world) == []
        world.ask(B, 2, world.far, 5, 1)
        assert fetching(world) == [[5]]
        message = world.sent[b"fetch-0"]
        assert (message["bypass"], message["slot"]["length"]) == (True, 6 << 10)
        world.fetched(b"fetch-0")
        assert world.fill_next() == [5]
        assert sorted(codes(world)) == [(1, 0), (2, 0)]
        assert not world.stage.in_use()

    def test_twice_fails_alone(self, world: World) -> None:
        workers(world)
        world.ask(A, 1, world.far, 4, 2)
        world.ask(A, 2, world.far, 4, 1)
        for _ in range(2):
            world.pump()
            world.fetched(b"fetch-0")
            world.fill_next(failed=[5])
        assert sorted(codes(world)) == [(1, errno.EIO), (2, 0)]

    def test_chunk_for_a_reader_in_shared_memory_keeps_what_its_neighbours_have_there(self, world: World) -> None:
        workers(world)
        world.ask(A, 1, world.far_dummy, 0, 2)
        assert fetching(world) == [[0, 1]]
        world.fetched(b"fetch-0")
        world.fill_next(failed=[0])
        assert fetching(world) == [[0]]
        world.fetched(b"fetch-0")
        world.fill_next()
        ((_, _, code, slot),) = world.answers
        assert code == 0 and slot is not None
        places = sorted((offset, offset + length) for _chunk, offset, length in slot.chunks)
        assert len(places) == 2 and places[0][1] <= places[1][0]
        assert world.slots.held() == 1
        world.router.release(world.leases.pop())
        assert not world.slots.held()

    def test_and_then_replaced_under_us_ends_with_the_old_file(self, world: World) -> None:
        workers(world, decompress=2)
        world.ask(A, 1, world.far, 4, 2)
        world.ask(A, 2, world.far, 12, 2)
        world.pump()
        world.fetched(b"fetch-0")
        world.pump()
        world.filled(b"decompress-1", failed=[4])
        world.ask(B, 3, world.far, 20, 1, LOST)
        world.settle()
        assert sorted(codes(world)) == [(1, 0), (2, 0), (3, 0)]


class TestDeath:
    def test_of_a_fetch_worker_in_mid_fetch_repeats_the_request_into_the_same_region(self, world: World) -> None:
        workers(world)
        world.ask(A, 1, world.far, 4, 1)
        world.pump()
        before = world.sent[b"fetch-0"]["slot"]
        world.kill(b"fetch-0")
        world.worker("fetch", b"fetch-1")
        world.pump()
        assert world.sent[b"fetch-1"]["slot"] == before
        world.settle()
        assert codes(world) == [(1, 0)]

    def test_of_a_decompress_worker_in_mid_fill_repeats_the_fill_and_no_request(self, world: World) -> None:
        workers(world)
        world.ask(A, 1, world.far, 23, 1)
        world.pump()
        world.fetched(b"fetch-0")
        world.pump()
        world.kill(b"decompress-0")
        assert world.stage.in_use()
        world.settle()
        assert codes(world) == [(1, 0)]
        assert [message["kind"] for message in world.dispatched] == ["fetch", "fill", "fill"]
        assert not world.stage.in_use()

    def test_three_of_decompress_workers_single_out_the_chunk_that_kills_them(self, world: World) -> None:
        workers(world, decompress=0)
        world.ask(A, 1, world.far, 4, 2)
        world.ask(A, 2, world.far, 4, 1)
        world.pump()
        world.fetched(b"fetch-0")
        deaths = 0
        while world.open:
            world.worker("decompress", b"d%d" % deaths)
            world.pump()
            identity = b"d%d" % deaths
            if 5 in world.sent[identity]["chunks"]:
                world.kill(identity)
            else:
                world.filled(identity)
                world.kill(identity)
            deaths += 1
        assert sorted(codes(world)) == [(1, errno.EIO), (2, 0)]
        assert not world.stage.in_use()

    def test_three_of_fetch_workers_fail_the_request(self, world: World) -> None:
        workers(world, fetch=0)
        world.ask(A, 1, world.far, 4, 1)
        for number in range(3):
            world.worker("fetch", b"f%d" % number)
            world.pump()
            world.kill(b"f%d" % number)
        assert codes(world) == [(1, errno.EIO)]
        assert not world.stage.in_use()


class TestRoom:
    def test_users_transfer_in_line_goes_before_read_ahead(self, world: World) -> None:
        ahead = list(range(CHUNKS))
        world.far_batch.chunk_map.check_ready_and_mark_pending(ahead)
        world.transfers.start(world.far_batch, ahead, Priority.AHEAD)
        assert world.transfers.waiting()
        world.ask(A, 1, world.far, 23, 1)
        world.settle()
        order = [message["handle"] for message in world.dispatched if message["kind"] == "fetch"]
        place = order.index(world.far.handle)
        assert 0 < place < len(order) - 1
        assert codes(world) == [(1, 0)]

    def test_chunk_larger_than_the_stage_gets_an_error_that_names_the_setting(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        world.stage._size = 4096
        world.ask(A, 1, world.far, 3, 1)
        assert codes(world) == [(1, errno.ENOMEM)]
        assert "shared memory: raise nydusd.arena_size" in caplog.text
        assert not world.far.jobs

    def test_that_has_no_memory_is_waited_for_while_others_have_some(self, world: World) -> None:
        workers(world, fetch=4)
        world.memory = 16 << 10
        for number in range(CHUNKS):
            world.ask(A, number, world.far, number, 1)
        assert 0 < len(fetching(world)) < 4 and world.transfers.waiting()
        world.settle()
        assert sorted(codes(world)) == [(number, 0) for number in range(CHUNKS)]

    def test_that_has_memory_for_a_part_of_a_request_is_used_for_one_part_after_the_other(
        self, greedy: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transfers, "MIN_REQUEST", 4 << 10)
        workers(greedy)
        greedy.memory = 8 << 10
        greedy.ask(A, 1, greedy.far, 4, 2)
        assert fetching(greedy) == [[4]]
        greedy.settle()
        assert codes(greedy) == [(1, 0)]

    def test_that_has_no_memory_is_asked_for_again_while_readers_have_time(self, world: World) -> None:
        workers(world)
        world.memory = 0
        for number in range(CHUNKS):
            world.ask(A, number, world.far, number, 1)
        assert codes(world) == [] and not world.transfers.waiting()
        world.memory = 1 << 20
        world.settle()
        assert sorted(codes(world)) == [(number, 0) for number in range(CHUNKS)]

    def test_that_readers_keep_is_given_up_for_what_goes_to_a_cache_file(self, world: World) -> None:
        workers(world)
        world.ask(A, 1, world.far_dummy, 0, 3)
        world.settle()
        assert codes(world) == [(1, 0)] and world.slots.in_use() and not world.slots.held()
        world.memory = 16 << 10
        world.ask(A, 2, world.far, 0, 1)
        assert fetching(world) == [[0]]
        world.settle()
        assert codes(world) == [(1, 0), (2, 0)]

    def test_stage_that_cannot_be_made_fails_the_read_and_leaves_nothing(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        world.stage._size = 1 << 60
        world.ask(A, 1, world.far, 0, 1)
        assert codes(world) == [(1, errno.ENOMEM)]
        assert not world.far.jobs


class TestPrefetch:
    def test_takes_all_workers_but_one_and_none_while_a_user_waits(self, world: World) -> None:
        workers(world, fetch=3)
        world.prefetch.want(world.far, 0, -1)
        world.pump()
        world.pump()
        assert len(fetching(world)) == 2
        world.ask(A, 1, world.far_batch, 0, 1)
        world.pump()
        for identity, message in list(world.sent.items()):
            if message["kind"] == "fetch" and message["prefetch"]:
                world.fetched(identity)
        world.pump()
        assert not any(message.get("prefetch") for message in world.sent.values())
        world.settle()
        assert world.far.chunk_map.is_all_ready()

    def test_that_fails_is_told_to_nobody_and_does_not_count_against_a_user(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        workers(world)
        world.prefetch.want(world.far, 0, 1)
        world.pump()
        world.done(b"fetch-0", error("BackendUnavailableError"))
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        world.ask(A, 1, world.far, 0, 1)
        world.settle()
        assert codes(world) == [(1, 0)]

    def test_that_fails_while_a_user_has_come_to_wait_is_tried_again_for_him(self, world: World) -> None:
        workers(world)
        world.prefetch.want(world.far, 0, 1)
        world.pump()
        assert world.sent[b"fetch-0"]["prefetch"]
        world.ask(A, 1, world.far, 0, 1)
        world.done(b"fetch-0", error("ThrottledError"))
        world.pump()
        assert not world.sent[b"fetch-0"]["prefetch"]
        world.settle()
        assert codes(world) == [(1, 0)]


def test_neighbour_behind_the_end_of_a_cut_off_blob_does_not_fail_what_is_asked_for(greedy: World) -> None:
    workers(greedy)
    greedy.ask(A, 1, greedy.far, 4, 1)
    assert fetching(greedy) == [[4, 5]]
    greedy.done(b"fetch-0", error("RangeNotSatisfiableError"))
    assert fetching(greedy) == [[4]]
    greedy.settle()
    assert codes(greedy) == [(1, 0)]


def test_chunk_that_kills_whoever_fetches_it_does_not_fail_its_neighbours(greedy: World) -> None:
    workers(greedy)
    greedy.ask(A, 1, greedy.far, 4, 1)
    assert fetching(greedy) == [[4, 5]]
    greedy.done(b"fetch-0", error("WorkerDied"))
    assert fetching(greedy) == [[4]]
    greedy.done(b"fetch-0", error("WorkerDied"))
    assert codes(greedy) == [(1, errno.EIO)]
    greedy.settle()
    greedy.ask(A, 2, greedy.far, 5, 1)
    greedy.settle()
    assert codes(greedy) == [(1, errno.EIO), (2, 0)]


def test_chunk_that_the_cache_file_may_hold_is_looked_for_there_first(world: World) -> None:
    world.far.state = "new"
    world.worker("fetch", b"f")
    world.router.open_blob(world.far)
    world.pump()
    world.prepared(b"f", ready=[0, 1])
    world.worker("decompress", b"d")
    world.ask(A, 1, world.far, 0, 2)
    world.pump()
    assert world.sent[b"d"]["verify"] == [0, 1]
    assert world.sent[b"d"]["source"] is None
    world.filled(b"d", failed=[1])
    world.kill(b"f")
    world.settle()
    assert codes(world) == [(1, 0)]
    fetched = [message["chunks"] for message in world.dispatched if message["kind"] == "fetch"]
    assert fetched == [[1]]


def test_hint_of_a_sequential_reader_fetches_more_and_is_not_answered(greedy: World) -> None:
    workers(greedy)
    greedy.ask(A, 1, greedy.far, 0, 1)
    greedy.settle()
    ready = greedy.far.chunk_map.ready_count()
    assert 0 < ready < CHUNKS
    greedy.router.request(A, 2, greedy.far.handle, ready - 1, 1, AHEAD)
    assert {job.priority for job in greedy.far.jobs.values()} == {Priority.AHEAD}
    greedy.router.request(A, 3, 999, 0, 1, AHEAD)
    greedy.settle()
    assert codes(greedy) == [(1, 0)]
    assert greedy.far.chunk_map.ready_count() > ready


def test_slow_server_gets_no_longer_requests_than_it_answers_in_a_moment(world: World) -> None:
    world.stage._size = 64 << 20
    window = 16 << 20
    workers(world, fetch=4)
    assert world.transfers.request_bytes(world.far, window) == 16 << 10, "nothing is known of the server yet"

    def after(milliseconds: float) -> int:
        for number in range(30):
            world.far.chunk_map.forget(0)
            world.ask(A, 1000 + number, world.far, 0, 1)
            world.pump()
            (identity,) = [name for name, message in world.sent.items() if message["kind"] == "fetch"]
            world.fetched(identity, milliseconds)
            world.settle()
        return world.transfers.request_bytes(world.far, window)

    assert after(1.0) == pytest.approx(4096e3 / 4, rel=0.1)
    assert after(1000.0) == 16 << 10
