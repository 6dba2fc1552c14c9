"""A segment that succeeds others over a cache file: no old view is believed, and no doubt is lost on the way."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nydusd import points
from nydusd.storage.state import doubts
from nydusd.storage.state.names import inode_of, remove
from nydusd.storage.state.segment import PENDING, READY, VERIFY, Segment
from tests.workers.harness import Jobs
from tests.workers.shared_file import KilledError, again, twin
from workers.evict import evict


@pytest.mark.parametrize("point", ["segment: former retired", "segment: named", "prepare: published"])
def test_worker_killed_over_a_new_segment_leaves_no_old_view(
    made: Jobs, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    device = made.device()
    ino = made.files()[b"sizes/4097"]
    vec = made.bootstrap.extents(ino, 0, 4097)
    assert device.missing(vec) == []
    made.generation = 2

    def killed(name: str) -> None:
        if name == point:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(points, "reach", killed)
        with pytest.raises(KilledError):
            made.prepare()
    made.prepare()
    made.fill_all()
    chunk = vec[0].chunk
    with made.segment() as segment:
        segment.state[chunk] = PENDING
        segment.epoch[0] += 1
    covered = {made.prefix: inode_of(made.prefix)}
    assert "evicted" in evict(made.open, made._take(chunks=[chunk], covered=covered, strays={}, pids=[os.getpid()]))
    assert device.missing(vec) != []
    device.close()
    for path in Path("/dev/shm").glob(f"{made.prefix[1:]}.*"):
        path.unlink()


def test_retired_segment_that_has_its_name_still_is_not_read_from(made: Jobs) -> None:
    device = made.device()
    ino = made.files()[b"sizes/4097"]
    vec = made.bootstrap.extents(ino, 0, 4097)
    with made.segment() as segment:
        segment.retire()
    assert device.missing(vec) != []
    device.close()


def takes_over(made: Jobs, other: Segment, monkeypatch: pytest.MonkeyPatch, reach: Callable[[str], None]) -> None:
    """A new daemon opens the blob, of which another one has all; `reach` is called at each named point."""
    other.state[:] = bytes([READY]) * other.count
    remove(made.prefix)
    made.generation += 1
    monkeypatch.setattr(points, "reach", reach)
    made.prepare()


@pytest.mark.parametrize("what", ["doubts", "syncing", "lost", "gone", ""])
def test_what_was_doubted_while_it_was_taken_over_is_doubted(
    made: Jobs, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Who doubts may have looked for segments before the new one had its name."""
    real = points.reach

    def reach(point: str) -> None:
        real(point)
        if point == "segment: former retired" or (point == "segment: written" and not inode_of(made.prefix)):
            if what == "gone":
                remove(other.name)
            elif what:
                getattr(other, what)[0] += 1

    with twin(made) as other:
        takes_over(made, other, monkeypatch, reach)
        with made.segment() as segment:
            assert set(segment.state) == {VERIFY if what else READY}
            assert segment.syncing[0] == 0 and segment.doubts[0] == 0
        monkeypatch.undo()
        made.fill_all()
        assert made.wrong_files() == []


def test_what_is_doubted_while_it_is_being_published_is_not_left_half_doubted(
    made: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has the file synced begins with the new segment before its maker looks again, and ends after that."""
    real, begun, go_on = points.reach, threading.Event(), threading.Event()

    def doubts_it() -> None:
        with made.segment() as segment:
            doubts.doubt(segment)

    other_one = threading.Thread(target=doubts_it)

    def reach(point: str) -> None:
        real(point)
        if point == "prepare: taken over":
            other.doubts[0] += 2
            other_one.start()
            begun.wait()
        elif point == "doubts: begun" and threading.current_thread() is other_one:
            begun.set()
            go_on.wait()

    with twin(made) as other:
        takes_over(made, other, monkeypatch, reach)
        go_on.set()
        other_one.join()
        with made.segment() as segment:
            assert set(segment.state) == {VERIFY}
            assert segment.syncing[0] == 0 and not segment.doubts[0] % 2
        monkeypatch.undo()
        made.fill_all()
        assert made.wrong_files() == []


def test_who_is_killed_before_he_has_looked_again_has_it_doubted(made: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(point: str) -> None:
        if point == "prepare: taken over":
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(points, "reach", killed)
        made.new_daemon(same_boot=True)
        with pytest.raises(KilledError):
            made.prepare()
    made.prepare()
    assert set(made.states()) == {VERIFY}


def test_former_segment_that_was_doubted_while_it_was_taken_over_is_doubted(
    made: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = points.reach
    with made.segment() as former:

        def reach(point: str) -> None:
            real(point)
            if point == "segment: former retired":
                former.doubts[0] += 1

        monkeypatch.setattr(points, "reach", reach)
        made.new_daemon(same_boot=True)
        made.prepare()
    assert set(made.states()) == {VERIFY}


def test_old_view_of_a_file_that_cannot_be_used_now_is_retired(made: Jobs) -> None:
    """Others take chunks out of it meanwhile, and so do we when it can be used again."""
    device = made.device()
    ino = made.files()[b"sizes/4097"]
    vec = made.bootstrap.extents(ino, 0, 4097)
    assert device.missing(vec) == []
    with twin(made, 7, {"coff": 1}):
        made.generation += 1
        assert "uncached" in made.prepare()
        assert device.missing(vec) != []
    device.close()


def test_published_without_a_file_it_has_none(made: Jobs) -> None:
    with twin(made, 7, {"coff": 1}):
        again(made)
        with made.segment() as segment:
            assert segment.identity.ino == 0
