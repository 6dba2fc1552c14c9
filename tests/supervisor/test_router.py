"""The router in single situations that need an exact order of events: who waits for a chunk, and workers that fail or die."""

from __future__ import annotations

import errno
import signal

import pytest

from nydusd.storage.cache.requests import Priority
from nydusd.storage.state.lock import BlobLock
from tests.supervisor.router_readers import A, B, codes
from tests.supervisor.world import World
from tests.support.segments import die_at, in_child, join


def test_a_handle_that_no_blob_has_is_said_to_be_stale_or_known_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[tuple[int, int]] = []
    monkeypatch.setattr(world.router, "_reply", lambda _client, number, code, _slot: answers.append((number, code)))
    world.router.unknown = lambda handle: handle == 4712  # there was no file descriptor for it
    world.router.request(A, 1, 4711, 0, 1, 0)
    world.router.request(A, 2, 4712, 0, 1, 0)
    assert answers == [(1, errno.ESTALE)]


def test_a_blob_is_not_closed_while_a_worker_writes_to_its_file_though_nobody_waits_for_that(world: World) -> None:
    """Else the next image could have the file by a table that contradicts the one by which that worker writes."""
    world.worker("decompress", b"w")
    world.ask(A, 1, world.plain, 0, 1)
    world.pump()
    world.open.pop((A, 1))
    world.router.cancel(A, 1)
    world.router.forget(world.plain)
    assert not world.plain.jobs and not world.router.may_close(world.plain)
    world.filled(b"w")
    assert world.router.may_close(world.plain)


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


def test_unit_is_decoded_once_and_as_a_whole(world: World) -> None:
    world.ask(A, 1, world.batch, 4, 1)
    world.ask(A, 2, world.batch, 5, 1)
    users = [job for job, _ in world.jobs() if job.priority is Priority.USER]
    assert [job.chunks for job in users] == [[3, 4, 5]]
