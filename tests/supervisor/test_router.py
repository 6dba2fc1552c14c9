"""The router in single situations that need an exact order of events."""

from __future__ import annotations

import errno
import signal
from typing import cast

import pytest

from nydusd.formats.model import ChunkFlag
from nydusd.ipc.messages import LOST, SYNC
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Priority
from nydusd.storage.state.lock import BlobLock
from nydusd.storage.state.segment import PENDING, READY, RECORD
from nydusd.supervisor.engine import Engine
from tests.supervisor.world import CHUNKS, World
from tests.support.segments import die_at, in_child, join

A, B = b"fuse-0-1", b"fuse-1-1"


def codes(world: World) -> list[tuple[int, int]]:
    """(number, errno) of the answers so far, in order."""
    return [(number, code) for _client, number, code, _slot in world.answers]


def full_disk(world: World, chunk: int = CHUNKS - 1) -> None:
    """From now on, chunks of `plain` find no room in the cache folder."""
    world.ask(A, 900, world.plain, chunk, 1)
    world.fill_next(unstored=range(CHUNKS))
    world.fill_next()
    world.router.release(world.leases.pop())
    assert world.plain.uses_slots
    world.answers.clear()


def test_a_handle_that_no_blob_has_is_said_to_be_stale_or_known_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[tuple[int, int]] = []
    monkeypatch.setattr(world.router, "_reply", lambda _client, number, code, _slot: answers.append((number, code)))
    world.router.unknown = lambda handle: handle == 4712  # there was no file descriptor for it
    world.router.request(A, 1, 4711, 0, 1, 0)
    world.router.request(A, 2, 4712, 0, 1, 0)
    assert answers == [(1, errno.ESTALE)]


def test_what_was_given_for_a_request_that_is_cancelled_is_free_though_nobody_looks_for_the_answer(
    world: World,
) -> None:
    world.worker("decompress", b"w")
    world.ask(A, 1, world.dummy, 0, 1)
    world.fill_next()
    assert codes(world) == [(1, 0)] and world.slots.held() == 1
    world.router.cancel(A, 1)
    assert world.slots.held() == 0


def test_many_readers_of_a_chunk_are_one_job(world: World) -> None:
    world.worker("decompress", b"w")
    for number in range(50):
        world.ask(A if number % 2 else B, number, world.plain, 0, 1)
    jobs = []
    while world.decompress.queued() or world.sent:
        jobs.append(world.fill_next())
    assert sorted(codes(world)) == [(number, 0) for number in range(50)]
    assert [0 in job for job in jobs].count(True) == 1


@pytest.mark.parametrize("point", ["lock: taken", "lock: record cleared"])
def test_supervisor_that_succeeds_one_killed_over_a_claim_does_not_wait_for_it(
    world: World, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    def claim() -> None:
        die_at(point)
        world.ask(A, 1, world.plain, 0, 1)

    def waited(*_: object) -> bool:
        raise AssertionError("it is waited for a dead supervisor")

    monkeypatch.setattr(BlobLock, "_is_dead", staticmethod(waited))
    assert join(in_child(claim)) == -signal.SIGKILL
    world.succeed()
    world.ask(A, 1, world.plain, 0, 1)
    world.settle()
    assert codes(world) == [(1, 0)]


def test_failure_is_told_to_all_who_wait_and_remembered_for_a_while(world: World) -> None:
    world.worker("decompress", b"w")
    world.ask(A, 1, world.plain, 0, 1)
    world.ask(B, 2, world.plain, 0, 1)
    world.fill_next(failed=[0])
    assert codes(world) == [(1, errno.EIO), (2, errno.EIO)]
    world.ask(A, 3, world.plain, 0, 1)
    assert codes(world)[2:] == [(3, errno.EIO)]
    world.clock.now += 0.11
    world.ask(A, 4, world.plain, 0, 1)
    assert (A, 4) in world.open
    world.settle()
    assert codes(world)[3:] == [(4, 0)]


def test_chunk_that_fails_spares_its_neighbours(world: World) -> None:
    world.worker("decompress", b"w")
    world.ask(A, 1, world.plain, 0, 2)
    world.ask(A, 2, world.plain, 1, 1)
    world.ask(B, 3, world.plain, 0, 1)
    assert world.fill_next(failed=[1]) == [0, 1]
    assert sorted(codes(world)) == [(1, errno.EIO), (2, errno.EIO), (3, 0)]


def test_failure_wins_over_a_chunk_that_must_be_fetched_again(world: World) -> None:
    world.worker("decompress", b"w")
    world.ask(A, 1, world.plain, 0, 2)
    world.fill_next(failed=[0], unstored=[1])
    assert codes(world) == [(1, errno.EIO)]
    assert world.plain.uses_slots


def test_three_deaths_single_out_the_chunk_that_kills_workers(world: World) -> None:
    world.ask(A, 1, world.plain, 0, 1)
    world.ask(A, 2, world.plain, 1, 1)
    deaths = 0

    def die_on(chunk: int) -> None:
        nonlocal deaths
        while True:
            world.worker("decompress", b"w%d" % deaths)
            world.pump()
            if not world.sent:
                return
            ((identity, message),) = world.sent.items()
            if chunk in message["chunks"]:
                deaths += 1
                world.kill(identity)
            else:
                world.filled(identity)
                world.kill(identity)

    world.clock.now += 1
    die_on(1)
    assert sorted(codes(world)) == [(1, 0), (2, errno.EIO)]
    assert deaths in (3, 4)  # three, and one more when it shared its job with another
    world.clock.now += 30  # long after any other failure would be tried again
    world.ask(A, 3, world.plain, 1, 1)
    assert codes(world)[-1] == (3, errno.EIO)
    world.clock.now += 31
    world.ask(A, 4, world.plain, 1, 1)
    assert 1 in world.plain.jobs


def test_job_of_a_dead_worker_goes_first(world: World) -> None:
    world.worker("decompress", b"w1")
    world.ask(A, 1, world.plain, 0, 1)
    world.pump()
    world.ask(A, 2, world.plain, 20, 1)
    world.kill(b"w1")
    world.worker("decompress", b"w2")
    world.pump()
    assert world.sent[b"w2"]["chunks"][0] == 0


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


def test_unit_is_decoded_once_and_as_a_whole(world: World) -> None:
    world.ask(A, 1, world.batch, 4, 1)
    world.ask(A, 2, world.batch, 5, 1)
    users = [job for job, _ in world.jobs() if job.priority is Priority.USER]
    assert [job.chunks for job in users] == [[3, 4, 5]]


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
