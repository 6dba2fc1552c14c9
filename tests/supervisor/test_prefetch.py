"""Prefetch: what it takes, when, how fast, and that it costs nothing while there is nothing to do."""

from __future__ import annotations

import pytest

from nydusd.storage.cache import prefetch
from nydusd.storage.cache.pace import Limiter
from tests.supervisor.world import CHUNKS, World


class TestLimiter:
    def test_without_a_rate_never_waits(self) -> None:
        limiter = Limiter(0)
        limiter.spend(0.0, 1 << 40)
        assert limiter.wait(0.0) == 0

    @pytest.mark.parametrize("piece", [1000, 64 << 10, 1 << 20, 10 << 20])
    def test_keeps_the_rate_whatever_the_size_of_a_piece(self, piece: int) -> None:
        limiter, now, done = Limiter(1 << 20), 0.0, 0
        while now < 100:
            assert limiter.wait(now) == 0
            limiter.spend(now, piece)
            done += piece
            now += limiter.wait(now)
        assert abs(done - (100 << 20)) <= 2 * piece + (1 << 20)

    def test_saves_up_no_more_than_a_tenth_of_a_second(self) -> None:
        limiter = Limiter(1000)
        assert limiter.wait(1e6) == 0
        limiter.spend(1e6, 100)
        assert limiter.wait(1e6) == 0
        limiter.spend(1e6, 100)
        assert limiter.wait(1e6) == pytest.approx(0.1)

    def test_users_reads_are_counted(self) -> None:
        limiter = Limiter(1000)
        limiter.spend(0.0, 5100)
        assert limiter.wait(0.0) == pytest.approx(5)


def drain(world: World) -> list[int]:
    """All chunks that are fetched while nothing but jobs ends, in order."""
    fetched = []
    world.worker("decompress", b"w")
    world.pump()
    while world.sent:
        fetched += world.fill_next()
        world.pump()
    return fetched


def test_fetches_all_that_is_wanted_and_missing_in_order(world: World) -> None:
    world.plain.chunk_map.set_ready(2)
    world.prefetch.want(world.plain, 10, 2)
    world.prefetch.want(world.plain, 0, -1)
    fetched = drain(world)
    assert fetched[:2] == [10, 11]
    assert sorted(fetched) == [chunk for chunk in range(CHUNKS) if chunk != 2]
    assert world.prefetch.idle()


def test_takes_units_whole_and_once(world: World) -> None:
    world.prefetch.want(world.batch, 4, 3)
    assert drain(world) == [3, 4, 5, 6, 7, 8]


def test_skips_a_chunk_that_has_just_failed(world: World) -> None:
    world.plain.failed(1, 5)
    world.prefetch.want(world.plain, 0, 3)
    assert drain(world) == [0, 2]


def test_blob_that_fails_to_open_is_tried_again_and_then_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    try:
        world.worker("fetch", b"f")
        world.worker("decompress", b"w")
        world.prefetch.want(world.plain, 0, 2)
        world.pump()
        assert world.prefetch.wait(world.clock.now) is None  # it is being opened: an event will come
        world.fail(b"f")
        for delay in (1, 2):
            world.pump()
            assert not world.sent
            assert world.prefetch.wait(world.clock.now) == delay
            world.clock.now += delay
            world.pump()
            world.fail(b"f")
        world.clock.now += 4
        world.pump()
        world.prepared(b"f")
        assert world.fill_next() == [0, 1]
        world.pump()
        assert world.prefetch.idle()
        assert world.prefetch.wait(world.clock.now) is None
    finally:
        world.close()


def test_looking_for_work_does_not_go_through_the_list_of_a_blob_that_is_not_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    try:
        for chunk in range(1000):
            world.prefetch.want(world.plain, chunk % CHUNKS, 1)
        assert world.prefetch.take(0.0) is None
        assert not world.prefetch._queues
        assert list(world.prefetch.aside()) == [world.plain]
        world.prefetch.cancel(world.plain)
        assert world.prefetch.idle()
    finally:
        world.close()


def test_many_chunks_of_which_none_is_to_be_fetched_are_looked_at_piece_by_piece(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hostile blob has sixteen million of them, and who is served by the same daemon must not wait for that."""
    monkeypatch.setattr(prefetch, "_LOOK_MOST", 4)
    for chunk in range(10):
        world.plain.chunk_map.set_ready(chunk)
    for chunk in range(3):
        world.prefetch.want(world.plain, chunk, 1)
    world.prefetch.want(world.plain, 0, 12)
    world.worker("decompress", b"w")
    for _ in range(3):
        world.pump()
        assert not world.sent and not world.prefetch.idle()
        assert world.prefetch.wait(world.clock.now) == 0, "it is gone on with"
    assert drain(world) == [10, 11]
    assert world.prefetch.idle() and world.prefetch.wait(world.clock.now) is None


def test_rate_is_kept_and_users_do_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, bandwidth=10_000)
    try:
        world.open_all()
        world.prefetch.want(world.plain, 0, -1)
        begun = world.clock.now
        world.worker("decompress", b"w")
        world.pump()
        batches = 0
        while not world.prefetch.idle():
            while world.sent:
                world.fill_next()
                world.pump()
            wait = world.prefetch.wait(world.clock.now)
            if not world.prefetch.idle():
                assert wait is not None
                world.clock.now += wait
            batches += 1
            world.pump()
        assert batches > 1
        spent = sum(8192 + chunk % 4 * 4096 for chunk in range(CHUNKS)) / 2
        assert world.clock.now - begun >= (spent - 40_000) / 10_000  # the last batch is paid for later
        world.ask(b"fuse-0-1", 1, world.batch, 0, 1)
        world.settle()
        assert [code for _, _, code, _ in world.answers] == [0]
    finally:
        world.close()


def test_user_goes_before_queued_prefetch(world: World) -> None:
    world.prefetch.want(world.plain, 0, -1)
    world.worker("decompress", b"w")
    world.pump()
    world.ask(b"fuse-0-1", 1, world.batch, 0, 1)
    world.filled(b"w")
    world.pump()
    assert world.cache_of(b"w") is world.batch
