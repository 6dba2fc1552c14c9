"""When the router has checkpoints made, and what it says of them to who waits for the disk."""

from __future__ import annotations

import errno
from typing import cast

import pytest

from nydusd.ipc.messages import LOST, SYNC
from nydusd.storage.state.segment import READY
from nydusd.supervisor.engine import Engine
from tests.supervisor.router_readers import A, B, codes
from tests.supervisor.world import World


class TestCheckpoint:
    def test_is_made_when_chunks_were_added_and_not_else(self, world: World) -> None:
        assert world.router.checkpoint() == 0
        world.ask(A, 1, world.plain, 0, 1)
        world.settle()
        assert world.router.checkpoint() == 1
        assert world.router.checkpoint() == 1
        world.settle()
        assert world.router.checkpoint() == 0

    def test_is_made_of_chunks_that_a_killed_daemon_left_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = World(monkeypatch)
        try:
            world.worker("fetch", b"f")
            world.router.open_blob(world.plain)
            world.pump()
            world.prepared(b"f", ready=[1, 2])
            assert world.router.checkpoint() == 1
        finally:
            world.close()

    def test_that_fails_is_not_repeated_until_there_is_more(self, world: World) -> None:
        world.ask(A, 1, world.plain, 0, 1)
        world.settle()
        world.worker("fetch", b"f")
        world.router.checkpoint()
        world.pump()
        (identity,) = world.sent
        world.done(identity, {"error": "disk", "errno": errno.EIO, "type": "CacheError"})
        assert world.router.checkpoint() == 0

    def test_tells_who_waits_for_the_disk_only_if_it_began_after_the_request(self, world: World) -> None:
        world.ask(A, 1, world.plain, 0, 1)
        world.settle()
        world.router.checkpoint()
        world.pump()
        (earlier,) = world.sent
        world.ask(A, 2, world.plain, 0, 1, SYNC)
        world.finish(earlier)
        assert codes(world) == [(1, 0)]
        assert world.router.checkpoint() == 1, "nothing is new, and somebody waits"
        world.pump()
        (identity,) = world.sent
        world.done(identity, {"error": "disk", "errno": errno.EIO, "type": "UnsyncedError"})
        assert codes(world)[1:] == [(2, errno.EIO)]
        world.ask(A, 3, world.plain, 0, 1, SYNC)
        world.settle()
        assert codes(world)[2:] == [(3, 0)], "at once, for there is nothing new to be stored"
        world.ask(A, 4, world.dummy, 0, 1, SYNC)
        assert codes(world)[3:] == [(4, errno.EIO)], "it has no file"

    def test_is_made_early_for_who_waits_for_the_disk_one_blob_at_a_time(self, world: World) -> None:
        world.worker("fetch", b"f")
        for blob in (world.plain, world.far):
            blob.chunk_map.states()[0] = READY
        world.ask(A, 1, world.plain, 0, 1, SYNC)
        world.ask(A, 2, world.far, 0, 1, SYNC)
        world.ask(B, 3, world.plain, 0, 1, SYNC)
        world.worker("fetch", b"g")
        world.router.tick()
        world.router.tick()
        world.pump()
        (first,) = world.sent
        world.clock.now += 2.0
        world.finish(first)
        assert codes(world) == [(1, 0), (3, 0)], "of one blob, and by one sync"
        assert world.router.checkpoints.wait(world.clock.now) == 2.0, "as long as it took"
        world.clock.now += 1.9
        world.router.tick()
        world.pump()
        assert not world.sent
        world.clock.now += 0.2
        world.router.tick()
        world.pump()
        (second,) = world.sent
        world.finish(second)
        assert codes(world)[2:] == [(2, 0)]
        assert world.router.checkpoints.wait(world.clock.now) is None

    def test_that_is_under_way_is_waited_for_before_all_is_left_to_a_successor_and_none_begins(
        self, world: World
    ) -> None:
        world.worker("fetch", b"f")
        world.plain.chunk_map.states()[0] = READY
        world.router.checkpoint()
        world.pump()
        (identity,) = world.sent
        world.far.chunk_map.states()[0] = READY
        world.router.checkpoint()
        turns = 0

        def turn(_seconds: float) -> None:
            nonlocal turns
            turns += 1
            if turns == 3:
                world.finish(identity)
            world.pump()

        Engine.come_to_rest(cast("Engine", world), turn)
        assert turns == 3
        assert world.plain.stored == 1 and world.far.stored == 0
        assert not world.sent, "that of the other blob is the successor's"

    def test_in_which_a_worker_of_a_killed_daemon_was_killed_is_made_at_once(self, world: World) -> None:
        world.worker("fetch", b"f")
        assert world.far.segment is not None
        world.far.segment.syncing[0] = 1
        world.router.checkpoints.resume()
        world.pump()
        assert [(message["kind"], message["handle"]) for message in world.dispatched] == [
            ("checkpoint", world.far.handle)
        ]
        world.settle()

    def test_tells_who_waits_for_the_disk_that_it_has_the_data_though_the_map_has_no_room(self, world: World) -> None:
        world.ask(A, 1, world.plain, 0, 1)
        world.settle()
        world.ask(A, 2, world.plain, 0, 1, SYNC)
        world.router.checkpoint()
        world.pump()
        (identity,) = world.sent
        world.done(identity, {"error": "full", "errno": errno.ENOSPC, "type": "CacheError", "synced": True})
        assert codes(world) == [(1, 0), (2, 0)]
        assert world.router.checkpoint() == 0, "the map is stored when there is more to store"

    def test_that_finds_the_file_deleted_makes_no_new_one_and_a_reader_does(self, world: World) -> None:
        world.ask(A, 1, world.plain, 0, 1)
        world.settle()
        world.router.checkpoint()
        world.pump()
        (identity,) = world.sent
        world.stale(identity)
        world.prefetch.want(world.plain, 1, 1)
        world.pump()
        assert not world.sent
        assert world.router.checkpoint() == 0
        world.ask(A, 2, world.plain, 0, 1)
        world.settle()
        assert sorted(codes(world)) == [(1, 0), (2, 0)]
        assert world.plain.chunk_map.is_ready(1), "prefetch goes on when a reader had the blob opened"

    def test_under_way_while_the_file_is_lost_says_nothing_of_the_new_one(self, world: World) -> None:
        world.ask(A, 1, world.plain, 0, 1)
        world.settle()
        world.router.checkpoint()
        world.pump()
        (identity,) = world.sent
        world.ask(A, 2, world.plain, 0, 1, LOST)
        world.done(identity, {"stored": 99})
        assert world.plain.stored != 99
        assert not world.plain.checkpointing
        world.settle()
