"""A front end that is killed costs a pause and no read: its successor on the same lane answers what it had taken."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuse.harness import SECONDS, Stage
from tests.fuse.tree import BIG, CHUNK, noise


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path, filled=False) as made:
        yield made


@pytest.mark.parametrize("direct", [True, False])
def test_a_read_that_was_parked_is_answered_by_the_successor(stage: Stage, direct: bool) -> None:
    reader = stage.reader("big", direct=direct)
    old = stage.asked()
    stage.kill(0)
    stage.start(0)
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
    stage.start(0)
    assert reader.result() == noise("big", BIG)[:4096]


def test_many_reads_survive_many_kills(stage: Stage) -> None:
    readers = [stage.reader("big", offset=i * CHUNK, direct=True) for i in range(5)]
    for _ in range(3):
        assert len({stage.asked().first for _ in readers}) == len(readers)
        stage.kill(0)
        stage.quiet()
        stage.start(0)
    for _ in readers:
        stage.serve(stage.asked())
    for i, reader in enumerate(readers):
        assert reader.result() == noise("big", BIG)[i * CHUNK : i * CHUNK + 4096]


def test_the_reads_of_a_living_front_end_are_asked_for_once(tmp_path: Path) -> None:
    with Stage(tmp_path, filled=False, lanes=2) as stage:
        readers = [stage.reader("big", offset=i * CHUNK, direct=True) for i in range(6)]
        waiting = [stage.asked() for _ in readers]
        (of_the_dead, lane) = (waiting[0].who, int(waiting[0].who.decode().split("-")[1]))
        stage.kill(lane)
        stage.start(lane)
        lost = [request for request in waiting if request.who == of_the_dead]
        again = [stage.asked() for _ in lost]
        assert sorted(r.first for r in again) == sorted(r.first for r in lost)
        assert not stage.quiet()
        for request in [r for r in waiting if r.who != of_the_dead] + again:
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


def test_a_close_waits_for_no_front_end(tmp_path: Path) -> None:
    code = """
import os, sys
os.close(os.open(sys.argv[1], os.O_RDONLY))
fd = os.open(sys.argv[1], os.O_RDONLY)
os.write(1, b"o")
os.read(0, 1)
os.close(fd)
os.write(1, b"c")
"""
    with Stage(tmp_path) as stage:
        command = [sys.executable, "-IS", "-c", code, str(stage.mountpoint / "big")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                assert process.stdout.read(1) == b"o"
                stage.kill(0)
                process.stdin.write(b"x")
                assert select.select([process.stdout], [], [], 30)[0], "close(2) waits"
                assert process.stdout.read(1) == b"c"
            finally:
                process.kill()


def test_a_read_that_was_parked_again_can_be_interrupted(stage: Stage) -> None:
    reader = stage.reader("big", direct=True)
    stage.asked()
    stage.kill(0)
    stage.start(0)
    stage.asked()
    reader.signal(signal.SIGUSR1)
    assert reader.result() == errno.EINTR


def test_an_interrupt_outlives_the_front_end_that_took_it(stage: Stage) -> None:
    """A read for the page cache ends by a fatal signal alone, which the kernel reports once."""
    reader = stage.reader("big")
    stage.asked()
    reader.signal(signal.SIGUSR1)
    other = stage.reader("other", direct=True)  # it is asked for after the interrupt was taken
    stage.asked()
    stage.kill(0)
    stage.start(0)
    assert len({stage.asked().first for _ in range(2)}) == 2
    reader.kill()
    assert reader.result() == -signal.SIGKILL
    other.kill()
    other.result()


def test_an_answered_request_is_answered_again_in_vain(stage: Stage) -> None:
    """The last request stays in the journal until the next one comes: its successor serves it, the kernel refuses it."""
    stage.fill(stage.chunks_of("big"))
    for _ in range(3):
        reader = stage.reader("big", direct=True)
        assert reader.result() == noise("big", BIG)[:4096]
        stage.kill(0)
        stage.start(0)


def test_a_journal_of_another_version_has_the_kernel_send_again(stage: Stage) -> None:
    reader = stage.reader("big", direct=True)
    stage.asked()
    stage.kill(0)
    os.pwrite(stage.lanes[0].journal, b"\xff" * 64, 0)
    stage.start(0)
    stage.serve(stage.asked())
    assert reader.result() == noise("big", BIG)[:4096]


def test_a_read_whose_front_ends_are_killed_again_and_again_is_answered(stage: Stage) -> None:
    """Even if that is always in the middle of serving it again: who was killed is no witness against a request."""
    stage.fill(stage.chunks_of("big"))
    stage.kill(0)
    killed = stage.start(0, "tests.fuse.serve_and_die")
    reader = stage.reader("big", direct=True)
    for _ in range(6):
        assert killed.wait(SECONDS) == -signal.SIGKILL
        killed = stage.start(0, "tests.fuse.serve_and_die")
    assert killed.wait(SECONDS) == -signal.SIGKILL
    stage.start(0)
    assert reader.result() == noise("big", BIG)[:4096]


def test_a_request_that_kills_every_front_end_is_failed(stage: Stage, expect_log: Callable[..., None]) -> None:
    expect_log("front ends die of this request: it is failed")
    stage.fill(stage.chunks_of("big"))
    stage.kill(0)
    killed = stage.start(0, "tests.fuse.serve_and_die")
    reader = stage.reader("big", direct=True)
    for _ in range(3):
        assert killed.wait(SECONDS) == -signal.SIGKILL
        killed = stage.start(0, "tests.fuse.serve_and_die", crashed=True)
    assert killed.wait(SECONDS) == -signal.SIGKILL
    stage.start(0, crashed=True)
    assert reader.result() == errno.EIO
    again = stage.reader("big", direct=True)
    assert again.result() == noise("big", BIG)[:4096]
