"""Workers of several daemons on one node: as many as there are seats, and nobody waits for long. Time is by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nydusd.nursery.seats import PATIENCE, TURNS
from nydusd.storage.cache.requests import Priority
from tests.supervisor.seat_world import IDLE, SEATS, OneDaemon, World

LATE = TURNS["decompress"] + PATIENCE["decompress"] + 0.05


@pytest.fixture
def world() -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        world = World(patch)
        yield world
        world.close()


def busy(daemon: OneDaemon, jobs: int = 1000, priority: Priority = Priority.USER) -> OneDaemon:
    for _ in range(jobs):
        daemon.submit("decompress", priority)
    return daemon


def test_a_daemon_without_a_nursery_has_all_its_workers(world: World) -> None:
    daemon = world.add(fetch=3, decompress=5)
    daemon.turn()
    assert (world.processes("fetch"), world.processes("decompress")) == (3, 5)


def test_with_one_it_begins_with_one_of_each_and_has_none_soon(world: World) -> None:
    world.start_desk()
    world.add(fetch=3, decompress=5)
    world.run(0.05)
    assert (world.processes("fetch"), world.processes("decompress")) == (1, 1)
    world.run(2.0, step=0.05)
    assert (world.processes("fetch"), world.processes("decompress")) == (0, 0)
    assert world.desk is not None and world.desk._ledgers["fetch"].taken == 0


def test_there_are_never_more_workers_than_seats_and_all_jobs_are_done(world: World) -> None:
    world.start_desk()
    for _ in range(6):
        busy(world.add(fetch=1, decompress=5), 60)
    for _ in range(300):
        world.run(0.01)
        assert world.processes("decompress") <= SEATS["decompress"]
    assert [daemon.undone for daemon in world.daemons] == [0] * 6


def test_who_has_a_reader_has_a_worker_within_its_turn_whatever_others_do(world: World) -> None:
    world.start_desk()
    for _ in range(3):
        busy(world.add(fetch=1, decompress=5))
    world.run(1.0)
    reader = world.add(fetch=1, decompress=5)
    reader.submit("decompress", Priority.USER)
    world.run(TURNS["decompress"] + 0.05)
    assert reader.undone == 0
    assert world.processes("decompress") <= SEATS["decompress"]


def test_who_prefetches_makes_room_for_a_reader_at_once(world: World) -> None:
    world.start_desk()
    for _ in range(3):
        busy(world.add(fetch=1, decompress=5), priority=Priority.PREFETCH)
    world.run(1.0)
    reader = world.add(fetch=1, decompress=5)
    reader.submit("decompress", Priority.USER)
    world.run(0.05)
    assert reader.undone == 0


def test_workers_without_jobs_make_room_at_once(world: World) -> None:
    world.start_desk()
    one = busy(world.add(fetch=1, decompress=3), 3)
    world.run(0.1)
    assert one.processes("decompress") == 3 and one.undone == 0
    other = busy(world.add(fetch=1, decompress=3), 3)
    world.run(0.05)
    assert other.undone == 0


def test_a_stopped_daemon_and_a_job_without_an_end_keep_others_waiting_once_and_not_for_long(world: World) -> None:
    world.start_desk()
    holder = busy(world.add(fetch=1, decompress=3), 3)
    world.run(0.1, working=())
    holder.stopped = True
    reader = busy(world.add(fetch=1, decompress=3), 2)
    world.run(LATE)
    assert reader.undone == 0
    again = busy(world.add(fetch=1, decompress=3), 2)
    world.run(0.05)
    assert again.undone == 0
    holder.stopped = False
    world.run(0.2)
    assert world.processes("decompress") <= SEATS["decompress"]
    assert holder.undone == 0


def test_a_nursery_that_dies_costs_nothing_and_the_next_one_is_told_what_there_is(world: World) -> None:
    world.start_desk()
    one, two = (busy(world.add(fetch=1, decompress=2)) for _ in range(2))
    world.run(0.2)
    world.kill_desk()
    world.run(0.05)
    assert world.processes("decompress") == 4, "nobody is there to be asked"
    world.run(IDLE, step=0.05)
    assert world.desk is not None, "somebody has started another"
    assert world.processes("decompress") == SEATS["decompress"]
    assert one.undone < 1000 and two.undone < 1000


def test_a_nursery_that_hangs_costs_a_quarter_of_a_second_once(world: World) -> None:
    world.start_desk()
    daemon = world.add(fetch=1, decompress=2)
    world.run(3.0, step=0.05)
    assert world.processes("decompress") == 0
    world.hung = True
    busy(daemon, 1)
    world.run(0.3)
    assert daemon.undone == 0
    world.run(IDLE * 2, step=0.05)
    busy(daemon, 1)
    world.run(0.03)
    assert daemon.undone == 0
    world.hung = False
    world.run(IDLE / 2, step=0.05)
    assert daemon.seats.counts


def test_a_daemon_that_was_alone_joins_with_what_it_has_and_rests_sooner_from_then_on(world: World) -> None:
    daemon = world.add(fetch=1, decompress=3)
    daemon.turn()
    world.start_desk()
    world.run(IDLE / 4 + 0.5, step=0.05)
    assert daemon.seats.counts
    world.run(2.0, step=0.05)
    assert world.processes("decompress") == 0


def test_a_seat_is_free_when_a_daemon_dies(world: World) -> None:
    world.start_desk()
    holder = busy(world.add(fetch=1, decompress=3))
    world.run(0.1)
    reader = busy(world.add(fetch=1, decompress=3), 1)
    world.daemons.remove(holder)
    holder.end()
    world.run(0.05)
    assert reader.undone == 0


def test_in_a_takeover_the_first_of_each_role_waits_for_no_seat_and_is_counted(world: World) -> None:
    """It is there before the nursery, which may have to be loaded or have no processor, has said a word."""
    world.start_desk()
    others = [busy(world.add(fetch=1, decompress=3)) for _ in range(3)]
    world.run(0.1)
    world.hung = True
    successor = busy(world.add(takes_over=True, fetch=3, decompress=5), 1)
    assert (successor.processes("fetch"), successor.processes("decompress")) == (1, 1)
    for _ in range(3):
        successor.turn()
        for identity in list(successor.sent):
            successor.finish(identity)
    assert successor.undone == 0
    world.hung = False
    assert world.desk is not None
    ledger = world.desk._ledgers["decompress"]
    world.run(0.05)
    assert ledger.taken == world.processes("decompress")
    world.run(3.0)
    assert ledger.taken == world.processes("decompress") == SEATS["decompress"]
    assert (successor.processes("fetch"), successor.processes("decompress")) == (0, 0), (
        "it has nothing to do, and rests"
    )
    assert all(other.undone < 1000 for other in others)


def test_what_it_tells_the_operator_says_for_what_it_waits(world: World) -> None:
    world.start_desk()
    busy(world.add(fetch=1, decompress=3))
    world.run(0.1)
    reader = busy(world.add(fetch=1, decompress=3), 2)
    world.run(0.01)
    facts = reader.seats.facts()
    assert facts["joined"] is True
    assert facts["roles"]["decompress"]["want"] == 2
    world.run(1.0)
    facts = reader.seats.facts()["roles"]["decompress"]
    assert facts["waits"] >= 1 and 0 < facts["waited_seconds"] < 0.5
