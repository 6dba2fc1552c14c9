"""Reads that wait for chunks: nobody else waits with them, and every way in which waiting can end."""

from __future__ import annotations

import errno
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nydusd.ipc.arena import Arena
from nydusd.ipc.messages import LOST
from tests.fuse.harness import HANDLE, Asked, Stage
from tests.fuse.tree import BIG, CHUNK, noise
from tests.support.discipline import mounts_under, wait_until

TRIES = 4
"""How often a read has its chunks fetched anew."""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path, filled=False) as made:
        yield made


def asked_for(stage: Stage, path: str) -> Asked:
    """The next request, which must be for chunks of this file."""
    request = stage.asked()
    assert request.first in stage.chunks_of(path)
    return request


def test_a_miss_waits_for_its_chunks_and_gets_them(stage: Stage) -> None:
    reader = stage.reader("third", offset=CHUNK - 10, size=20)
    request = asked_for(stage, "third")
    assert (request.length, request.flags) == (1, 0) or request.length == 2
    stage.serve(request)
    if request.length == 1:
        stage.serve(asked_for(stage, "third"))
    assert reader.result() == noise("third", 100_000)[CHUNK - 10 : CHUNK + 10]


def test_a_direct_read_over_several_chunks_is_one_request(stage: Stage) -> None:
    reader = stage.reader("big", size=8 * CHUNK, direct=True)
    request = stage.asked()
    assert (request.first, request.length) == (stage.chunks_of("big")[0], 8)
    stage.serve(request)
    assert reader.result() == noise("big", BIG)[: 8 * CHUNK]


def test_only_what_is_missing_is_asked_for(stage: Stage) -> None:
    chunks = stage.chunks_of("big")
    stage.fill([chunks[1], chunks[4]])
    reader = stage.reader("big", size=6 * CHUNK, direct=True)
    wanted = {(chunks[0], 1), (chunks[2], 2), (chunks[5], 1)}
    requests = [stage.asked() for _ in wanted]
    assert {(r.first, r.length) for r in requests} == wanted
    for request in requests:
        stage.serve(request)
    assert reader.result() == noise("big", BIG)[: 6 * CHUNK]


def test_hits_do_not_wait_behind_misses(stage: Stage) -> None:
    stage.fill(stage.chunks_of("other"))
    blocked = [stage.reader("big", offset=i * CHUNK, direct=True) for i in range(6)]
    requests = [asked_for(stage, "big") for _ in blocked]
    assert (stage.mountpoint / "other").read_bytes() == noise("other", 300_000)
    assert "dir" in os.listdir(stage.mountpoint)
    assert not any(reader.done for reader in blocked)
    for request in reversed(requests):
        stage.serve(request)
    for i, reader in enumerate(blocked):
        assert reader.result() == noise("big", BIG)[i * CHUNK : i * CHUNK + 4096]


def test_a_failed_fetch_gives_the_reader_its_errno(stage: Stage, expect_log: Callable[..., None]) -> None:
    expect_log("mount /: a read failed: No such device or address")
    reader = stage.reader("big", direct=True)
    stage.answer(stage.asked(), errno.ENXIO)
    assert reader.result() == errno.ENXIO
    again = stage.reader("big", direct=True)
    stage.serve(stage.asked())
    assert again.result() == noise("big", BIG)[:4096]


def test_a_read_past_its_deadline_times_out(tmp_path: Path, expect_log: Callable[..., None]) -> None:
    expect_log("mount /: a read failed: Connection timed out")
    with Stage(tmp_path, filled=False, deadline=0.2) as stage:
        reader = stage.reader("big", direct=True)
        request = stage.asked()
        assert reader.result() == errno.ETIMEDOUT
        stage.serve(request)  # late, and for nobody
        again = stage.reader("big", direct=True)
        assert again.result() == noise("big", BIG)[:4096]
        wait_until(lambda: stage.quiet() == [] and request.number in stage.cancelled, "the cancellation")


def test_an_unanswered_request_is_repeated_under_its_number(stage: Stage) -> None:
    reader = stage.reader("big", direct=True)
    first = stage.asked()
    assert stage.asked_again() == first
    stage.serve(first)
    assert reader.result() == noise("big", BIG)[:4096]


def test_a_new_supervisor_gets_the_request_again(stage: Stage) -> None:
    reader = stage.reader("big", direct=True)
    first = stage.asked()
    stage.replace_supervisor()
    again = stage.asked_again()
    assert again == first
    stage.serve(again)
    assert reader.result() == noise("big", BIG)[:4096]


def test_data_in_shared_memory_is_copied_and_given_back(stage: Stage) -> None:
    chunks = stage.chunks_of("other")
    stage.arena = Arena.create(f"/nydusd.test-{uuid.uuid4().hex[:12]}", 1 << 20)
    stage.fill([chunks[1]])
    reader = stage.reader("other", offset=4096, size=2 * CHUNK, direct=True)
    requests = {request.first: request for request in (stage.asked(), stage.asked())}
    for lease, chunk in enumerate((chunks[0], chunks[2]), 40):
        at = stage.arena.allocate(CHUNK)
        assert at is not None
        stage.arena.view(at, CHUNK)[:] = stage.tree.blob[chunk * CHUNK : (chunk + 1) * CHUNK]
        slot = {"lease": lease, "arena": stage.arena.name, "handle": HANDLE, "chunks": [(chunk, at, CHUNK)]}
        stage.answer(requests[chunk], slot=slot)
    assert reader.result() == noise("other", 300_000)[4096 : 4096 + 2 * CHUNK]
    wait_until(lambda: stage.quiet() == [] and sorted(stage.released) == [40, 41], "the leases to be given back")


def test_a_truncated_cache_file_is_fetched_again(stage: Stage, expect_log: Callable[..., None]) -> None:
    expect_log("cache file gave 0 of 4096 bytes at .*: fetching it again")
    stage.fill(stage.chunks_of("big"))
    os.truncate(stage.data, 0)
    reader = stage.reader("big", direct=True)
    request = stage.asked()
    assert (request.first, request.length, request.flags) == (stage.chunks_of("big")[0], 1, LOST)
    stage.serve(request)
    assert reader.result() == noise("big", BIG)[:4096]


def test_a_cache_file_that_stays_truncated_gives_eio(stage: Stage, expect_log: Callable[..., None]) -> None:
    expect_log("cache file gave 0 of 4096 bytes")
    stage.fill(stage.chunks_of("big"))
    os.truncate(stage.data, 0)
    reader = stage.reader("big", direct=True)
    for _ in range(TRIES):
        request = stage.asked()
        assert request.flags == LOST
        stage.answer(request)
    assert reader.result() == errno.EIO


def test_chunks_reported_but_never_there_give_eio_and_no_zeros(stage: Stage, expect_log: Callable[..., None]) -> None:
    expect_log("mount /: chunks were reported as fetched, again and again, and are not there")
    reader = stage.reader("big", direct=True)
    for flags in (0, *[LOST] * TRIES):
        request = stage.asked()
        assert request.flags == flags
        stage.answer(request)
    assert reader.result() == errno.EIO


def test_a_blob_whose_cache_file_was_deleted_is_read_from_its_new_one(tmp_path: Path) -> None:
    """Over blobfs: the front end, which is new, learns only from the new file's segment which chunks it needs."""
    with Stage(tmp_path, filled=False, program="tests.fuse.serve_blobs") as stage:
        stage.data.unlink()
        reader = stage.reader("sample", offset=5 * CHUNK, size=2 * CHUNK, direct=True)
        for flags in (0, LOST):
            request = stage.asked()
            assert (request.first, request.length, request.flags) == (0, 1, flags)
            if flags:  # what the supervisor does then
                stage.data.touch()
                stage.replace_cache()
                stage.fill([0])
            stage.answer(request)
        request = stage.asked()
        assert (request.first, request.length, request.flags) == (5, 2, 0)
        stage.serve(request)
        assert reader.result() == bytes(stage.tree.blob[5 * CHUNK : 7 * CHUNK])


def test_a_blob_without_a_cache_file_is_read_from_shared_memory(tmp_path: Path) -> None:
    """Over blobfs, whose front end learns from the segment which chunks it needs: the folder cannot be written."""
    with Stage(tmp_path, filled=False, program="tests.fuse.serve_blobs", cached=False) as stage:
        stage.arena = Arena.create(f"/nydusd.test-{uuid.uuid4().hex[:12]}", 1 << 20)
        reader = stage.reader("sample", offset=5 * CHUNK, size=4096, direct=True)
        request = stage.asked()
        assert (request.first, request.length, request.flags) == (5, 1, 0)
        at = stage.arena.allocate(CHUNK)
        assert at is not None
        stage.arena.view(at, CHUNK)[:] = stage.tree.blob[5 * CHUNK : 6 * CHUNK]
        slot = {"lease": 40, "arena": stage.arena.name, "handle": HANDLE, "chunks": [(5, at, CHUNK)]}
        stage.answer(request, slot=slot)
        assert reader.result() == bytes(stage.tree.blob[5 * CHUNK : 5 * CHUNK + 4096])


def test_a_replaced_cache_file_is_opened_anew(stage: Stage) -> None:
    stage.fill(stage.chunks_of("other"))
    assert (stage.mountpoint / "other").read_bytes() == noise("other", 300_000)
    reader = stage.reader("big", direct=True)
    request = stage.asked()
    stage.replace_cache()
    stage.serve(request)
    assert reader.result() == noise("big", BIG)[:4096]


def test_a_handled_signal_ends_a_direct_read(stage: Stage) -> None:
    reader = stage.reader("big", direct=True)
    request = stage.asked()
    reader.wait_blocked()
    reader.signal(signal.SIGUSR1)
    assert reader.result() == errno.EINTR
    wait_until(lambda: stage.quiet() == [] and stage.cancelled == [request.number], "the cancellation")


def test_a_handled_signal_does_not_disturb_a_read_of_the_page_cache(stage: Stage) -> None:
    reader = stage.reader("big")
    request = stage.asked()
    reader.wait_blocked()
    reader.signal(signal.SIGUSR1)
    assert stage.asked_again() == request  # a second later it still waits
    stage.serve(request)
    assert reader.result() == noise("big", BIG)[:4096]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("disturbed_before", [True, False])
def test_a_reader_that_waits_can_be_killed(stage: Stage, direct: bool, disturbed_before: bool) -> None:
    reader = stage.reader("big", direct=direct)
    stage.asked()
    reader.wait_blocked()
    if disturbed_before and not direct:
        reader.signal(signal.SIGUSR1)
    reader.kill()
    assert reader.result() == -signal.SIGKILL


@pytest.mark.parametrize("round_", range(4))
def test_an_interrupt_reaches_the_front_end_that_parked_the_read(tmp_path: Path, round_: int) -> None:
    with Stage(tmp_path, filled=False, lanes=2) as stage:
        readers = [stage.reader("big", offset=i * CHUNK, direct=True) for i in range(6)]
        requests = [stage.asked() for _ in readers]
        for reader in readers:
            reader.wait_blocked()
            reader.signal(signal.SIGUSR1)
        assert [reader.result() for reader in readers] == [errno.EINTR] * 6
        wait_until(lambda: stage.quiet() == [] and len(stage.cancelled) == len(requests), "the cancellations")


def test_unmount_ends_a_front_end_that_waits(stage: Stage) -> None:
    reader = stage.reader("big", direct=True)
    stage.asked()
    reader.wait_blocked()
    assert stage.session is not None
    reader.kill()
    assert reader.result() == -signal.SIGKILL
    stage.session.unmount()
    assert stage.processes[0].wait(10) == 0


def test_a_lazily_unmounted_session_serves_its_last_reader(stage: Stage) -> None:
    reader = stage.reader("big", direct=True)
    request = stage.asked()
    assert stage.session is not None
    stage.session.unmount()
    assert str(stage.mountpoint) not in mounts_under(stage.folder)
    stage.serve(request)
    assert reader.result() == noise("big", BIG)[:4096]
    assert stage.processes[0].wait(10) == 0
