"""Two images (or configurations) of one blob in one cache file: what is fetched for one is there for both, or gone for both."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nydusd.formats.model import ChunkFlag
from nydusd.ipc.messages import UNREADABLE
from nydusd.storage.api.factory import BlobFactory
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.manager import CacheConfig, Former
from nydusd.storage.cache.requests import Job, Priority
from nydusd.storage.state.segment import EMPTY, PENDING, READY, RECORD, VERIFY, Segment
from nydusd.supervisor.evictions import Evictions
from tests.supervisor.world import CHUNKS, World
from tests.support.blobs import blob_info

A, B = b"fuse-0-1", b"fuse-1-1"


def twin_of(world: World, *, of: BlobCache | None = None, verify: bool = False) -> BlobCache:
    """The blob `plain` or another one as a second image has it, opened; `verify`: with `digest_validate`."""
    first = world.plain if of is None else of
    config = CacheConfig(first.spec.backend, {"secret": "of the test"}, "/cache", verify)
    info = replace(blob_info(), blob_id=first.spec.info.blob_id)
    twin = world.factory.new_blob_cache(config, info, "another image", "/boot2", "", False)
    twin.paces.append(world.pace)
    assert twin is not first and twin.kin == [first, twin]
    world.worker("fetch", b"opener")
    world.router.open_blob(twin)
    world.pump()
    world.prepared(b"opener")
    world.kill(b"opener")
    world.dispatched.clear()
    return twin


@pytest.fixture
def pair(world: World) -> tuple[World, BlobCache, BlobCache]:
    """`plain`, and the same blob as another image has it."""
    twin = twin_of(world)
    world.worker("decompress", b"w")
    return world, world.plain, twin


def codes(world: World) -> list[tuple[bytes, int, int]]:
    return [(client, number, code) for client, number, code, _slot in world.answers]


def test_same_image_is_one_cache_and_another_one_is_not(world: World) -> None:
    config = CacheConfig("localfs", {"secret": "of the test"}, "/cache", False)
    info = replace(blob_info(), blob_id="plain")
    assert world.factory.new_blob_cache(config, info, "image of /boot", "/boot", "", False) is world.plain
    world.plain.users -= 1


def test_caches_of_two_credentials_that_have_become_the_same_keep_their_names() -> None:
    """Front ends that have outlived a supervisor ask by these; a third image has shared one of them all along."""
    info = blob_info()
    older, newer = (CacheConfig("s3", {"access_key": key}, "/cache", False) for key in ("older", "newer"))

    def known(factory: BlobFactory, config: CacheConfig, former: Former | None = None) -> BlobCache:
        return factory.new_blob_cache(config, info, "image", "/boot", "", False, former)

    before = BlobFactory("of-two", "/nonexistent")
    names = [Former(cache.handle, cache.spec.segment) for cache in (known(before, older), known(before, newer))]
    assert names[0].handle != names[1].handle and names[0].segment != names[1].segment
    after = BlobFactory("of-two", "/nonexistent")
    after.begin(1 << 32)
    caches = [known(after, newer, former) for former in names]
    assert [Former(cache.handle, cache.spec.segment) for cache in caches] == names
    assert [after.get(former.handle) for former in names] == caches
    assert [known(after, newer, names[1]), known(after, older, names[0])] == caches[::-1]
    assert known(after, newer) in caches
    for cache in caches:
        cache.users = 0
    assert after.gc() == caches and not list(after.blobs())


def test_chunk_that_another_image_has_is_not_fetched(pair: tuple[World, BlobCache, BlobCache]) -> None:
    world, plain, twin = pair
    world.ask(A, 1, plain, 3, 2)
    world.settle()
    jobs = len(world.dispatched)
    world.ask(B, 1, twin, 3, 2)
    assert codes(world) == [(A, 1, 0), (B, 1, 0)]
    assert len(world.dispatched) == jobs
    assert twin.chunk_map.is_ready(3) and twin.chunk_map.is_ready(4)


def test_chunk_on_its_way_for_another_image_is_waited_for(pair: tuple[World, BlobCache, BlobCache]) -> None:
    world, plain, twin = pair
    world.ask(A, 1, plain, 0, 1)
    world.ask(B, 1, twin, 0, 1)
    assert all(job.kind == "follow" for job in twin.jobs.values())
    while world.sent or world.decompress.queued():
        world.fill_next()
        world.router.tick()
    assert codes(world) == [(A, 1, 0), (B, 1, 0)]
    fetched = [chunk for message in world.dispatched for chunk in message["chunks"]]
    assert len(fetched) == len(set(fetched))


def test_who_waited_for_another_image_in_vain_has_it_fetched(pair: tuple[World, BlobCache, BlobCache]) -> None:
    """The other one's cache file turns out to be another, or its chunk is damaged."""
    world, plain, twin = pair
    world.ask(A, 1, plain, 0, 1)
    world.ask(B, 1, twin, 0, 1)
    world.fill_next(failed=[0])
    world.router.tick()
    world.settle()
    assert [(client, code != 0) for client, _, code in codes(world)] == [(A, True), (B, False)]
    world.router.tick()
    assert not plain.followers


def test_chunks_that_are_not_listed_are_fetched_for_nobody_else(pair: tuple[World, BlobCache, BlobCache]) -> None:
    """Read-ahead leaves them out; who asks for one gets it in shared memory."""
    world, plain, _twin = pair
    assert plain.segment is not None
    record = plain.segment.record(1)
    at = 40 + 24
    plain.segment.records[at : at + 4] = (record.flags | 0x40).to_bytes(4, "little")
    world.ask(A, 1, plain, 0, 1)
    world.settle()
    assert plain.chunk_map.is_ready(0) and plain.chunk_map.is_ready(2) and not plain.chunk_map.is_ready(1)
    world.ask(A, 2, plain, 1, 1)
    world.settle()
    assert codes(world) == [(A, 1, 0), (A, 2, 0)] and not plain.chunk_map.is_ready(1)


def test_chunk_that_cannot_be_read_is_not_taken_from_another_image(pair: tuple[World, BlobCache, BlobCache]) -> None:
    """It lies at the same place of the same disk."""
    world, plain, twin = pair
    for cache in (plain, twin):
        cache.chunk_map.set_ready(5)
    world.ask(A, 1, plain, 5, 1, UNREADABLE)
    world.settle()
    ((client, number, code, slot),) = world.answers
    assert (client, number, code) == (A, 1, 0) and slot is not None
    assert not plain.chunk_map.is_ready(5) and not twin.chunk_map.is_ready(5)
    world.ask(B, 1, twin, 5, 1)
    world.settle()
    assert codes(world)[1:] == [(B, 1, 0)] and world.answers[1][3] is not None
    world.clock.now += 31
    world.ask(A, 2, plain, 5, 1)
    world.settle()
    assert codes(world)[2:] == [(A, 2, 0)] and plain.chunk_map.is_ready(5)


def test_who_has_digests_checked_believes_no_other_who_has_not(world: World) -> None:
    twin = twin_of(world, verify=True)
    world.worker("decompress", b"w")
    assert twin.segment is not None
    world.plain.chunk_map.set_ready(4)
    twin.segment.state[4] = VERIFY
    world.ask(B, 1, twin, 4, 1)
    assert not world.answers
    world.pump()
    assert world.dispatched[0]["verify"] == [4]
    world.settle()
    assert codes(world) == [(B, 1, 0)] and twin.chunk_map.is_ready(4)


def test_what_another_has_stored_since_is_checked_in_the_file_and_not_fetched(world: World) -> None:
    twin = twin_of(world, verify=True)
    for cache in (world.plain, twin):
        assert cache.segment is not None
        at = 4 * RECORD.size + 24
        cache.segment.records[at : at + 4] = int(ChunkFlag.DIGEST).to_bytes(4, "little")
    world.plain.chunk_map.set_ready(4)
    world.ask(B, 1, twin, 4, 1)
    world.worker("decompress", b"w")
    world.pump()
    assert world.dispatched[0]["verify"] == [4]
    world.settle()
    assert codes(world) == [(B, 1, 0)]
    # The other way round nothing is in doubt.
    twin.chunk_map.set_ready(20)
    world.ask(A, 1, world.plain, 20, 1)
    assert codes(world)[1:] == [(A, 1, 0)]


def test_what_comes_for_one_who_checks_nothing_is_checked_for_who_waits_for_it(world: World) -> None:
    twin = twin_of(world, verify=True)
    for cache in (world.plain, twin):
        assert cache.segment is not None
        at = 8 * RECORD.size + 24
        cache.segment.records[at : at + 4] = int(ChunkFlag.DIGEST).to_bytes(4, "little")
    world.ask(A, 1, world.plain, 8, 1)
    world.ask(B, 1, twin, 8, 1)
    assert twin.jobs[8].kind == "follow"
    world.settle()
    assert sorted(codes(world)) == [(A, 1, 0), (B, 1, 0)]
    assert [message["verify"] for message in world.dispatched if 8 in message["chunks"]] == [[], [8]]


def test_reader_of_another_image_makes_a_job_urgent_that_nobody_has_waited_for(
    pair: tuple[World, BlobCache, BlobCache],
) -> None:
    world, plain, twin = pair
    world.kill(b"w")
    world.router._launch._start(plain, [8], Priority.PREFETCH)
    assert plain.jobs[8].priority is Priority.PREFETCH
    world.ask(B, 1, twin, 8, 1)
    assert (twin.jobs[8].kind, plain.jobs[8].priority) == ("follow", Priority.USER)
    assert plain.jobs[8] in world.decompress._queues[Priority.USER]
    world.settle()
    assert codes(world) == [(B, 1, 0)]


def test_what_takes_the_place_of_a_job_that_is_waited_for_is_urgent_too(world: World) -> None:
    """Nobody waits for what was fetched but the reader of another image."""
    twin = twin_of(world, of=world.far)
    world.router._launch._start(world.far, [8], Priority.PREFETCH)
    world.ask(B, 1, twin, 8, 1)
    assert (world.far.jobs[8].kind, world.far.jobs[8].priority) == ("fetch", Priority.USER)
    world.worker("fetch", b"f")
    world.pump()
    world.fetched(b"f")
    assert world.far.jobs[8].kind == "fill"
    world.router.tick()
    assert world.far.jobs[8] in world.decompress._queues[Priority.USER]
    world.settle()
    assert codes(world) == [(B, 1, 0)]


class TestEviction:
    def start(self, world: World, cache: BlobCache, chunks: list[int]) -> tuple[int, Job]:
        jobs: list[Job] = []
        evictions = Evictions(cast(Any, SimpleNamespace(submit=jobs.append)), lambda _: None, lambda *_: None)
        count = evictions.start(cache, chunks, {}, lambda _: None)
        return count, jobs[0] if jobs else cast(Any, None)

    def test_takes_chunks_from_all_who_have_them(self, pair: tuple[World, BlobCache, BlobCache]) -> None:
        world, plain, twin = pair
        assert plain.segment is not None and twin.segment is not None
        for cache, chunks in ((plain, (5, 6)), (twin, (5,))):
            for chunk in chunks:
                cache.chunk_map.set_ready(chunk)
        before = plain.segment.epoch[0], twin.segment.epoch[0]
        count, job = self.start(world, plain, [5, 6])
        assert count == 2
        assert [plain.segment.state[5], plain.segment.state[6], twin.segment.state[5]] == [PENDING] * 3
        assert (plain.segment.epoch[0], twin.segment.epoch[0]) == (before[0] + 1, before[1] + 1)
        assert job.payload["covered"] == {s.name: s.inode for s in (plain.segment, twin.segment)}
        job.done(job, {"stored": 0, "evicted": 2, "bytes": 1})
        assert [plain.segment.state[5], plain.segment.state[6], twin.segment.state[5]] == [EMPTY] * 3
        assert not plain.jobs and not twin.jobs and not plain.checkpointing and not twin.checkpointing

    @pytest.mark.parametrize("before", [EMPTY, VERIFY])
    def test_chunk_that_another_image_asks_for_meanwhile_is_filled_after_it(
        self, pair: tuple[World, BlobCache, BlobCache], before: int
    ) -> None:
        """The other one does not have it: what it had stored now would be punched, and be ready all the same."""
        world, plain, twin = pair
        assert plain.segment is not None and twin.segment is not None
        plain.chunk_map.set_ready(6)
        twin.segment.state[6] = before
        world.router.evictions.start(plain, [6], {}, lambda _: None)
        for number, asked in enumerate((twin, plain, twin)):
            world.ask(B, number, asked, 6, 1)
        world.worker("fetch", b"evictor")
        world.pump()
        assert all(6 not in message["chunks"] for message in world.dispatched if message["kind"] == "fill")
        assert not world.answers
        world.done(b"evictor", {"stored": 0, "evicted": 1, "bytes": 1})
        assert plain.segment.state[6] != READY and twin.segment.state[6] != READY
        world.settle()
        assert sorted(codes(world)) == [(B, number, 0) for number in range(3)]
        filled = [chunk for message in world.dispatched if message["kind"] == "fill" for chunk in message["chunks"]]
        assert filled.count(6) == 1 and not any(message.get("verify") for message in world.dispatched)
        assert plain.chunk_map.is_ready(6) and twin.chunk_map.is_ready(6)
        assert not plain.jobs and not twin.jobs and not plain.waiters and not twin.waiters

    def test_reader_is_not_behind_other_work_when_it_waits_for_one(
        self, pair: tuple[World, BlobCache, BlobCache]
    ) -> None:
        world, plain, twin = pair
        plain.chunk_map.set_ready(6)
        world.router.evictions.start(plain, [6], {}, lambda _: None)
        job = twin.jobs[6]
        world.ask(B, 1, twin, 6, 1)
        assert job in world.fetch._queues[Priority.USER]
        world.settle()
        assert codes(world) == [(B, 1, 0)]

    def test_where_nothing_was_taken_out_each_has_what_it_had(self, pair: tuple[World, BlobCache, BlobCache]) -> None:
        world, plain, twin = pair
        assert plain.segment is not None and twin.segment is not None
        plain.chunk_map.set_ready(6)
        plain.chunk_map.set_ready(7)
        twin.segment.state[7] = VERIFY
        _, job = self.start(world, plain, [6, 7])
        job.done(job, {"kept": "process 1"})
        assert [plain.segment.state[6], twin.segment.state[6]] == [READY, EMPTY]
        assert [plain.segment.state[7], twin.segment.state[7]] == [READY, VERIFY]
        assert not plain.jobs and not twin.jobs

    def test_request_that_has_ended_meanwhile_does_not_start_over(
        self, pair: tuple[World, BlobCache, BlobCache]
    ) -> None:
        """It waits for two chunks: the file turns out to be another, so it starts over for the one, and fails by that."""
        world, plain, _twin = pair
        plain.chunk_map.set_ready(6)
        world.router.evictions.start(plain, [6], {}, lambda _: None)
        world.ask(A, 1, plain, 6, 2)
        (request,) = world.router._requests.values()
        request.rounds = 19
        world.worker("fetch", b"evictor")
        world.pump()
        world.stale(b"evictor")
        assert [(client, number) for client, number, _ in codes(world)] == [(A, 1)]
        world.settle()

    def test_leaves_what_is_worked_on_for_another(self, pair: tuple[World, BlobCache, BlobCache]) -> None:
        world, plain, twin = pair
        world.ask(B, 1, twin, 5, 1)
        plain.chunk_map.set_ready(5)
        assert self.start(world, plain, [5])[0] == 0
        plain.chunk_map.forget(5)
        world.settle()

    def test_blob_that_was_opened_anew_meanwhile_keeps_what_it_knows(
        self, pair: tuple[World, BlobCache, BlobCache]
    ) -> None:
        world, plain, twin = pair
        plain.chunk_map.set_ready(5)
        twin.chunk_map.set_ready(5)
        _, job = self.start(world, plain, [5])
        twin.reopen()
        segment = twin.segment
        assert segment is not None
        fresh = Segment.create(
            segment.name,
            generation=2,
            identity=segment.identity,
            records=bytes(segment.records),
            digests=bytes(segment.digests),
            contexts=b"",
            dict_offset=0,
            dict_size=0,
            state=bytes([READY]) * CHUNKS,
        )
        fresh.close()
        twin.opened()
        job.done(job, {"kept": "its segment"})
        assert twin.chunk_map.is_ready(5) and plain.chunk_map.is_ready(5)


def test_map_of_a_file_is_stored_once_for_all_images_with_the_same_table(
    pair: tuple[World, BlobCache, BlobCache],
) -> None:
    world, plain, twin = pair
    assert twin.segment is not None
    for cache in (plain, twin):
        cache.chunk_map.set_ready(1)
    world.worker("fetch", b"f")
    assert world.router.checkpoint() == 2
    world.pump()
    assert [message["kind"] for message in world.dispatched] == ["checkpoint"]
    assert world.router.checkpoint() == 2
    world.done(b"f", {"stored": 1, "others": {twin.spec.segment: [twin.segment.inode, 1]}})
    assert world.router.checkpoint() == 0
    twin.chunk_map.set_ready(2)
    assert world.router.checkpoint() == 1
    world.pump()
    world.done(b"f", {"stored": 2})
    assert world.router.checkpoint() == 0


@pytest.mark.parametrize("others", [{}, {"of another segment": [1, 1]}, None])
def test_map_is_stored_again_for_whom_a_checkpoint_did_not_count(
    pair: tuple[World, BlobCache, BlobCache], others: dict[str, list[int]] | None
) -> None:
    """Its segment is another by now, or the checkpoint did not go well."""
    world, plain, twin = pair
    for cache in (plain, twin):
        cache.chunk_map.set_ready(1)
    world.worker("fetch", b"f")
    world.router.checkpoint()
    world.pump()
    if others is None:
        world.done(b"f", {"error": "no room", "errno": 28, "type": "CacheError"})
    else:
        others |= {twin.spec.segment: [0, 1]}
        world.done(b"f", {"stored": 1, "others": others})
    assert world.router.checkpoint() == 1
    world.pump()
    assert world.sent[b"f"]["handle"] == twin.handle
    world.done(b"f", {"stored": 1})
    assert world.router.checkpoint() == 0


def test_chunk_that_is_taken_from_another_may_not_be_on_its_disk(pair: tuple[World, BlobCache, BlobCache]) -> None:
    world, plain, twin = pair
    assert plain.segment is not None and twin.segment is not None
    plain.chunk_map.set_ready(1)
    assert twin.segment.dirty[0] == 0
    world.ask(A, 1, twin, 1, 1)
    world.settle()
    assert codes(world) == [(A, 1, 0)] and twin.segment.dirty[0] == 1


@pytest.mark.parametrize("why", ["lost", "syncing", ""])
def test_file_of_which_some_is_lost_is_synced_at_once(world: World, why: str) -> None:
    """Whoever syncs it finds out what."""
    world.plain.chunk_map.set_ready(1)
    assert world.plain.segment is not None
    if why:
        getattr(world.plain.segment, why)[0] = 1
    world.worker("fetch", b"f")
    world.ask(A, 1, world.plain, 1, 1, UNREADABLE)
    world.pump()
    assert [message["kind"] for message in world.dispatched] == ["checkpoint"] * bool(why)
    world.worker("decompress", b"d")
    world.settle()
    assert codes(world) == [(A, 1, 0)]


def test_what_another_daemon_was_killed_over_may_not_be_on_its_disk(world: World) -> None:
    """It may be of a release that does not say so."""
    world.plain.chunk_map.set_ready(1)
    assert world.plain.segment is not None
    world.plain.segment.dirty[0] = 0
    world.succeed()
    assert world.plain.segment is not None and world.plain.segment.dirty[0] == 1


@pytest.mark.parametrize("whose", ["segment of the other", "own segment"])
@pytest.mark.parametrize("mark", ["syncing", "lost"])
@pytest.mark.parametrize("flags", [0, int(ChunkFlag.DIGEST)])
def test_chunk_of_which_a_sync_may_tell_that_it_is_lost_is_not_taken_unseen(
    pair: tuple[World, BlobCache, BlobCache], whose: str, mark: str, flags: int
) -> None:
    world, plain, twin = pair
    assert plain.segment is not None and twin.segment is not None
    for segment in (plain.segment, twin.segment):
        RECORD.pack_into(segment.records, 4 * RECORD.size, *segment.record(4)._replace(flags=flags))
    plain.chunk_map.set_ready(4)
    getattr((plain if whose == "segment of the other" else twin).segment, mark)[0] = 1
    world.ask(A, 1, twin, 4, 1)
    assert not world.answers
    world.pump()
    assert world.dispatched[0]["verify"] == [4] * bool(flags)
    world.settle()
    assert codes(world) == [(A, 1, 0)]


def test_chunk_that_is_doubted_while_it_is_taken_is_not_taken(
    pair: tuple[World, BlobCache, BlobCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who doubts has passed over it here, where it was not ready yet."""
    world, plain, twin = pair
    plain.chunk_map.set_ready(4)
    is_ready = plain.chunk_map.is_ready

    def then_doubted(chunk: int) -> bool:
        found = is_ready(chunk)
        assert plain.segment is not None
        plain.segment.doubts[0] += 1
        return found

    monkeypatch.setattr(plain.chunk_map, "is_ready", then_doubted)
    world.ask(A, 1, twin, 4, 1)
    assert not world.answers and not twin.chunk_map.is_ready(4)
    world.settle()
    assert codes(world) == [(A, 1, 0)]
