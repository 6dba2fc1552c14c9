"""A front end that has no file descriptor left: reads wait until there is one, and nobody else notices."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuse.harness import Stage
from tests.fuse.tree import BIG, CHUNK, noise
from tests.support.discipline import wait_until
from tests.support.scarce import no_fd_left

CONTENT = noise("big", BIG)
WAITS = "(Too many open files|maximum number of files open): who needs it waits"


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path) as made:
        yield made


def test_a_cache_file_that_cannot_be_opened_now_is_opened_later_and_not_fetched_again(
    stage: Stage, expect_log: Callable[..., None]
) -> None:
    expect_log(WAITS)
    os.stat(stage.mountpoint / "big")
    with no_fd_left(stage.processes[0].pid):
        readers = [stage.reader("big", offset=number * CHUNK, direct=True) for number in range(3)]
        for reader in readers:
            reader.wait_blocked()
        assert "dir" in os.listdir(stage.mountpoint)
        assert not any(reader.done for reader in readers)
    for number, reader in enumerate(readers):
        assert reader.result() == CONTENT[number * CHUNK : number * CHUNK + 4096]
    assert stage.quiet() == []


def test_chunks_are_asked_for_when_there_can_be_a_line_to_the_supervisor(
    stage: Stage, expect_log: Callable[..., None]
) -> None:
    expect_log("the line to the supervisor: .*Too many open files: who needs it waits")
    chunks = stage.chunks_of("big")
    stage.empty(chunks[2:4])
    assert (stage.mountpoint / "other").read_bytes() == noise("other", 300_000)
    with no_fd_left(stage.processes[0].pid):
        miss = stage.reader("big", offset=2 * CHUNK, size=2 * CHUNK, direct=True)
        miss.wait_blocked()
        hit = stage.reader("big", direct=True)
        assert hit.result() == CONTENT[:4096]
    request = stage.asked()
    assert (request.first, request.length, request.flags) == (chunks[2], 2, 0)
    stage.serve(request)
    assert miss.result() == CONTENT[2 * CHUNK : 4 * CHUNK]


def test_a_read_that_has_no_time_left_fails_and_the_next_one_does_not(
    tmp_path: Path, expect_log: Callable[..., None]
) -> None:
    expect_log(WAITS)
    with Stage(tmp_path, deadline=0.2) as stage:
        os.stat(stage.mountpoint / "big")
        with no_fd_left(stage.processes[0].pid):
            assert stage.reader("big", direct=True).result() == errno.ETIMEDOUT
        assert stage.reader("big", direct=True).result() == CONTENT[:4096]


def successor(stage: Stage) -> int:
    """Have the front end succeeded by another, which has opened nothing yet; its pid."""
    (stage.mountpoint / "third").read_bytes()
    os.stat(stage.mountpoint / "big")  # what the kernel knows by then it need not ask for
    stage.kill(0)
    pid = stage.start(0).pid
    wait_until(lambda: "fuse_dev" in Path(f"/proc/{pid}/wchan").read_text(), "it to wait for a request", 60)
    return pid


def test_a_successor_that_cannot_open_the_image_yet_serves_its_reads_later(
    stage: Stage, expect_log: Callable[..., None]
) -> None:
    expect_log(WAITS)
    with no_fd_left(successor(stage)):
        readers = [stage.reader("big", offset=number * CHUNK, direct=True) for number in range(2)]
        for reader in readers:
            reader.wait_blocked()
        stage.kill(0)  # what it has put off is in the journal
    stage.start(0)
    for number, reader in enumerate(readers):
        assert reader.result() == CONTENT[number * CHUNK : number * CHUNK + 4096]


def test_a_reader_that_waits_for_an_image_to_be_opened_can_be_killed(
    stage: Stage, expect_log: Callable[..., None]
) -> None:
    expect_log(WAITS)
    with no_fd_left(successor(stage)):
        killed, other = stage.reader("big", direct=True), stage.reader("big", offset=CHUNK, direct=True)
        for reader in (killed, other):
            reader.wait_blocked()
        killed.kill()
        assert killed.result() == -signal.SIGKILL
        assert not other.done
    assert other.result() == CONTENT[CHUNK : CHUNK + 4096]
