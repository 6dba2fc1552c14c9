"""A front end that is killed costs a pause and no read: its successor on the same fd answers what it had taken."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.harness import Asked, Stage
from tests.fuse.tree import BIG, CHUNK, noise


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path, filled=False) as made:
        yield made


def restart(stage: Stage, index: int) -> None:
    """What the supervisor does when a front end has died."""
    assert stage.session is not None
    stage.start(index)
    assert stage.session.resend()


@pytest.mark.parametrize("direct", [True, False])
def test_a_read_that_was_parked_is_answered_by_the_successor(stage: Stage, direct: bool) -> None:
    reader = stage.reader("big", direct=direct)
    old = stage.asked()
    stage.kill(0)
    restart(stage, 0)
    new = stage.asked()
    assert (new.first, new.length) == (old.first, old.length)
    assert new.who != old.who
    stage.serve(new)
    assert reader.result() == noise("big", BIG)[:4096]


def test_a_read_issued_while_there_was_no_front_end_is_answered(stage: Stage) -> None:
    stage.fill(stage.chunks_of("big"))
    warm = stage.reader("big", direct=True)
    assert warm.result() == noise("big", BIG)[:4096]
    stage.kill(0)
    reader = stage.reader("big", direct=True)
    reader.wait_blocked()
    restart(stage, 0)
    assert reader.result() == noise("big", BIG)[:4096]


def test_many_reads_survive_many_kills(stage: Stage) -> None:
    readers = [stage.reader("big", offset=i * CHUNK, direct=True) for i in range(5)]
    for _ in range(3):
        assert len({stage.asked().first for _ in readers}) == len(readers)
        stage.kill(0)
        stage.quiet()
        restart(stage, 0)
    for _ in readers:
        stage.serve(stage.asked())
    for i, reader in enumerate(readers):
        assert reader.result() == noise("big", BIG)[i * CHUNK : i * CHUNK + 4096]


def test_a_resend_while_all_front_ends_live_harms_no_read(tmp_path: Path) -> None:
    with Stage(tmp_path, filled=False, lanes=2) as stage:
        assert stage.session is not None
        readers = [stage.reader("big", offset=i * CHUNK, direct=True) for i in range(6)]
        waiting: list[Asked] = [stage.asked() for _ in readers]
        for _ in range(3):
            assert stage.session.resend()
            waiting += [stage.asked() for _ in readers]
        for request in waiting:
            stage.serve(request)
        for i, reader in enumerate(readers):
            assert reader.result() == noise("big", BIG)[i * CHUNK : i * CHUNK + 4096]


def test_the_sibling_serves_while_a_front_end_is_dead(tmp_path: Path) -> None:
    with Stage(tmp_path, lanes=2) as stage:
        stage.kill(0)
        reader = stage.reader("big", size=CHUNK, direct=True)
        assert reader.result() == noise("big", BIG)[:CHUNK]
        listing = stage.reader("other", size=CHUNK)
        assert listing.result() == noise("other", 300_000)[:CHUNK]


def test_a_resent_read_can_be_interrupted(stage: Stage) -> None:
    reader = stage.reader("big", direct=True)
    stage.asked()
    stage.kill(0)
    restart(stage, 0)
    stage.asked()
    reader.signal(signal.SIGUSR1)
    assert reader.result() == errno.EINTR


def test_a_front_end_stopped_in_mid_flight_is_overtaken_without_a_wrong_answer(tmp_path: Path) -> None:
    """The stopped one wakes up with an old copy of the request: the kernel refuses its reply, and it goes on."""
    with Stage(tmp_path, filled=False, lanes=1) as stage:
        assert stage.session is not None
        reader = stage.reader("big", direct=True)
        first = stage.asked()
        os.kill(stage.processes[0].pid, signal.SIGSTOP)
        stage.fill([first.first])
        assert stage.session.resend()
        os.kill(stage.processes[0].pid, signal.SIGCONT)
        assert reader.result() == noise("big", BIG)[:4096]
        again = stage.reader("big", direct=True)
        assert again.result() == noise("big", BIG)[:4096]
