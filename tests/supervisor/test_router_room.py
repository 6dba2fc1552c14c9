"""The router when there is no room: on the disk of the cache folder, or in shared memory."""

from __future__ import annotations

import errno

import pytest

from nydusd.formats.model import ChunkFlag
from nydusd.ipc.messages import LOST
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.state.segment import RECORD
from tests.supervisor.router_readers import A, B, codes, full_disk
from tests.supervisor.world import CHUNKS, World


class TestFullDisk:
    def test_readers_get_their_chunks_in_shared_memory_and_the_disk_is_tried_again(self, world: World) -> None:
        world.worker("decompress", b"w")
        full_disk(world)
        world.ask(A, 1, world.plain, 0, 2)
        world.fill_next()
        (_, _, code, slot) = world.answers[-1]
        assert (code, [chunk for chunk, _, _ in slot.chunks if slot]) == (0, [0, 1]) if slot else False
        assert not world.plain.chunk_map.is_ready(0)
        world.clock.now += 31
        world.ask(A, 2, world.plain, 0, 2)
        while world.sent or world.decompress.queued():
            world.fill_next()
        assert codes(world)[-1] == (2, 0)
        assert world.plain.chunk_map.is_ready(0)
        assert world.plain.no_room_until == 0

    def test_where_the_kernel_reads_the_file_they_get_an_error_and_the_disk_is_tried_again_soon(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        world.worker("decompress", b"w")
        world.plain.pinned = True
        for number in range(2):
            world.ask(A, number, world.plain, CHUNKS - 1, 1)
            world.fill_next(unstored=range(CHUNKS))
            assert codes(world).pop() == (number, errno.ENOSPC)
            world.ask(A, 10 + number, world.plain, 0, 1)
            assert codes(world).pop() == (10 + number, errno.ENOSPC), "at once"
            assert not world.sent and not world.decompress.queued() and not world.leases
            world.clock.now += 1.1
        assert world.plain.prefetch_at > world.clock.now, "nothing is fetched for nobody meanwhile"
        assert "reads of what is not cached fail until it can be used" in caplog.text
        world.ask(A, 20, world.plain, 0, 1)
        assert 0 in world.plain.jobs
        world.settle()
        assert codes(world).pop() == (20, 0)
        assert world.plain.no_room_until == 0

    @pytest.mark.parametrize("name", ["plain", "far"])
    def test_where_the_kernel_reads_the_file_what_no_file_refers_to_is_fetched_only_when_it_asks_for_that(
        self, world: World, name: str
    ) -> None:
        """Nothing is there to check it by, and others may have checked what is there."""
        blob: BlobCache = getattr(world, name)
        blob.pinned = True
        assert blob.segment is not None
        for chunk in range(1, CHUNKS):
            record = blob.segment.record(chunk)
            unlisted = record._replace(flags=record.flags | ChunkFlag.UNLISTED)
            RECORD.pack_into(blob.segment.records, chunk * RECORD.size, *unlisted)
        for number, chunk in enumerate((0, 5)):
            world.ask(A, number, blob, chunk, 1)
            world.prefetch.want(blob, 0, -1)
            world.router.prefetch()
            world.settle()
        assert codes(world) == [(0, 0), (1, 0)]
        assert [chunk for chunk in range(CHUNKS) if blob.chunk_map.is_ready(chunk)] == [0, 5]

    def test_one_warning_however_long_it_lasts(self, world: World, caplog: pytest.LogCaptureFixture) -> None:
        world.worker("decompress", b"w")
        full_disk(world)
        world.clock.now += 31
        full_disk(world, chunk=CHUNKS - 2)
        assert [r.levelname for r in caplog.records].count("WARNING") == 1

    def test_chunk_kept_in_shared_memory_is_not_fetched_again(self, world: World) -> None:
        world.worker("decompress", b"w")
        full_disk(world)
        world.ask(A, 1, world.plain, 0, 1)
        world.fill_next()
        world.router.release(world.leases.pop())
        world.ask(B, 2, world.plain, 0, 1)
        assert codes(world) == [(1, 0), (2, 0)]
        assert not world.decompress.queued()

    def test_chunk_given_up_before_its_reader_had_it_is_fetched_again(self, world: World) -> None:
        world.worker("decompress", b"w")
        full_disk(world)
        world.ask(A, 1, world.plain, 0, 1)
        world.pump()
        world.clock.now += 31  # the next one waits for the job of the first, and holds nothing
        world.ask(B, 2, world.plain, 0, 2)
        world.filled(b"w")
        world.router.release(world.leases.pop())
        assert world.slots.clear_unused()
        world.settle()
        assert sorted(codes(world)) == [(1, 0), (2, 0)]

    def test_prefetch_waits_until_there_is_room(self, world: World) -> None:
        world.worker("decompress", b"w")
        full_disk(world)
        world.prefetch.want(world.plain, 0, 1)
        world.pump()
        assert not world.sent
        assert world.prefetch.wait(world.clock.now) == 30
        world.clock.now += 31
        world.pump()
        assert world.sent[b"w"]["chunks"] == [0]


class TestSharedMemory:
    def test_two_readers_that_both_fit_only_alone_are_served_one_after_the_other(self, world: World) -> None:
        world.worker("decompress", b"w")
        world.ask(A, 1, world.dummy, 0, 4)  # 56 of 64 KiB
        world.ask(B, 2, world.dummy, 4, 4)
        while world.sent or world.decompress.queued():
            world.fill_next()
        assert codes(world) == [(1, 0)]
        world.router.release(world.leases.pop())
        while world.decompress.queued():
            world.fill_next()
        assert codes(world) == [(1, 0), (2, 0)]

    def test_big_reader_in_line_is_not_overtaken(self, world: World) -> None:
        world.worker("decompress", b"w")
        world.ask(A, 1, world.dummy, 0, 2)
        world.ask(A, 2, world.dummy, 4, 4)
        world.ask(B, 3, world.dummy, 8, 1)
        assert len(world.router._room._line) == 2

    def test_client_that_dies_makes_room(self, world: World) -> None:
        world.worker("decompress", b"w")
        world.ask(A, 1, world.dummy, 0, 4)
        while world.sent or world.decompress.queued():
            world.fill_next()
        world.ask(B, 2, world.dummy, 4, 4)
        assert not world.decompress.queued()
        world.router.drop_client(A)
        assert world.decompress.queued()

    def test_read_that_can_never_fit_is_told_so(self, world: World, caplog: pytest.LogCaptureFixture) -> None:
        world.ask(A, 1, world.dummy, 0, 6)
        assert codes(world) == [(1, errno.ENOMEM)]
        assert "shared memory: raise nydusd.arena_size" in caplog.text
        world.ask(A, 2, world.dummy, 0, 1)
        world.settle()
        assert codes(world)[-1] == (2, 0)

    def test_arena_that_cannot_be_made_fails_the_read_and_leaves_nothing(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world.slots._size = 1 << 60
        world.ask(A, 1, world.dummy, 0, 1)
        assert codes(world) == [(1, errno.ENOMEM)]
        assert not world.dummy.jobs
        world.slots._size = 64 << 10
        world.ask(A, 2, world.dummy, 0, 1)
        world.settle()
        assert codes(world)[-1] == (2, 0)

    def test_arena_in_pieces_is_cleared_for_who_needs_more_than_a_piece(self, world: World) -> None:
        world.worker("decompress", b"w")
        for number, first in enumerate((0, 1, 2)):  # regions of 8, 12 and 16 KiB
            world.ask(A, number, world.dummy, first, 1)
            world.fill_next()
            world.router.release(world.leases.pop())
        world.ask(A, 9, world.dummy, 1, 4)  # 12 + 16 + 20 + 8, of which 28 are there, in the middle
        world.settle()
        assert codes(world)[-1] == (9, 0)

    def test_reopened_blob_gives_back_what_its_queued_jobs_held(self, world: World) -> None:
        world.worker("decompress", b"w")
        full_disk(world)
        world.worker("decompress", b"w2")
        world.ask(A, 1, world.plain, 0, 4)
        world.ask(B, 2, world.plain, 4, 4)
        world.ask(B, 3, world.plain, 20, 1, LOST)
        world.clock.now += 31
        world.settle()
        assert sorted(codes(world)) == [(1, 0), (2, 0), (3, 0)]
