"""How far the router reads ahead, and a reader that runs into that."""

from __future__ import annotations

import pytest

from nydusd.storage.cache.requests import Priority
from tests.supervisor.router_readers import A, B
from tests.supervisor.world import CHUNKS, World


def test_reader_that_runs_into_the_read_ahead_raises_it(world: World) -> None:
    world.worker("decompress", b"w1")
    world.ask(A, 1, world.plain, 0, 1)
    ahead = world.plain.jobs[4]
    before = ahead.priority
    world.ask(A, 2, world.plain, 4, 1)
    assert (before, ahead.priority) == (Priority.AHEAD, Priority.USER)
    assert world.plain.jobs[4] is ahead
    assert world.fill_next() == [0]
    assert world.fill_next() == ahead.chunks


def test_job_that_a_reader_runs_into_while_it_is_done_is_a_readers_when_its_worker_dies(world: World) -> None:
    world.worker("decompress", b"w1")
    world.prefetch.want(world.plain, 0, 1)
    world.pump()
    world.ask(A, 1, world.plain, 0, 1)
    world.ask(B, 2, world.plain, 20, 1)
    world.kill(b"w1")
    world.worker("decompress", b"w2")
    world.pump()
    assert world.sent[b"w2"]["chunks"] == [0]


class TestReadAhead:
    def windows(self, world: World, starts: list[int]) -> list[int]:
        """The windows after misses at these chunks."""
        world.worker("decompress", b"w")
        found = []
        for number, first in enumerate(starts):
            world.ask(A, number, world.plain, first, 1)
            found.append(world.plain.ahead.window)
            world.settle()
        return found

    def test_doubles_for_a_sequential_reader_up_to_a_bound(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("nydusd.supervisor.launch._WINDOW_MOST", 100_000)
        misses: list[int] = []
        for number in range(CHUNKS):  # one that reads everything, and misses where the read-ahead ended
            if not world.plain.chunk_map.is_ready(number):
                world.ask(A, number, world.plain, number, 1)
                misses.append(world.plain.ahead.window)
                world.settle()
        assert misses[:2] == [40_000, 80_000]
        assert max(misses) <= 100_000

    def test_stays_small_for_a_random_reader(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("nydusd.storage.cache.ahead._NEAR", 0)
        assert self.windows(world, [23, 9, 0]) == [40_000] * 3

    def test_takes_no_chunk_that_has_just_failed(self, world: World) -> None:
        world.worker("decompress", b"w")
        world.ask(A, 1, world.plain, 3, 1)
        world.fill_next(failed=[3])
        world.ask(A, 2, world.plain, 2, 1)
        assert 3 not in world.plain.jobs
        assert 4 in world.plain.jobs


def test_nothing_is_read_ahead_when_amplify_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, amplify=0)
    try:
        world.open_all()
        world.ask(A, 1, world.plain, 2, 2)
        assert sorted(world.plain.jobs) == [2, 3]
    finally:
        world.close()
