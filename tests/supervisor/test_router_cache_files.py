"""The router while a cache file is being opened, could not be opened, or is lost."""

from __future__ import annotations

import errno

import pytest

from nydusd.ipc.messages import LOST
from nydusd.storage.state.segment import PENDING
from tests.supervisor.router_readers import A, B, codes
from tests.supervisor.world import World


class TestLostCacheFile:
    def test_is_opened_anew_and_then_all_are_served(self, world: World) -> None:
        world.worker("decompress", b"w")
        world.ask(A, 1, world.plain, 0, 1)
        world.ask(B, 2, world.plain, 20, 1)
        world.pump()
        world.stale(b"w")
        assert world.plain.state == "preparing"
        assert not world.plain.jobs
        world.ask(A, 3, world.plain, 10, 1)
        world.settle()
        assert sorted(codes(world)) == [(1, 0), (2, 0), (3, 0)]
        assert world.plain.spec.generation == 2

    def test_that_a_reader_reports_is_opened_anew_once_for_all_readers(self, world: World) -> None:
        world.ask(A, 1, world.plain, 0, 1, LOST)
        world.ask(B, 2, world.plain, 0, 1, LOST)
        world.ask(B, 2, world.plain, 0, 1, LOST)
        world.settle()
        assert sorted(codes(world)) == [(1, 0), (2, 0)]
        assert world.plain.spec.generation == 2

    def test_report_of_an_old_job_changes_nothing_in_the_new_file(self, world: World) -> None:
        world.worker("decompress", b"old")
        world.ask(A, 1, world.plain, 0, 1)
        world.pump()
        world.ask(B, 2, world.plain, 20, 1, LOST)
        world.worker("fetch", b"f")
        world.pump()
        world.prepared(b"f")
        world.worker("decompress", b"new")
        world.pump()
        assert 0 in world.sent[b"new"]["chunks"]
        world.filled(b"old")
        assert world.plain.chunk_map.states()[0] == PENDING
        assert (A, 1) in world.open
        world.settle()
        assert sorted(codes(world)) == [(1, 0), (2, 0)]

    def test_that_is_lost_all_the_time_ends_with_an_error(self, world: World) -> None:
        world.worker("decompress", b"w")
        world.worker("fetch", b"f")
        world.ask(A, 1, world.plain, 0, 1)
        for _ in range(100):
            world.pump()
            if b"f" in world.sent:
                world.prepared(b"f")
            elif b"w" in world.sent:
                world.stale(b"w")
        assert codes(world) == [(1, errno.EIO)]


class TestOpening:
    def test_failed_fails_those_who_wait_and_is_tried_again_after_a_back_off(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world = World(monkeypatch)
        try:
            world.worker("fetch", b"f")
            delays = []
            for number in range(8):
                world.ask(A, number, world.plain, 0, 1)
                world.pump()
                world.fail(b"f")
                delays.append(world.plain.retry_at - world.clock.now)
                world.ask(A, 100 + number, world.plain, 0, 1)
                world.clock.now = world.plain.retry_at
            assert delays == [1, 2, 4, 8, 16, 30, 30, 30]
            assert {code for _, code in codes(world)} == {errno.EIO}
            assert len(codes(world)) == 16
            world.ask(A, 200, world.plain, 0, 1)
            world.settle()
            assert codes(world)[-1] == (200, 0)
        finally:
            world.close()

    def test_of_a_segment_that_cannot_be_mapped_fails_and_hangs_nobody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = World(monkeypatch)
        try:
            world.worker("fetch", b"f")
            world.ask(A, 1, world.plain, 0, 1)
            world.pump()
            world.done(b"f", {"count": 1, "ready": 0})
            assert codes(world) == [(1, errno.EIO)]
            assert world.plain.state == "failed"
            world.clock.now += 2
            world.ask(A, 2, world.plain, 0, 1)
            world.settle()
            assert codes(world)[1:] == [(2, 0)]
        finally:
            world.close()
